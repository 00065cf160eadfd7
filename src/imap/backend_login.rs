//! The server until it has accepted or refused a login: bytes in, bytes and steps out.
//!
//! The login takes the form the server can take: AUTHENTICATE PLAIN with an initial response (RFC 4959) where it is
//! advertised, else LOGIN, quoted where that is possible and with literals it asked for or waits for where not. A
//! mechanism that is relayed goes as it came, challenge by challenge. One round trip where the greeting carries
//! capabilities. Lines are read by hand, not through the codec, which refuses an OK
//! without text and 8-bit text that real servers send. What the server says is untrusted: bounded, matched by exact tag,
//! and forgotten when TLS begins. Called by `backend::connect`.

use zeroize::Zeroizing;

use super::capability::{self, Capabilities};
use super::client_id::Pair;
use super::framing::{Caps, Frame, Framer, announced, without_line_end};
use super::login_command;
pub use super::server_fault::ServerFault;
use super::tag::Tag;
use crate::identity::{Mechanisms, ServerLogin, append_wiped};

/// SCRAM has two, a refused token one.
const MAX_CHALLENGES: usize = 4;

/// One login to be made on one connection.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// What to log in with; none: only to see what the server offers.
    pub login: Option<ServerLogin<'a>>,
    /// What the answer is given under.
    pub tag: &'a Tag,
    /// Demand TLS before anything else.
    pub starttls: bool,
    /// Pairs for ID; none: no ID is sent.
    pub id: Vec<Pair>,
    /// Bytes of a line.
    pub max_line: usize,
    /// Untagged lines before the answer.
    pub max_untagged_lines: usize,
    /// Bytes of them together.
    pub max_untagged_bytes: usize,
}

/// What the caller does next; what is in `out` is sent first.
#[derive(Debug)]
pub enum ServerStep {
    /// Read more.
    NeedInput,
    /// Perform the handshake, then call [`BackendLogin::tls_established`].
    StartTls,
    /// Logged in: these bytes are the client's.
    Accepted {
        /// Untagged lines, the OK under the client's tag, and what followed it.
        to_client: Vec<u8>,
    },
    /// The server said no.
    Refused {
        /// A complete line under the client's tag.
        reply: Vec<u8>,
        /// Whether it is a failed login, and not a matter of limits or maintenance.
        counts: bool,
    },
    /// The server asks the client something: this is what follows `+ `. The answer goes to [`BackendLogin::respond`].
    Challenge(Vec<u8>),
    /// The server knows where the user is: elsewhere.
    Referred(Referral),
    /// There was nothing to log in with, and this is what the server offers.
    Seen(Offer),
    /// The server could not answer.
    Unavailable(ServerFault),
}

/// Where a server sends a user to (RFC 2221).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referral {
    /// An address or a DNS name, in lower case.
    pub host: String,
    /// 143 where none is given (RFC 5092 section 2).
    pub port: u16,
    /// The server's answer for the client, should it not be followed.
    pub reply: Vec<u8>,
}

/// What a server offers before login.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offer {
    /// Ways to log in.
    pub mechanisms: Mechanisms,
}

/// The dialogue so far.
#[derive(Debug)]
pub struct BackendLogin<'a> {
    attempt: Attempt<'a>,
    framer: Framer,
    phase: Phase,
    encrypted: bool,
    /// As last heard; nothing while unknown.
    capabilities: Option<Capabilities>,
    /// Parts of the login that wait to be asked for.
    parts: std::vec::IntoIter<Zeroizing<Vec<u8>>>,
    /// The client's answer to a challenge, to be sent.
    response: Option<Zeroizing<Vec<u8>>>,
    challenges: usize,
    /// What the server said to our ID.
    id_answer: Option<IdAnswer>,
    /// For the client, ahead of the answer.
    untagged: Vec<u8>,
    untagged_lines: usize,
    /// Whether a list of capabilities names UNAUTHENTICATE.
    unauthenticate: bool,
    /// A CAPABILITY line came with the login's answer.
    told_after_login: bool,
    /// The server's OK without its tag, while its capabilities are asked for.
    accepted: Vec<u8>,
}

