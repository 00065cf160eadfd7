//! Reasons of failures, and the side at fault.
//!
//! One closed set for replies, metrics and log records: a [`Reason`] names the failure, and its [`Side`] is where the cause
//! must be fixed.

/// Where the cause of a failure must be fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The mail client, or another program that connects as one.
    Client,
    /// The directory or service that a route queries, or its data.
    Directory,
    /// The mailbox servers.
    Backend,
    /// Vestibule, or the machine that it runs on.
    Internal,
    /// Nowhere: the operator has ended the session or stops the process.
    Shutdown,
}

impl Side {
    /// The value in labels and log records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Directory => "directory",
            Self::Backend => "backend",
            Self::Internal => "internal",
            Self::Shutdown => "shutdown",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $side:ident $variant:ident = $label:literal,)*) => {
        /// The reason of a failure, with one name for metrics and log records.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All reasons, so that every time series exists from the start.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The value in labels and log records.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// Where the cause must be fixed.
            pub fn side(self) -> Side {
                match self { $(Self::$variant => Side::$side,)* }
            }
        }
    };
}

reasons! {
    /// The PROXY header is missing or invalid, or comes from an address that is not trusted.
    Client ProxyHeader = "proxy_header",
    /// A PROXY header on a listener that has no `proxy_protocol`.
    Client UnexpectedProxyHeader = "unexpected_proxy_header",
    /// The TLS handshake failed, or took longer than `limits.handshake`.
    Client Handshake = "handshake",
    /// The client did not log in within `limits.login`.
    Client LoginDeadline = "login_deadline",
    /// Bytes were pipelined after STARTTLS (as in CVE-2011-0411).
    Client StartTlsInjection = "starttls_injection",
    /// HTTP or SMTP on an IMAP port (ALPACA, CVE-2021-3618).
    Client ForeignProtocol = "foreign_protocol",
    /// A TLS handshake on a port that begins in plaintext.
    Client TlsOnPlainPort = "tls_on_plain_port",
    /// The client has sent `limits.bad_commands` invalid commands.
    Client TooManyBadCommands = "too_many_bad_commands",
    /// The connection has had `limits.failed_logins` failed logins.
    Client TooManyFailedLogins = "too_many_failed_logins",
    /// A command line or SASL response over `limits.line`.
    Client LineTooLong = "line_too_long",
    /// A literal over `limits.literal`, or too many of them.
    Client LiteralTooLong = "literal_too_long",
    /// The connection ended before a login succeeded.
    Client Disconnected = "disconnected",
    /// The client violated TLS after its login, for example with a record that does not authenticate.
    Client TlsViolation = "tls_violation",
    /// The client read nothing for `limits.stall` while bytes waited for it.
    Client Stalled = "stalled",
    /// The client logs in on behalf of another user, which the backend's configuration does not allow.
    Client AuthzidRefused = "authzid_refused",
    /// The password is empty, which `empty_password` does not allow.
    Client EmptyPassword = "empty_password",
    /// The user name has characters that `users` does not allow.
    Client NameRefused = "name_refused",
    /// Credentials that cannot be valid: an empty name, control characters, a token without a user name.
    Client InvalidCredentials = "invalid_credentials",
    /// The login has passed too many proxies, so they form a loop.
    Client ProxyLoop = "proxy_loop",
    /// The connection was the oldest of too many that had not logged in (`limits.before_login`).
    Client Shed = "shed",
    /// Connections before login needed more memory than `limits.before_login_memory`, and this one held most of it.
    Client ShedForMemory = "shed_for_memory",
    /// The rate of login attempts from the address or of the user is exceeded.
    Client LoginRate = "login_rate",
    /// The user has reached a limit of sessions, in total or from the address.
    Client SessionLimit = "session_limit",
    /// The policy service has denied the login.
    Client PolicyDenied = "policy_denied",
    /// The policy service did not answer, and `policy.on_failure` is `deny`.
    Directory PolicyFailed = "policy_failed",
    /// A route could not be looked up.
    Directory LookupFailed = "lookup_failed",
    /// The user is unknown to all routes.
    Directory UnknownUser = "unknown_user",
    /// The route refuses the user.
    Directory RouteRefused = "refused",
    /// The user's mailbox is under maintenance, according to the route.
    Directory RouteMaintenance = "maintenance",
    /// The server has no known address: DNS has not answered, or has no address.
    Backend Resolve = "resolve",
    /// The server's address is that of one of our own listeners.
    Backend Loop = "loop",
    /// The server refused the connection, was unreachable, or was too slow to accept it.
    Backend Connect = "connect",
    /// The TLS handshake with the server failed, or its certificate is not trusted.
    Backend ServerTls = "tls",
    /// The server violated TLS after the login.
    Backend ServerTlsViolation = "tls_violation",
    /// The server read nothing for `limits.stall` while bytes waited for it.
    Backend ServerStalled = "stalled",
    /// The server has closed many sessions at once, so the client was disconnected with a delay.
    Backend ServerGone = "server_gone",
    /// The server's greeting was not `* OK`.
    Backend Greeting = "greeting",
    /// The server sent BYE or closed the connection before it answered the login.
    Backend Bye = "bye",
    /// STARTTLS is configured, but the server does not offer it or refused it.
    Backend StartTlsUnavailable = "starttls_unavailable",
    /// Plaintext followed the server's answer to STARTTLS (response injection).
    Backend StartTlsResidue = "starttls_residue",
    /// The server violated the protocol, or sent more before its answer than is allowed.
    Backend Protocol = "protocol",
    /// The server answered NO with [UNAVAILABLE] or [SERVERBUG], or with a text that means an outage.
    Backend Overloaded = "overloaded",
    /// The server answered NO with [LIMIT], [INUSE] or [OVERQUOTA], or with a text that means a limit of the user.
    Backend UserLimit = "user_limit",
    /// The server answered BAD to every form of the login.
    Backend LoginBad = "login_bad",
    /// The server offers no form of login that the configuration allows, or requires TLS for logins.
    Backend LoginDisabled = "login_disabled",
    /// The server does not offer PLAIN, which the authorization identity requires.
    Backend AuthzidUnsupported = "authzid_unsupported",
    /// The server does not offer the mechanism of the client's login, or uses another name for the user, which the mechanism
    /// cannot express.
    Backend MechanismUnsupported = "mechanism_unsupported",
    /// A server refers the user to an undeclared server, or in a circle.
    Backend Referral = "referral",
    /// The server did not answer within `limits.connect` or `limits.server_login`.
    Backend LoginTimeout = "login_timeout",
    /// The backend has no server, for example because DNS has no answer, or none whose state allows logins.
    Backend NoServer = "no_server",
    /// All servers have `max_sessions`, and the queue was full or the wait was too long.
    Backend ServersFull = "servers_full",
    /// The operating system refused a resource that a session needs.
    Internal System = "system",
    /// No local port is free for a connection to the server, or the source address is not an address of this machine.
    Internal LocalPorts = "local_ports",
    /// The session ended in a panic.
    Internal Panic = "panic",
    /// The process stops.
    Shutdown Drain = "drain",
    /// The operator has ended the user's sessions.
    Shutdown Kicked = "kicked",
    /// The user is now served by another server, or is being moved.
    Shutdown Moved = "moved",
    /// The operator drains the server.
    Shutdown ServerDrained = "server_drained",
}
