//! The response lines of the proxy itself, with response codes of RFC 3501, RFC 5530 and RFC 9051.
//!
//! They contain nothing that a client or server has sent, except the client's tag, which is validated.

use super::tag::Tag;

/// The text of the greeting.
pub(super) const READY: &str = "Vestibule ready.";

/// Appends `tag OK text`.
pub(super) fn ok(tag: &Tag, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.as_str(), " OK ", text]);
}

/// Appends `tag NO text`.
pub(super) fn no(tag: &Tag, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.as_str(), " NO ", text]);
}

/// Appends `tag BAD text`, or an untagged BAD if the tag is missing or invalid.
pub(super) fn bad(tag: Option<&Tag>, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.map_or("*", Tag::as_str), " BAD ", text]);
}

/// Appends `* text`.
pub(super) fn untagged(text: &str, out: &mut Vec<u8>) {
    line(out, &["* ", text]);
}

/// Appends `* BYE text`.
pub(super) fn bye(text: &str, out: &mut Vec<u8>) {
    line(out, &["* BYE ", text]);
}

/// Refuses a wrong password or an unknown user, with the same reply for both unless a route sets `text`.
pub fn authentication_failed(tag: &Tag, text: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [AUTHENTICATIONFAILED] ", text.unwrap_or("Authentication failed.")]);
    out
}

/// Returns the part of a complete reply line after the tag and its space.
pub fn without_tag(reply: &[u8]) -> Option<&[u8]> {
    let tag = reply.iter().position(|byte| *byte == b' ')?;
    reply[tag + 1..].strip_suffix(b"\r\n").filter(|answer| !answer.contains(&b'\n'))
}

/// Returns a reply line with this tag: the inverse of [`without_tag`].
pub fn with_tag(tag: &Tag, answer: &[u8]) -> Vec<u8> {
    [tag.as_str().as_bytes(), b" ", answer, b"\r\n"].concat()
}

/// Appends a BYE to a refusal, after which the connection is closed.
pub fn refusal_with_bye(mut refusal: Vec<u8>) -> Vec<u8> {
    bye("Authentication failed.", &mut refusal);
    refusal
}

/// Ends a login while the client has to send its next SASL message. The connection closes too, because a message that is already
/// on its way would be read as a command.
pub fn exchange_cancelled(tag: &Tag) -> Vec<u8> {
    let mut out = Vec::new();
    unavailable(tag, &mut out);
    bye("[UNAVAILABLE] The login was ended, connect again.", &mut out);
    out
}

/// Refuses access to another user's mailbox.
pub fn authorization_failed(tag: &Tag) -> Vec<u8> {
    let mut out = Vec::new();
    no(tag, "[AUTHORIZATIONFAILED] Logging in on behalf of another user is not allowed.", &mut out);
    out
}

/// Refuses a login permanently, with the operator's text.
pub fn contact_admin(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [CONTACTADMIN] ", text]);
    out
}

/// Refuses a login temporarily, with the operator's text.
pub fn maintenance(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [UNAVAILABLE] ", text]);
    out
}

/// Refuses a login because of a limit of attempts or sessions (RFC 5530).
pub fn limit(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [LIMIT] ", text]);
    out
}

/// Reports that no server could verify the login; the client may try again on the same connection.
pub(super) fn unavailable(tag: &Tag, out: &mut Vec<u8>) {
    no(tag, "[UNAVAILABLE] The mailbox is temporarily unavailable, try again later.", out);
}

/// Refuses a login on a plaintext connection.
pub(super) fn privacy_required(tag: &Tag, out: &mut Vec<u8>) {
    no(tag, "[PRIVACYREQUIRED] Login is not allowed without TLS: use STARTTLS first.", out);
}

fn line(out: &mut Vec<u8>, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}