/// What the server said to an ID with fields that only trusted proxies may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdAnswer {
    /// "Trusted ID completed.", as Dovecot has it since 2.4.
    Trusted,
    /// Anything else. Dovecot before 2.4 answers the same whether or not it trusts.
    Silent,
}

/// What the server is expected to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Capability,
    StartTls,
    Handshake,
    Login,
    CapabilityAfterLogin,
}

/// A line of the server, taken apart.
enum Line<'a> {
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
enum Status {
    Ok,
    No,
    Bad,
}

impl<'a> BackendLogin<'a> {
    /// For a fresh connection, before its greeting.
    pub fn new(attempt: Attempt<'a>) -> Self {
        let caps = Caps { line: attempt.max_line, literal: 0 };
        Self {
            attempt,
            framer: Framer::new(caps),
            phase: Phase::Greeting,
            encrypted: false,
            capabilities: None,
            parts: Vec::new().into_iter(),
            response: None,
            challenges: 0,
            id_answer: None,
            untagged: Vec::new(),
            untagged_lines: 0,
            unauthenticate: false,
            told_after_login: false,
            accepted: Vec::new(),
        }
    }

    /// Bytes from the server.
    pub fn input(&mut self, bytes: &[u8]) {
        self.framer.input(bytes);
    }

    /// The handshake succeeded: what was heard before it counts for nothing.
    pub fn tls_established(&mut self) {
        self.encrypted = true;
        self.capabilities = None;
        self.unauthenticate = false;
        self.untagged_lines = 0;
    }

    /// The client's answer to [`ServerStep::Challenge`], as it stands in its line.
    pub fn respond(&mut self, line: &[u8]) {
        self.response = Some(login_command::joined(&[line, b"\r\n"]));
    }

    /// What the server said to our ID, if it was sent and answered.
    pub fn id_answer(&self) -> Option<IdAnswer> {
        self.id_answer
    }

    /// Whether the server has UNAUTHENTICATE (RFC 8437), as far as its capabilities have been seen.
    pub fn advertises_unauthenticate(&self) -> bool {
        self.unauthenticate
    }

    fn note(&mut self, capabilities: &Capabilities) {
        self.unauthenticate |= capabilities.has("UNAUTHENTICATE");
    }

    /// What the server offers before login, as far as it is known.
    pub fn offer(&self) -> Option<Offer> {
        // After the login it tells of other things.
        let capabilities = self.capabilities.as_ref().filter(|_| self.phase != Phase::CapabilityAfterLogin)?;
        Some(Offer { mechanisms: capabilities.mechanisms() })
    }

