//! Why something did not work, and whose fault that is.
//!
//! One closed vocabulary for replies, metrics and log records: a [`Reason`] names the fault, its [`Side`] says who must
//! act. This room holds words only. `session` and `backend::connect` make the values, `metrics` counts them.

/// Who must act on a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The mail client, or whoever connects as one.
    Client,
    /// The source of routes.
    Directory,
    /// The mailbox servers.
    Backend,
    /// Vestibule itself.
    Internal,
    /// Nobody: the operator stops or drains the process.
    Shutdown,
}

impl Side {
    /// Label text.
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
        /// What went wrong, in one word that metrics and log records share.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All of them, so that metrics resolve their counters once and every series exists from the start.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Label text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// Who must act.
            pub fn side(self) -> Side {
                match self { $(Self::$variant => Side::$side,)* }
            }
        }
    };
}

reasons! {
    /// No PROXY header, a wrong one, or from where none is believed.
    Client ProxyHeader = "proxy_header",
    /// A PROXY header on a listener that has no `proxy_protocol`.
    Client UnexpectedProxyHeader = "unexpected_proxy_header",
    /// The TLS handshake failed or took too long.
    Client Handshake = "handshake",
    /// Not logged in within `limits.login`.
    Client LoginDeadline = "login_deadline",
    /// Bytes pipelined behind STARTTLS (the CVE-2011-0411 family).
    Client StartTlsInjection = "starttls_injection",
    /// HTTP or SMTP spoken to an IMAP port (CVE-2021-3618, ALPACA).
    Client ForeignProtocol = "foreign_protocol",
    /// A TLS hello on a port that speaks plaintext first.
    Client TlsOnPlainPort = "tls_on_plain_port",
    /// `limits.bad_commands` reached.
    Client TooManyBadCommands = "too_many_bad_commands",
    /// `limits.failed_logins` reached.
    Client TooManyFailedLogins = "too_many_failed_logins",
    /// A command line or SASL response over `limits.line`.
    Client LineTooLong = "line_too_long",
    /// A literal over `limits.literal`, or too many of them.
    Client LiteralTooLong = "literal_too_long",
    /// The connection ended before a login succeeded.
    Client Disconnected = "disconnected",
    /// The client broke the rules of TLS after its login: a record that does not authenticate, a message out of place.
    Client TlsViolation = "tls_violation",
    /// The client took nothing for `limits.stall` while bytes waited for it.
    Client Stalled = "stalled",
    /// The client asked for another user's mailbox and the backend's configuration forbids it.
    Client AuthzidRefused = "authzid_refused",
    /// A password of no bytes, which `empty_password` refuses.
    Client EmptyPassword = "empty_password",
    /// The name has characters that `users` does not allow.
    Client NameRefused = "name_refused",
    /// A well-formed login with credentials that cannot be right: an empty name, control characters, a token that names no user.
    Client InvalidCredentials = "invalid_credentials",
    /// The client is a proxy, and too many came before it: a circle.
    Client ProxyLoop = "proxy_loop",
    /// The oldest of too many connections that had not logged in (`limits.before_login`).
    Client Shed = "shed",
    /// Connections before their login needed more memory than `limits.before_login_memory`, and this one held most of it.
    Client ShedForMemory = "shed_for_memory",
    /// Too many login attempts from the address or for the user.
    Client LoginRate = "login_rate",
    /// The user has as many sessions as are allowed, in all or from the address.
    Client SessionLimit = "session_limit",
    /// The policy service denies the login.
    Client PolicyDenied = "policy_denied",
    /// The policy service could not answer, and `policy.on_failure` is deny.
    Directory PolicyFailed = "policy_failed",
    /// A route source could not answer.
    Directory LookupFailed = "lookup_failed",
    /// No route knows the user.
    Directory UnknownUser = "unknown_user",
    /// The route refuses this user.
    Directory RouteRefused = "refused",
    /// The route says that the user's mailbox is under maintenance.
    Directory RouteMaintenance = "maintenance",
    /// No address is known for the server: DNS has not answered, or has none.
    Backend Resolve = "resolve",
    /// The server's address leads back to one of our own listeners.
    Backend Loop = "loop",
    /// Refused, unreachable or too slow to accept a connection.
    Backend Connect = "connect",
    /// The TLS handshake with the server failed, or its certificate is not trusted.
    Backend ServerTls = "tls",
    /// The server broke the rules of TLS after the login.
    Backend ServerTlsViolation = "tls_violation",
    /// The server took nothing for `limits.stall` while bytes waited for it.
    Backend ServerStalled = "stalled",
    /// The server has closed many sessions at once without being asked: it has died, and the client was kept for a while.
    Backend ServerGone = "server_gone",
    /// The greeting was not `* OK`.
    Backend Greeting = "greeting",
    /// The server said BYE or closed before it answered the login.
    Backend Bye = "bye",
    /// STARTTLS is configured, but the server does not offer it or refuses it.
    Backend StartTlsUnavailable = "starttls_unavailable",
    /// Plaintext followed the server's answer to STARTTLS (response injection).
    Backend StartTlsResidue = "starttls_residue",
    /// The server broke the protocol, or said more before its answer than is allowed.
    Backend Protocol = "protocol",
    /// NO with [UNAVAILABLE] or [SERVERBUG], or with a text that means an outage.
    Backend Overloaded = "overloaded",
    /// NO with [LIMIT], [INUSE] or [OVERQUOTA], or with a text that means a limit of the user.
    Backend UserLimit = "user_limit",
    /// BAD in answer to the login, in every form.
    Backend LoginBad = "login_bad",
    /// The server offers no way to log in that the configuration permits, or demands TLS for it.
    Backend LoginDisabled = "login_disabled",
    /// The server has no PLAIN, which alone can carry an authorization identity.
    Backend AuthzidUnsupported = "authzid_unsupported",
    /// The server does not have the mechanism of the client's login, or the user's name there is another.
    Backend MechanismUnsupported = "mechanism_unsupported",
    /// A server refers users to a place that is no declared server, or in a circle.
    Backend Referral = "referral",
    /// No answer within `limits.connect` or `limits.server_login`.
    Backend LoginTimeout = "login_timeout",
    /// The backend has no server at all (an SRV name with no answer), or none that is to get logins.
    Backend NoServer = "no_server",
    /// All servers have `max_sessions`, and the queue was full or the wait too long.
    Backend ServersFull = "servers_full",
    /// The system refused what a session needs to go on.
    Internal System = "system",
    /// No local port is free for a connection to the server, or its source address is not one of this machine.
    Internal LocalPorts = "local_ports",
    /// A session ended in a panic.
    Internal Panic = "panic",
    /// Ended by the operator's stop.
    Shutdown Drain = "drain",
    /// The operator ended this user's sessions.
    Shutdown Kicked = "kicked",
    /// The user is served by another server from now on, or is being moved.
    Shutdown Moved = "moved",
    /// The operator takes the server out of service.
    Shutdown ServerDrained = "server_drained",
}
