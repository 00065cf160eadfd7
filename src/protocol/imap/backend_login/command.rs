//! The login commands for a server, in the forms that it supports.

use zeroize::Zeroizing;

use super::fault::ServerFault;
use crate::identity::{LoginWith, Mechanism, PasswordLogin, ServerLogin};
use crate::protocol::imap::capability::CapabilityList;
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::sasl;

/// Maximum size of an initial response in bytes of base64. Dovecot's login process reads 1 KiB of a command line; a longer
/// response is sent after a continuation request.
const MAX_INITIAL_RESPONSE: usize = 900;
/// Maximum total size of LOGIN's two arguments, for the same reason.
const MAX_LOGIN_ARGUMENTS: usize = 980;
/// Up to this size, in bytes of base64, a BAD is not caused by the length of the response.
const MAX_CONCLUSIVE_RESPONSE: usize = 256;
/// Maximum size of a non-synchronising literal with LITERAL- (RFC 7888 section 5).
const MAX_LITERAL_MINUS: usize = 4096;

/// A form of the login command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoginForm {
    /// AUTHENTICATE with the response in the command (RFC 4959).
    InitialResponse = 1,
    /// AUTHENTICATE with the response after a continuation request.
    Continuation = 2,
    /// The LOGIN command.
    Command = 4,
}

/// A set of login forms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LoginForms(u8);

impl LoginForms {
    pub(super) fn insert(&mut self, form: LoginForm) {
        self.0 |= form as u8;
    }

