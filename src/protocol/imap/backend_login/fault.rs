//! Faults of a server that could not verify a login. `backend_login` reports them, and `verdict` decides about them.

macro_rules! faults {
    ($($(#[$doc:meta])* $variant:ident = $sentence:literal,)*) => {
        /// Why a server could not verify a login.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ServerFault { $($(#[$doc])* $variant,)* }

        impl ServerFault {
            /// Every fault, in the order of the documentation's table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The description in logs and in the documentation's table.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $sentence,)* }
            }
        }
    };
}

faults! {
    /// The TCP connection or its TLS handshake failed.
    Unreachable = "the server cannot be reached, or its TLS handshake fails",
    /// The server accepted the connection, but sent no greeting within `limits.connect`.
    Silent = "no greeting within limits.connect",
    /// There was no connection or greeting within `limits.connect` while many other logins waited for the server's answer.
    Crowded = "no connection or greeting within limits.connect, while 16 other logins wait for the server's answer",
    /// The greeting was not `* OK`.
    Greeting = "the greeting was not * OK",
    /// STARTTLS is configured, but the server does not offer it.
    StartTlsNotOffered = "STARTTLS is configured but the server does not offer it",
    /// The server offered STARTTLS and then refused it.
    StartTlsRefused = "the server refused STARTTLS",
    /// Plaintext followed the answer to STARTTLS, which may be an injection.
    StartTlsResidue = "plaintext followed the server's answer to STARTTLS",
    /// The server offers no form of login that `login_with` permits.
    LoginDisabled = "the server offers no form of login that login_with permits",
    /// The login has an authorization identity, but the server does not support PLAIN.
    AuthzidUnsupported = "the server has no AUTHENTICATE PLAIN to carry the authorization identity",
    /// The server does not support the client's mechanism.
    MechanismUnsupported = "the server does not have the mechanism of the client's login",
    /// A line is not IMAP, or not valid at this stage.
    Protocol = "the server broke the protocol",
    /// Untagged lines before the answer exceed a limit.
    TooMuchUntagged = "the server sent too much before its answer",
    /// The server sent `* BYE` before the answer.
    Bye = "the server sent BYE before it answered",
    /// The server closed or reset the connection before the answer.
    Closed = "the server closed or reset the connection before it answered",
    /// The server did not answer within `limits.server_login`.
    Timeout = "no answer within the deadline",
    /// The server answered NO with a code or text that means an outage.
    Overloaded = "the server answered that it is unavailable or at fault",
    /// The server answered NO with a code or text that means a limit or a lock of this user.
    UserLimit = "the server refuses the login because of a limit of the user",
    /// The server answered NO `[PRIVACYREQUIRED]`: it requires TLS from the proxy.
    TlsRequired = "the server demands TLS for logins: set tls of the backend",
    /// The server answered BAD to every form of the login.
    LoginBad = "the server answered BAD to the login",
    /// The server sent more challenges than any mechanism has.
    TooManyChallenges = "the server sent too many challenges before it answered the login",
}
