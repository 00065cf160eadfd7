//! Every line the proxy says itself, with the response codes of RFC 3501, RFC 5530 and RFC 9051.
//!
//! Nothing a client or server sent is repeated in them but the tag, which is checked. Called by `prelogin` and `session`.

use super::tag::Tag;

/// The end of the greeting.
pub(super) const READY: &str = "Vestibule ready.";

/// `tag OK text`.
pub(super) fn ok(tag: &Tag, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.as_str(), " OK ", text]);
}

/// `tag NO text`.
pub(super) fn no(tag: &Tag, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.as_str(), " NO ", text]);
}

/// `tag BAD text`, or untagged where there is no tag that could be repeated.
pub(super) fn bad(tag: Option<&Tag>, text: &str, out: &mut Vec<u8>) {
    line(out, &[tag.map_or("*", Tag::as_str), " BAD ", text]);
}

/// `* text`.
pub(super) fn untagged(text: &str, out: &mut Vec<u8>) {
    line(out, &["* ", text]);
}

/// `* BYE text`.
pub(super) fn bye(text: &str, out: &mut Vec<u8>) {
    line(out, &["* BYE ", text]);
}

/// The wrong password, the unknown user: one answer for both, unless a route has words of its own.
pub fn authentication_failed(tag: &Tag, text: Option<&str>) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [AUTHENTICATIONFAILED] ", text.unwrap_or("Authentication failed.")]);
    out
}

/// What follows the tag and its space in a complete reply line.
pub fn without_tag(reply: &[u8]) -> Option<&[u8]> {
    let tag = reply.iter().position(|byte| *byte == b' ')?;
    reply[tag + 1..].strip_suffix(b"\r\n").filter(|answer| !answer.contains(&b'\n'))
}

/// A reply line with this tag: the opposite of [`without_tag`].
pub fn with_tag(tag: &Tag, answer: &[u8]) -> Vec<u8> {
    [tag.as_str().as_bytes(), b" ", answer, b"\r\n"].concat()
}

/// A refusal, and the connection ends.
pub fn refusal_with_bye(mut refusal: Vec<u8>) -> Vec<u8> {
    bye("Authentication failed.", &mut refusal);
    refusal
}

/// The login is ended while the client is asked for its next SASL message. The connection ends too: a message that is on
/// its way would otherwise be read as a command.
pub fn exchange_cancelled(tag: &Tag) -> Vec<u8> {
    let mut out = Vec::new();
    unavailable(tag, &mut out);
    bye("[UNAVAILABLE] The login was ended, connect again.", &mut out);
    out
}

/// The client asked for another user's mailbox and may not.
pub fn authorization_failed(tag: &Tag) -> Vec<u8> {
    let mut out = Vec::new();
    no(tag, "[AUTHORIZATIONFAILED] Logging in on behalf of another user is not allowed.", &mut out);
    out
}

/// The login is refused for good, for the operator's reason.
pub fn contact_admin(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [CONTACTADMIN] ", text]);
    out
}

/// The login is refused for now, for the operator's reason.
pub fn maintenance(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [UNAVAILABLE] ", text]);
    out
}

/// Too many, of attempts or of sessions (RFC 5530).
pub fn limit(tag: &Tag, text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    line(&mut out, &[tag.as_str(), " NO [LIMIT] ", text]);
    out
}

/// No server could answer; the client may try again on the same connection.
pub(super) fn unavailable(tag: &Tag, out: &mut Vec<u8>) {
    no(tag, "[UNAVAILABLE] The mailbox is temporarily unavailable, try again later.", out);
}

/// A password was about to travel in clear.
pub(super) fn privacy_required(tag: &Tag, out: &mut Vec<u8>) {
    no(tag, "[PRIVACYREQUIRED] Login is not allowed without TLS: use STARTTLS first.", out);
}

fn line(out: &mut Vec<u8>, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}
