//! Parses response lines of a server. imap-codec is not used, because it rejects an OK without text and 8-bit text, which real
//! servers send.

/// A response line.
pub(super) enum Line<'a> {
    /// A continuation request, with the text after `+ `.
    Continuation(&'a [u8]),
    Untagged(&'a [u8]),
    Tagged {
        tag: &'a [u8],
        status: Status,
        text: &'a [u8],
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    No,
    Bad,
}

impl<'a> Line<'a> {
    pub(super) fn parse(line: &'a [u8]) -> Option<Self> {
        if let Some(text) = line.strip_prefix(b"+") {
            // Some servers omit the space before an empty text.
            return Some(Self::Continuation(text.strip_prefix(b" ").unwrap_or(text)));
        }
        let split = line.iter().position(|byte| *byte == b' ')?;
        let (tag, content) = (&line[..split], &line[split + 1..]);
        if tag == b"*" {
            return Some(Self::Untagged(content));
        }
        let (status, text) = status(content)?;
        Some(Self::Tagged { tag, status, text })
    }
}

/// Parses `OK text`, `NO text` or `BAD text`, with or without a text.
pub(super) fn status(content: &[u8]) -> Option<(Status, &[u8])> {
    let end = content.iter().position(|byte| *byte == b' ').unwrap_or(content.len());
    let text = content.get(end + 1..).unwrap_or_default();
    let word = &content[..end];
    let statuses = [("OK", Status::Ok), ("NO", Status::No), ("BAD", Status::Bad)];
    let (_, status) = statuses.into_iter().find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()))?;
    Some((status, text))
}

/// Whether `content` begins with `word` in any letter case, followed by a space or the end.
pub(super) fn starts_with_word(content: &[u8], word: &[u8]) -> bool {
    content.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
        && content.get(word.len()).is_none_or(|byte| *byte == b' ')
}

/// Returns host and port of `imap://user;AUTH=*@host:port/` (RFC 5092 section 11).
pub(super) fn referral_target(url: &[u8]) -> Option<(String, u16)> {
    let rest = std::str::from_utf8(url).ok()?.strip_prefix("imap://")?;
    let authority = rest.split(['/', '?']).next()?;
    let address = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
    // IPv6 addresses are not supported: their brackets would end the response code.
    let (host, port) = address.split_once(':').map_or((address, None), |(host, port)| (host, Some(port)));
    let port = port.map_or(Some(143), |port| port.parse().ok().filter(|port| *port != 0))?;
    (!host.is_empty()).then(|| (host.to_ascii_lowercase(), port))
}
