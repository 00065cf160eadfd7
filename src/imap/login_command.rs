//! The commands that log in on a server, in the form that server takes. Called by `backend_login`.

use zeroize::Zeroizing;

use super::capability::Capabilities;
use super::client_id::Pair;
use super::sasl;
use super::server_fault::ServerFault;
use crate::identity::{Mechanism, PasswordLogin, Secret, ServerLogin};

/// A login process of Dovecot reads 1 KiB of command line; a longer initial response waits to be asked for.
const MAX_INITIAL_RESPONSE: usize = 900;
/// RFC 7888 section 5: with LITERAL- only these may go without being asked for.
const MAX_LITERAL_MINUS: usize = 4096;

/// The login command in parts: the first is sent at once, each further one when the server asks.
pub(super) fn in_parts(
    login: &ServerLogin<'_>,
    capabilities: &Capabilities,
) -> Result<Vec<Zeroizing<Vec<u8>>>, ServerFault> {
    match login {
        ServerLogin::Password(password) => password_login(password, capabilities),
        ServerLogin::Relayed { mechanism, first } => relayed_login(*mechanism, first, capabilities),
    }
}

/// A mechanism that the server does not have is not tried: nobody else could understand what the client says next.
fn relayed_login(
    mechanism: Mechanism,
    first: &Secret,
    capabilities: &Capabilities,
) -> Result<Vec<Zeroizing<Vec<u8>>>, ServerFault> {
    if !capabilities.mechanisms().has(mechanism) {
        return Err(ServerFault::MechanismUnsupported);
    }
    Ok(authenticate(mechanism, &sasl::encode(first.expose()), capabilities.has("SASL-IR")))
}

fn password_login(
    credentials: &PasswordLogin<'_>,
    capabilities: &Capabilities,
) -> Result<Vec<Zeroizing<Vec<u8>>>, ServerFault> {
    let plain = capabilities.has("AUTH=PLAIN");
    let disabled = capabilities.has("LOGINDISABLED");
    let by_plain = |initial| Ok(authenticate(Mechanism::SaslPlain, &sasl::plain_response(credentials), initial));
    if plain && capabilities.has("SASL-IR") {
        return by_plain(true);
    }
    if credentials.authzid.is_some() {
        return if plain { by_plain(false) } else { Err(ServerFault::AuthzidUnsupported) };
    }
    match (disabled, plain) {
        (true, true) => by_plain(false),
        (true, false) => Err(ServerFault::LoginDisabled),
        (false, _) => Ok(login_command(credentials, capabilities)),
    }
}

fn authenticate(mechanism: Mechanism, response: &[u8], initial: bool) -> Vec<Zeroizing<Vec<u8>>> {
    let name = mechanism.sasl_name().as_bytes();
    if initial && response.len() <= MAX_INITIAL_RESPONSE {
        return vec![joined(&[b"L AUTHENTICATE ", name, b" ", response, b"\r\n"])];
    }
    vec![joined(&[b"L AUTHENTICATE ", name, b"\r\n"]), joined(&[response, b"\r\n"])]
}

fn login_command(credentials: &PasswordLogin<'_>, capabilities: &Capabilities) -> Vec<Zeroizing<Vec<u8>>> {
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

/// RFC 3501 section 9: quoted strings are 7-bit, without CR, LF and NUL.
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

/// One allocation of the right size: nothing is left behind by a growing buffer.
pub(super) fn joined(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(parts.concat())
}

/// `I ID (…)`. Pairs that cannot be quoted are left out.
pub(super) fn id(pairs: &[Pair], out: &mut Zeroizing<Vec<u8>>) {
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