    pub(super) fn has(self, form: LoginForm) -> bool {
        self.0 & form as u8 != 0
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Returns the forms in which a server with these capabilities accepts `login`, the preferred one first. `client` is the command
/// that the client used, or `None` for a login of the proxy itself.
pub(super) fn forms(
    login: &ServerLogin<'_>,
    capabilities: &CapabilityList,
    with: LoginWith,
    client: Option<Mechanism>,
) -> Result<Vec<LoginForm>, ServerFault> {
    use LoginForm::{Command, Continuation, InitialResponse};
    let has_mechanism = capabilities.mechanisms().has(mechanism(login));
    let (order, may_login): (&[LoginForm], bool) = match login {
        // Client and server continue the exchange, so it must be this mechanism.
        ServerLogin::Relayed { .. } if !has_mechanism => return Err(ServerFault::MechanismUnsupported),
        ServerLogin::Relayed { .. } => (&[InitialResponse, Continuation], false),
        ServerLogin::Password(PasswordLogin { authzid: Some(_), .. }) if !has_mechanism => {
            return Err(ServerFault::AuthzidUnsupported);
        }
        ServerLogin::Password(password) => {
            let may_login = password.authzid.is_none() && !capabilities.has("LOGINDISABLED");
            (password_forms(password, with, client), may_login)
        }
    };
    let may_be_initial = capabilities.has("SASL-IR") && response(login).len() <= MAX_INITIAL_RESPONSE;
    let available = order.iter().copied().filter(|form| match form {
        InitialResponse => has_mechanism && may_be_initial,
        Continuation => has_mechanism,
        Command => may_login,
    });
    let available: Vec<LoginForm> = available.collect();
    match available.is_empty() {
        // The client chose the command, and must not be able to mark the server as failed.
        true if with == LoginWith::AsClient && client.is_some() => Err(ServerFault::MechanismUnsupported),
        true => Err(ServerFault::LoginDisabled),
        false => Ok(available),
    }
}

fn password_forms(password: &PasswordLogin<'_>, with: LoginWith, client: Option<Mechanism>) -> &'static [LoginForm] {
    use LoginForm::{Command, Continuation, InitialResponse};
    const PLAIN: &[LoginForm] = &[InitialResponse, Continuation];
    // SASL's LOGIN has the same two arguments as the command.
    let is_login = matches!(client, Some(Mechanism::Login | Mechanism::SaslLogin));
    let is_plain = client == Some(Mechanism::SaslPlain);
    match with {
        // LOGIN has no authorization identity.
        _ if password.authzid.is_some() => PLAIN,
        LoginWith::Plain => PLAIN,
        LoginWith::Login => &[Command],
        LoginWith::AsClient if is_login => &[Command],
        LoginWith::AsClient if is_plain => PLAIN,
        LoginWith::Automatic | LoginWith::AsClient if is_login && fits_login(password) => {
            &[Command, InitialResponse, Continuation]
        }
        LoginWith::Automatic | LoginWith::AsClient if is_login || is_plain => &[InitialResponse, Continuation, Command],
        // Saving a round trip is preferred to keeping the client's command.
        LoginWith::Automatic | LoginWith::AsClient => &[InitialResponse, Command, Continuation],
    }
}

/// Whether the LOGIN command is a single line that every server accepts, in ASCII as in RFC 3501.
fn fits_login(password: &PasswordLogin<'_>) -> bool {
    let arguments = [password.user.as_str().as_bytes(), password.password.expose()];
    arguments.iter().all(|argument| is_quotable(argument))
        && arguments.iter().map(|argument| quoted(argument).len()).sum::<usize>() <= MAX_LOGIN_ARGUMENTS
}

fn mechanism(login: &ServerLogin<'_>) -> Mechanism {
    match login {
        ServerLogin::Password(_) => Mechanism::SaslPlain,
        ServerLogin::Relayed { mechanism, .. } => (*mechanism).into(),
    }
}

fn sasl_name(login: &ServerLogin<'_>) -> &'static str {
    match login {
        ServerLogin::Password(_) => "PLAIN",
        ServerLogin::Relayed { mechanism, .. } => mechanism.sasl_name(),
    }
}

/// Returns the `rejected` forms that the server does not support. BAD to the other ones may be caused by the credentials: a long
/// response, or special characters in an argument of LOGIN. A user must not be able to change how other users are logged in.
pub(super) fn unsupported(login: &ServerLogin<'_>, rejected: LoginForms) -> LoginForms {
    let is_plain = |bytes: &[u8]| bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_@".contains(byte));
    let is_simple = match login {
        ServerLogin::Password(it) => is_plain(it.user.as_str().as_bytes()) && is_plain(it.password.expose()),
        ServerLogin::Relayed { .. } => false,
    };
    let mut unsupported = LoginForms::default();
    if response(login).len() <= MAX_CONCLUSIVE_RESPONSE {
        let forms = [LoginForm::InitialResponse, LoginForm::Continuation, LoginForm::Command].into_iter();
        forms
            .filter(|form| rejected.has(*form) && (*form != LoginForm::Command || is_simple))
            .for_each(|form| unsupported.insert(form));
    }
    unsupported
}

/// Returns the response to AUTHENTICATE in base64.
pub(super) fn response(login: &ServerLogin<'_>) -> Zeroizing<Vec<u8>> {
    match login {
        ServerLogin::Password(password) => sasl::plain_response(password),
        ServerLogin::Relayed { first, .. } => sasl::encode(first.expose()),
    }
}

/// Returns the login command in parts: the first is sent at once, each further part after a continuation request.
pub(super) fn in_form(
    login: &ServerLogin<'_>,
    form: LoginForm,
    capabilities: &CapabilityList,
) -> Vec<Zeroizing<Vec<u8>>> {
    let name = sasl_name(login).as_bytes();
    match (form, login) {
        (LoginForm::Command, ServerLogin::Password(password)) => login_command(password, capabilities),
        (LoginForm::InitialResponse, _) => vec![joined(&[b"L AUTHENTICATE ", name, b" ", &response(login), b"\r\n"])],
        (LoginForm::Continuation | LoginForm::Command, _) => {
            vec![joined(&[b"L AUTHENTICATE ", name, b"\r\n"]), joined(&[&response(login), b"\r\n"])]
        }
    }
}

fn login_command(credentials: &PasswordLogin<'_>, capabilities: &CapabilityList) -> Vec<Zeroizing<Vec<u8>>> {
    let mut parts = Vec::new();
    let mut current = joined(&[b"L LOGIN"]);
    for argument in [credentials.user.as_str().as_bytes(), credentials.password.expose()] {
        if is_quotable(argument) {
            current = joined(&[&current, b" ", &quoted(argument)]);
        } else if capabilities.has("LITERAL+") || capabilities.has("LITERAL-") && argument.len() <= MAX_LITERAL_MINUS {
            current = joined(&[&current, format!(" {{{}+}}\r\n", argument.len()).as_bytes(), argument]);
        } else {
            parts.push(joined(&[&current, format!(" {{{}}}\r\n", argument.len()).as_bytes()]));
            current = joined(&[argument]);
        }
    }
    parts.push(joined(&[&current, b"\r\n"]));
    parts
}

/// Whether `bytes` can be sent as a quoted string: 7-bit, without CR, LF and NUL (RFC 3501 section 9).
fn is_quotable(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| byte.is_ascii() && !matches!(byte, 0 | b'\r' | b'\n'))
}

fn quoted(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut quoted = Zeroizing::new(Vec::with_capacity(2 * bytes.len() + 2));
    quoted.push(b'"');
    for byte in bytes {
        if matches!(byte, b'"' | b'\\') {
            quoted.push(b'\\');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    quoted
}

/// Concatenates in one allocation, because a buffer that grows leaves parts of a secret in memory.
pub(super) fn joined(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(parts.concat())
}

/// Appends `I ID (…)`. Fields that cannot be quoted are omitted.
pub(super) fn id(pairs: &[IdPair], out: &mut Zeroizing<Vec<u8>>) {
    out.extend_from_slice(b"I ID (");
    let sendable = pairs.iter().filter(|(key, value)| is_quotable(key) && value.as_deref().is_none_or(is_quotable));
    for (index, (key, value)) in sendable.enumerate() {
        if index > 0 {
            out.push(b' ');
        }
        out.extend_from_slice(&quoted(key));
        out.push(b' ');
        match value {
            Some(value) => out.extend_from_slice(&quoted(value)),
            None => out.extend_from_slice(b"NIL"),
        }
    }
    out.extend_from_slice(b")\r\n");
}
