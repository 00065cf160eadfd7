//! Faults of a server that could not answer a login. `backend_login` reports them; `login_answer` decides what follows.

macro_rules! faults {
    ($($(#[$doc:meta])* $variant:ident = $sentence:literal,)*) => {
        /// Why a server could not answer a login.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ServerFault { $($(#[$doc])* $variant,)* }

        impl ServerFault {
            /// Every fault, in the order of the documentation's table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// A sentence for logs and for the documentation's table.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $sentence,)* }
            }
        }
    };
}

faults! {
    /// No TCP connection, or its TLS handshake failed.
    Unreachable = "the server cannot be reached, or its TLS handshake fails",
    /// Connected, but no greeting within `limits.connect`.
    Silent = "no greeting within limits.connect",
    /// No connection or greeting within `limits.connect`, while many other logins wait for the server's answer.
    Crowded = "no connection or greeting within limits.connect, while 16 other logins wait for the server's answer",
    /// The greeting was not `* OK`.
    Greeting = "the greeting was not * OK",
    /// TLS is required and not offered.
    StartTlsNotOffered = "STARTTLS is configured but the server does not offer it",
    /// TLS was offered and then refused.
    StartTlsRefused = "the server refused STARTTLS",
    /// Plaintext followed the answer to STARTTLS: it may have been injected.
    StartTlsResidue = "plaintext followed the server's answer to STARTTLS",
    /// LOGINDISABLED, and no other form of login that the configuration permits.
    LoginDisabled = "the server offers no form of login that login_with permits",
    /// An authorization identity, and no PLAIN to carry it.
    AuthzidUnsupported = "the server has no AUTHENTICATE PLAIN to carry the authorization identity",
    /// The client's mechanism, which the server does not have.
    MechanismUnsupported = "the server does not have the mechanism of the client's login",
    /// A line that is not IMAP, or not valid at this point.
    Protocol = "the server broke the protocol",
    /// More lines or bytes before the answer than is allowed.
    TooMuchUntagged = "the server sent too much before its answer",
    /// `* BYE` before the answer.
    Bye = "the server sent BYE before it answered",
    /// The connection ended before the answer.
    Closed = "the server closed or reset the connection before it answered",
    /// No answer within `limits.server_login`.
    Timeout = "no answer within the deadline",
    /// NO with a code or text that means an outage.
    Overloaded = "the server answered that it is unavailable or at fault",
    /// NO with a code or text that means a limit or a lock of this user.
    UserLimit = "the server refuses the login because of a limit of the user",
    /// NO `[PRIVACYREQUIRED]`: the server wants TLS from the proxy.
    TlsRequired = "the server demands TLS for logins: set tls of the backend",
    /// BAD in answer to every form of the login.
    LoginBad = "the server answered BAD to the login",
    /// More challenges than any mechanism has.
    TooManyChallenges = "the server sent too many challenges before it answered the login",
}