    /// What is waited for, for logs.
    pub fn state(&self) -> &'static str {
        match self.phase {
            Phase::Greeting => "waiting for the greeting",
            Phase::Capability => "asked for capabilities",
            Phase::StartTls => "asked for STARTTLS",
            Phase::Handshake => "TLS handshake",
            Phase::Login => "login sent",
            Phase::CapabilityAfterLogin => "logged in, asked for capabilities",
        }
    }

    /// Whether the server has what the client sent, in whole or in part.
    pub fn login_sent(&self) -> bool {
        matches!(self.phase, Phase::Login | Phase::CapabilityAfterLogin)
    }

    /// Goes on as far as the input allows; what the server is to be sent is appended to `out`.
    pub fn step(&mut self, out: &mut Zeroizing<Vec<u8>>) -> ServerStep {
        if self.phase == Phase::Handshake {
            match self.proceed(out) {
                Err(fault) => return ServerStep::Unavailable(fault),
                Ok(Some(step)) => return step,
                Ok(None) => {}
            }
        }
        if let Some(response) = self.response.take() {
            append_wiped(out, &response);
        }
        loop {
            match self.framer.line() {
                Frame::Complete => {}
                Frame::Incomplete => return ServerStep::NeedInput,
                _ => return ServerStep::Unavailable(ServerFault::Protocol),
            }
            let line = self.framer.take();
            match self.line(without_line_end(&line), out) {
                Ok(None) => {}
                Ok(Some(step)) => return step,
                Err(fault) => return ServerStep::Unavailable(fault),
            }
        }
    }

    fn line(&mut self, line: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Result<Option<ServerStep>, ServerFault> {
        let parsed = Line::parse(line).ok_or(match self.phase {
            Phase::Greeting => ServerFault::Greeting,
            _ => ServerFault::Protocol,
        })?;
        if self.phase == Phase::Greeting {
            self.greeting(&parsed)?;
            return self.proceed(out);
        }
        match parsed {
            Line::Untagged(content) => self.untagged(line, content).map(|()| None),
            Line::Continuation(_) if self.phase != Phase::Login => Err(ServerFault::Protocol),
            Line::Continuation(text) => match self.parts.next() {
                Some(part) => {
                    append_wiped(out, &part);
                    Ok(None)
                }
                None => self.challenge(text).map(Some),
            },
            Line::Tagged { tag, status, text } => self.tagged(tag, status, text, out),
        }
    }

    fn challenge(&mut self, text: &[u8]) -> Result<ServerStep, ServerFault> {
        if !matches!(self.attempt.login, Some(ServerLogin::Relayed { .. })) {
            return Err(ServerFault::Protocol);
        }
        self.challenges += 1;
        if self.challenges > MAX_CHALLENGES {
            return Err(ServerFault::TooManyChallenges);
        }
        Ok(ServerStep::Challenge(text.to_vec()))
    }

    fn greeting(&mut self, line: &Line<'_>) -> Result<(), ServerFault> {
        let Line::Untagged(content) = line else { return Err(ServerFault::Greeting) };
        match status(content) {
            Some((Status::Ok, text)) => {
                let capabilities = Capabilities::from_code(text);
                capabilities.iter().for_each(|capabilities| self.note(capabilities));
                self.capabilities = capabilities;
                Ok(())
            }
            _ if is_word(content, b"BYE") => Err(ServerFault::Bye),
            // PREAUTH among them: whose mailbox would that be?
            _ => Err(ServerFault::Greeting),
        }
    }

    /// Sends the next command: capabilities where they are unknown, STARTTLS where it is due, else the login.
    fn proceed(&mut self, out: &mut Zeroizing<Vec<u8>>) -> Result<Option<ServerStep>, ServerFault> {
        let Some(capabilities) = &self.capabilities else {
            out.extend_from_slice(b"C CAPABILITY\r\n");
            self.phase = Phase::Capability;
            return Ok(None);
        };
        if self.attempt.starttls && !self.encrypted {
            if !capabilities.has("STARTTLS") {
                return Err(ServerFault::StartTlsNotOffered);
            }
            out.extend_from_slice(b"S STARTTLS\r\n");
            self.phase = Phase::StartTls;
            return Ok(None);
        }
        let Some(login) = &self.attempt.login else {
            let mechanisms = capabilities.mechanisms();
            out.extend_from_slice(b"Q LOGOUT\r\n");
            return Ok(Some(ServerStep::Seen(Offer { mechanisms })));
        };
        let parts = login_command::in_parts(login, capabilities)?;
        if capabilities.has("ID") && !self.attempt.id.is_empty() {
            login_command::id(&self.attempt.id, out);
        }
        self.parts = parts.into_iter();
        if let Some(first) = self.parts.next() {
            append_wiped(out, &first);
        }
        self.phase = Phase::Login;
        Ok(None)
    }

    fn untagged(&mut self, line: &[u8], content: &[u8]) -> Result<(), ServerFault> {
        if is_word(content, b"BYE") {
            return Err(ServerFault::Bye);
        }
        // Behind a literal the line would go on, and no server has one to send here.
        if status(content).is_none() && announced(line).is_some() {
            return Err(ServerFault::Protocol);
        }
        self.untagged_lines += 1;
        if self.untagged_lines > self.attempt.max_untagged_lines
            || self.untagged.len() + line.len() > self.attempt.max_untagged_bytes
        {
            return Err(ServerFault::TooMuchUntagged);
        }
        if is_word(content, b"CAPABILITY") {
            let capabilities = Capabilities::new(&content[b"CAPABILITY".len()..]);
            self.note(&capabilities);
            if self.phase == Phase::Login {
                self.told_after_login = true;
                self.pass_on(&[b"* CAPABILITY ", &capabilities.after_login()]);
            }
            self.capabilities = Some(capabilities);
            return Ok(());
        }
        let after_login_began = matches!(self.phase, Phase::Login | Phase::CapabilityAfterLogin);
        if after_login_began && !is_word(content, b"ID") {
            self.pass_on(&[line]);
        }
        Ok(())
    }

    fn pass_on(&mut self, line: &[&[u8]]) {
        for part in line {
            self.untagged.extend_from_slice(part);
        }
        self.untagged.extend_from_slice(b"\r\n");
    }

    fn tagged(
        &mut self,
        tag: &[u8],
        status: Status,
        text: &[u8],
        out: &mut Zeroizing<Vec<u8>>,
    ) -> Result<Option<ServerStep>, ServerFault> {
        match (self.phase, tag, status) {
            (Phase::Capability, b"C", Status::Ok) => {
                // A server that names none can do what every server can.
                self.capabilities.get_or_insert_default();
                self.proceed(out)
            }
            (Phase::StartTls, b"S", Status::Ok) if self.framer.has_leftover() => Err(ServerFault::StartTlsResidue),
            (Phase::StartTls, b"S", Status::Ok) => {
                self.phase = Phase::Handshake;
                Ok(Some(ServerStep::StartTls))
            }
            (Phase::StartTls, b"S", _) => Err(ServerFault::StartTlsRefused),
            // Whether the server likes our ID does not matter.
            (Phase::Login, b"I", _) => {
                let trusted = status == Status::Ok
                    && text.get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"Trusted ID"));
                self.id_answer = Some(if trusted { IdAnswer::Trusted } else { IdAnswer::Silent });
                Ok(None)
            }
            (Phase::Login, b"L", Status::Ok) => Ok(self.logged_in(text, out)),
            (Phase::Login, b"L", Status::No) => self.refused(text).map(Some),
            // Behind a challenge that is the client's doing: it broke off, or said what makes no sense.
            (Phase::Login, b"L", Status::Bad) if self.challenges > 0 => {
                let text: &[u8] = if text.is_empty() { b"Authentication aborted." } else { text };
                let reply = [self.attempt.tag.as_str().as_bytes(), b" BAD ", text, b"\r\n"].concat();
                Ok(Some(ServerStep::Refused { reply, counts: true }))
            }
            (Phase::Login, b"L", Status::Bad) => Err(ServerFault::LoginBad),
            (Phase::CapabilityAfterLogin, b"D", _) => {
                let known = self.capabilities.take().map(|capabilities| capabilities.after_login());
                let text = std::mem::take(&mut self.accepted);
                Ok(Some(self.accept(known.as_deref(), &text)))
            }
            _ => Err(ServerFault::Protocol),
        }
    }

    /// The client is told the capabilities with the OK. Where the server told none, it is asked.
    fn logged_in(&mut self, text: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Option<ServerStep> {
        if let Some(capabilities) = Capabilities::from_code(text) {
            self.note(&capabilities);
            let text = capability::code(text).map_or(text, |(_, _, rest)| rest);
            return Some(self.accept(Some(&capabilities.after_login()), text));
        }
        if self.told_after_login {
            return Some(self.accept(None, text));
        }
        self.accepted = text.to_vec();
        self.capabilities = None;
        self.phase = Phase::CapabilityAfterLogin;
        out.extend_from_slice(b"D CAPABILITY\r\n");
        None
    }

    /// `text` is what follows OK, without a capability code.
    fn accept(&mut self, capabilities: Option<&[u8]>, text: &[u8]) -> ServerStep {
        let mut to_client = std::mem::take(&mut self.untagged);
        let code = match capabilities {
            None => Vec::new(),
            // There is one place for a code, and the server's own stays in it.
            Some(list) if capability::code(text).is_some() => {
                to_client.extend_from_slice(&[b"* CAPABILITY ", list, b"\r\n"].concat());
                Vec::new()
            }
            Some(list) => [b"[CAPABILITY ", list, b"] "].concat(),
        };
        // resp-text must not be empty (RFC 3501 section 9), whatever the server thought.
        let text = if text.is_empty() { b"Logged in." } else { text };
        to_client.extend_from_slice(&[self.attempt.tag.as_str().as_bytes(), b" OK ", &code, text, b"\r\n"].concat());
        let framer = std::mem::replace(&mut self.framer, Framer::new(Caps { line: 0, literal: 0 }));
        to_client.extend_from_slice(&framer.into_leftover());
        ServerStep::Accepted { to_client }
    }

    fn refused(&self, text: &[u8]) -> Result<ServerStep, ServerFault> {
        let code = capability::code(text).map(|(code, ..)| code);
        let is = |names: &[&str]| {
            code.is_some_and(|code| names.iter().any(|name| code.eq_ignore_ascii_case(name.as_bytes())))
        };
        if is(&["UNAVAILABLE", "INUSE", "SERVERBUG"]) {
            return Err(ServerFault::Overloaded);
        }
        if is(&["REFERRAL"])
            && let Some((_, url, _)) = capability::code(text)
            && let Some((host, port)) = referred(url)
        {
            let reply = [self.attempt.tag.as_str().as_bytes(), b" NO ", text, b"\r\n"].concat();
            return Ok(ServerStep::Referred(Referral { host, port, reply }));
        }
        let counts = code.is_none() || is(&["AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "EXPIRED"]);
        let added: &[u8] = if code.is_none() { b"[AUTHENTICATIONFAILED] " } else { b"" };
        let text: &[u8] = if text.is_empty() { b"Authentication failed." } else { text };
        let reply = [self.attempt.tag.as_str().as_bytes(), b" NO ", added, text, b"\r\n"].concat();
        Ok(ServerStep::Refused { reply, counts })
    }
}

impl<'a> Line<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        if let Some(text) = line.strip_prefix(b"+") {
            // Some servers leave the space out where nothing follows.
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
fn status(content: &[u8]) -> Option<(Status, &[u8])> {
    let end = content.iter().position(|byte| *byte == b' ').unwrap_or(content.len());
    let text = content.get(end + 1..).unwrap_or_default();
    let word = &content[..end];
    let statuses = [("OK", Status::Ok), ("NO", Status::No), ("BAD", Status::Bad)];
    let (_, status) = statuses.into_iter().find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()))?;
    Some((status, text))
}

fn is_word(content: &[u8], word: &[u8]) -> bool {
    content.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
        && content.get(word.len()).is_none_or(|byte| *byte == b' ')
}

/// `imap://user;AUTH=*@host:port/`, RFC 5092 section 11.
fn referred(url: &[u8]) -> Option<(String, u16)> {
    let rest = std::str::from_utf8(url).ok()?.strip_prefix("imap://")?;
    let authority = rest.split(['/', '?']).next()?;
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    // An IPv6 address would need brackets, which end a response code.
    let (host, port) = place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port)));
    let port = port.map_or(Some(143), |port| port.parse().ok().filter(|port| *port != 0))?;
    (!host.is_empty()).then(|| (host.to_ascii_lowercase(), port))
}
