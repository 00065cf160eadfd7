//! Why a server could not answer a login, and what follows from it. Made by `backend_login`, judged by `backend`.

/// Why a server could not answer a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerFault {
    /// The greeting was not `* OK`.
    Greeting,
    /// `* BYE` before the answer.
    Bye,
    /// TLS is demanded and not offered.
    StartTlsNotOffered,
    /// TLS was offered and then refused.
    StartTlsRefused,
    /// Plaintext followed the answer to STARTTLS: somebody may have put it there.
    StartTlsResidue,
    /// Something that is no IMAP, or not at this place.
    Protocol,
    /// More before the answer than is allowed.
    TooMuchUntagged,
    /// LOGINDISABLED, and no PLAIN either.
    LoginDisabled,
    /// NO with `[UNAVAILABLE]`, `[INUSE]` or `[SERVERBUG]`.
    Overloaded,
    /// BAD in answer to the login.
    LoginBad,
    /// An authorization identity, and no PLAIN to carry it.
    AuthzidUnsupported,
    /// The client's mechanism, which the server does not have.
    MechanismUnsupported,
    /// More challenges than any mechanism has.
    TooManyChallenges,
}

impl ServerFault {
    /// A sentence for logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Greeting => "the greeting was not * OK",
            Self::Bye => "the server said BYE before it answered",
            Self::StartTlsNotOffered => "STARTTLS is configured but the server does not offer it",
            Self::StartTlsRefused => "the server refused STARTTLS",
            Self::StartTlsResidue => "plaintext followed the server's answer to STARTTLS",
            Self::Protocol => "the server broke the protocol",
            Self::TooMuchUntagged => "the server said too much before its answer",
            Self::LoginDisabled => "the server allows neither LOGIN nor AUTHENTICATE PLAIN",
            Self::Overloaded => "the server answered that it is unavailable, in use or at fault",
            Self::LoginBad => "the server answered BAD to the login",
            Self::AuthzidUnsupported => "the server has no AUTHENTICATE PLAIN to carry the authorization identity",
            Self::MechanismUnsupported => "the server does not have the mechanism of the client's login",
            Self::TooManyChallenges => "the server asks too many things before it answers the login",
        }
    }

    /// Whether another server may answer where this one did not.
    pub fn try_next_server(self) -> bool {
        !matches!(self, Self::LoginBad | Self::TooManyChallenges)
    }

    /// Whether the server's health suffers: never from what a client can provoke by what it sends.
    pub fn blames_server(self) -> bool {
        match self {
            Self::Greeting
            | Self::Bye
            | Self::StartTlsNotOffered
            | Self::StartTlsRefused
            | Self::StartTlsResidue
            | Self::Protocol
            | Self::TooMuchUntagged
            | Self::LoginDisabled => true,
            // A mailbox in use is one user's trouble.
            Self::Overloaded
            | Self::LoginBad
            | Self::AuthzidUnsupported
            | Self::MechanismUnsupported
            | Self::TooManyChallenges => false,
        }
    }
}
