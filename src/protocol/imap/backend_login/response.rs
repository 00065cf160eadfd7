//! Lines of a server, taken apart by hand: the codec refuses an OK without text and 8-bit text, which real servers send.

/// A line of the server, taken apart.
pub(super) enum Line<'a> {
    /// With what follows `+ `.
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
            // Some servers omit the space when nothing follows it.
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

/// `OK text`, `NO text`, `BAD text`, with or without text.
pub(super) fn status(content: &[u8]) -> Option<(Status, &[u8])> {
    let end = content.iter().position(|byte| *byte == b' ').unwrap_or(content.len());
    let text = content.get(end + 1..).unwrap_or_default();
    let word = &content[..end];
    let statuses = [("OK", Status::Ok), ("NO", Status::No), ("BAD", Status::Bad)];
    let (_, status) = statuses.into_iter().find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()))?;
    Some((status, text))
}

pub(super) fn is_word(content: &[u8], word: &[u8]) -> bool {
    content.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
        && content.get(word.len()).is_none_or(|byte| *byte == b' ')
}

/// The place in `imap://user;AUTH=*@host:port/`, RFC 5092 section 11.
pub(super) fn referred(url: &[u8]) -> Option<(String, u16)> {
    let rest = std::str::from_utf8(url).ok()?.strip_prefix("imap://")?;
    let authority = rest.split(['/', '?']).next()?;
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    // An IPv6 address would need brackets, which end a response code.
    let (host, port) = place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port)));
    let port = port.map_or(Some(143), |port| port.parse().ok().filter(|port| *port != 0))?;
    (!host.is_empty()).then(|| (host.to_ascii_lowercase(), port))
}
