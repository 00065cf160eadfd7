//! The server until it has accepted or refused a login: bytes in, bytes and steps out.
//!
//! The login takes a form that the server can take (see [`command::forms`]), and the next form if the server answers
//! BAD. A mechanism that is relayed goes as it came, challenge by challenge. One round trip if the greeting carries
//! capabilities. What the server sends is untrusted: bounded, matched by exact tag, and forgotten when TLS begins. What
//! an answer means is decided by [`verdict::decide`] alone. Called by `backend::connect`.

mod attempt;
mod command;
mod fault;
mod refusal_text;
mod response;
#[cfg(test)]
mod tests;
pub mod verdict;

use zeroize::Zeroizing;

pub use self::attempt::{DialogueRules, IdAnswer, LoginAttempt, LoginStep, Referral, Unavailable, UnsupportedForms};
use self::command::{LoginForm, LoginForms};
pub use self::fault::ServerFault;
use self::response::{Line, Status, is_word, referred, status};
use self::verdict::{Action, LONG_PASSWORD, LoginStage, ServerAnswer, Verdict};
use super::capability::{self, CapabilityList, ServerCapabilities};
use super::framing::{FrameLimits, Framer, LineFrame, literal_header, without_line_end};
use super::refusal::RefusalKind;
use crate::identity::{ServerLogin, append_wiped};

/// SCRAM has two, a refused token one.
const MAX_CHALLENGES: usize = 4;

/// The dialogue so far.
#[derive(Debug)]
pub struct BackendLogin<'a> {
    attempt: LoginAttempt<'a>,
    framer: Framer,
    phase: Phase,
    encrypted: bool,
    /// As last heard; nothing while unknown.
    capabilities: Option<CapabilityList>,
    /// LoginForms of the login that the server offers, the best one first.
    forms: Vec<LoginForm>,
    /// LoginForms that the server has answered with BAD.
    rejected: LoginForms,
    /// The form that was sent last.
    form: Option<LoginForm>,
    /// Whether it was sent after BAD to another one on this connection.
    retried: bool,
    /// Whether the server got the login on an earlier connection.
    reconnected: bool,
    /// Fingerprint of the capabilities that the forms were chosen by.
    offered: u64,
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

/// What the server is expected to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Capability,
    StartTls,
    Handshake,
    Login,
    CapabilityAfterLogin,
    LoggedIn,
}

impl<'a> BackendLogin<'a> {
    /// For a fresh connection, before its greeting.
    pub fn new(attempt: LoginAttempt<'a>) -> Self {
        let limits = FrameLimits { line: attempt.max_line, literals: 0 };
        Self {
            attempt,
            framer: Framer::new(limits),
            phase: Phase::Greeting,
            encrypted: false,
            capabilities: None,
            forms: Vec::new(),
            rejected: LoginForms::default(),
            form: None,
            retried: false,
            reconnected: false,
            offered: 0,
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

    /// The login goes on over a new connection to the same server, from its greeting.
    pub fn reconnected(&mut self) {
        self.framer = Framer::new(FrameLimits { line: self.attempt.max_line, literals: 0 });
        self.phase = Phase::Greeting;
        self.encrypted = false;
        self.capabilities = None;
        self.parts = Vec::new().into_iter();
        self.id_answer = None;
        self.untagged.clear();
        self.untagged_lines = 0;
        self.told_after_login = false;
        self.accepted.clear();
        (self.retried, self.reconnected) = (false, true);
    }

    /// The client's answer to [`LoginStep::Challenge`], as it stands in its line.
    pub fn respond(&mut self, line: &[u8]) {
        self.response = Some(command::joined(&[line, b"\r\n"]));
    }

    /// What the server said to our ID, if it was sent and answered.
    pub fn id_answer(&self) -> Option<IdAnswer> {
        self.id_answer
    }

    /// Whether the server has UNAUTHENTICATE (RFC 8437), as far as its capabilities have been seen.
    pub fn advertises_unauthenticate(&self) -> bool {
        self.unauthenticate
    }

    fn note(&mut self, capabilities: &CapabilityList) {
        self.unauthenticate |= capabilities.has("UNAUTHENTICATE");
    }

    /// What the server offers before login, as far as it is known.
    pub fn offer(&self) -> Option<ServerCapabilities> {
        // After the login the list is about other things.
        let is_before = !matches!(self.phase, Phase::CapabilityAfterLogin | Phase::LoggedIn);
        let capabilities = self.capabilities.as_ref().filter(|_| is_before)?;
        Some(capabilities.offer())
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
            Phase::LoggedIn => "logged in",
        }
    }

    /// LoginForms that the server has shown not to understand, once it has accepted the login in another one.
    pub fn unsupported_forms(&self) -> Option<UnsupportedForms> {
        let login = self.attempt.login.as_ref().filter(|_| self.phase == Phase::LoggedIn)?;
        let shown = command::not_understood(login, self.rejected);
        let learned = UnsupportedForms { capabilities: self.offered, rejected: shown.or(self.known_rejected()) };
        (!shown.is_empty()).then_some(learned)
    }

    /// Whether the login was sent and no other server would be tried if this one did not answer.
    pub fn is_bound_to_server(&self) -> bool {
        self.login_sent() && self.failed(ServerFault::Timeout).verdict.action == Action::GiveUp
    }

    /// Decides about a fault that the caller has noticed.
    pub fn failed(&self, fault: ServerFault) -> Unavailable {
        Unavailable { fault, verdict: self.verdict(ServerAnswer::Fault(fault)), reply: None, excerpt: None }
    }

    /// Goes on as far as the input allows; what the server is to be sent is appended to `out`.
    pub fn step(&mut self, out: &mut Zeroizing<Vec<u8>>) -> LoginStep {
        if self.phase == Phase::Handshake {
            match self.proceed(out) {
                Err(fault) => return LoginStep::Unavailable(self.failed(fault)),
                Ok(Some(step)) => return step,
                Ok(None) => {}
            }
        }
        if let Some(response) = self.response.take() {
            append_wiped(out, &response);
        }
        loop {
            match self.framer.line() {
                LineFrame::Complete => {}
                LineFrame::Incomplete => return LoginStep::NeedInput,
                LineFrame::TooLong => return LoginStep::Unavailable(self.failed(ServerFault::Protocol)),
            }
            let line = self.framer.take();
            let line = without_line_end(&line);
            match self.line(line, out) {
                Ok(None) => {}
                Ok(Some(step)) => return step,
                Err(fault) => {
                    let excerpt = Some(self.excerpt(line));
                    return LoginStep::Unavailable(Unavailable { excerpt, ..self.failed(fault) });
                }
            }
        }
    }

    fn login_sent(&self) -> bool {
        matches!(self.phase, Phase::Login | Phase::CapabilityAfterLogin | Phase::LoggedIn)
    }

    fn stage(&self) -> LoginStage {
        if self.challenges > 0 {
            LoginStage::Challenged
        } else if self.has_long_password() && (self.reconnected || self.login_sent()) {
            LoginStage::LongPasswordSent
        } else if self.retried {
            LoginStage::Retried
        } else if self.reconnected || self.login_sent() {
            LoginStage::LoginSent
        } else {
            LoginStage::BeforeLogin
        }
    }

    fn has_long_password(&self) -> bool {
        let Some(ServerLogin::Password(login)) = &self.attempt.login else { return false };
        login.password.expose().len() > LONG_PASSWORD
    }

    fn verdict(&self, answer: ServerAnswer) -> Verdict {
        verdict::decide(answer, self.stage(), self.attempt.rules.one_server_per_user)
    }

    fn excerpt(&self, line: &[u8]) -> String {
        match self.attempt.login.as_ref().filter(|_| self.login_sent()) {
            Some(login) => refusal_text::excerpt_after(line, login),
            None => refusal_text::excerpt(line),
        }
    }

    fn known_rejected(&self) -> LoginForms {
        let learned = self.attempt.rules.unsupported_forms.filter(|learned| learned.capabilities == self.offered);
        learned.map(|learned| learned.rejected).unwrap_or_default()
    }

    fn line(&mut self, line: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Result<Option<LoginStep>, ServerFault> {
        let parsed = Line::parse(line).ok_or(match self.phase {
            Phase::Greeting => ServerFault::Greeting,
            _ => ServerFault::Protocol,
        })?;
        if self.phase == Phase::Greeting {
            self.greeting(&parsed)?;
            return self.proceed(out);
        }
        match parsed {
            Line::Untagged(content) if self.login_sent() && is_word(content, b"BYE") => {
                Ok(Some(self.bye(line, content.get(b"BYE ".len()..).unwrap_or_default())))
            }
            Line::Untagged(content) => self.untagged(line, content).map(|()| None),
            Line::Continuation(_) if self.phase != Phase::Login => Err(ServerFault::Protocol),
            Line::Continuation(text) => self.continued(text, out),
            Line::Tagged { tag: b"L", status: Status::No, text } if self.phase == Phase::Login => {
                Ok(Some(self.refused(line, text)))
            }
            Line::Tagged { tag, status, text } => self.tagged(tag, status, text, out),
        }
    }

    fn continued(&mut self, text: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Result<Option<LoginStep>, ServerFault> {
        if let Some(part) = self.parts.next() {
            append_wiped(out, &part);
            return Ok(None);
        }
        let asks_again = text.is_empty() && self.form == Some(LoginForm::InitialResponse) && self.challenges == 0;
        if let Some(login) = self.attempt.login.as_ref().filter(|_| asks_again)
            && self.verdict(ServerAnswer::EmptyContinuation).action == Action::TryAnotherForm
        {
            self.rejected.insert(LoginForm::InitialResponse);
            self.form = Some(LoginForm::Continuation);
            append_wiped(out, &command::joined(&[&command::response(login), b"\r\n"]));
            return Ok(None);
        }
        self.challenge(text).map(Some)
    }

    fn challenge(&mut self, text: &[u8]) -> Result<LoginStep, ServerFault> {
        if !matches!(self.attempt.login, Some(ServerLogin::Relayed { .. })) {
            return Err(ServerFault::Protocol);
        }
        self.challenges += 1;
        if self.challenges > MAX_CHALLENGES {
            return Err(ServerFault::TooManyChallenges);
        }
        Ok(LoginStep::Challenge(text.to_vec()))
    }

    fn greeting(&mut self, line: &Line<'_>) -> Result<(), ServerFault> {
        let Line::Untagged(content) = line else { return Err(ServerFault::Greeting) };
        match status(content) {
            Some((Status::Ok, text)) => {
                let capabilities = CapabilityList::from_code(text);
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
    fn proceed(&mut self, out: &mut Zeroizing<Vec<u8>>) -> Result<Option<LoginStep>, ServerFault> {
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
            let offer = capabilities.offer();
            out.extend_from_slice(b"Q LOGOUT\r\n");
            return Ok(Some(LoginStep::Probed(offer)));
        };
        let DialogueRules { login_with, client, .. } = self.attempt.rules;
        let forms = command::forms(login, capabilities, login_with, client)?;
        if capabilities.has("ID") && !self.attempt.id.is_empty() {
            command::id(&self.attempt.id, out);
        }
        self.offered = capabilities.fingerprint();
        let known = self.known_rejected();
        let understood: Vec<LoginForm> = forms.iter().copied().filter(|form| !known.has(*form)).collect();
        self.forms = if understood.is_empty() { forms } else { understood };
        self.phase = Phase::Login;
        self.send_login(out)
    }

    /// Sends the login in the best form that the server has not answered with BAD. The tag stays the same: nothing is
    /// sent before the answer to the form before.
    fn send_login(&mut self, out: &mut Zeroizing<Vec<u8>>) -> Result<Option<LoginStep>, ServerFault> {
        let form = self.forms.iter().copied().find(|form| !self.rejected.has(*form)).ok_or(ServerFault::LoginBad)?;
        self.form = Some(form);
        let capabilities = self.capabilities.clone().unwrap_or_default();
        if let Some(login) = &self.attempt.login {
            self.parts = command::in_form(login, form, &capabilities).into_iter();
        }
        if let Some(first) = self.parts.next() {
            append_wiped(out, &first);
        }
        Ok(None)
    }

    fn untagged(&mut self, line: &[u8], content: &[u8]) -> Result<(), ServerFault> {
        if is_word(content, b"BYE") {
            return Err(ServerFault::Bye);
        }
        // Behind a literal the line would go on, and no server has one to send here.
        if status(content).is_none() && literal_header(line).is_some() {
            return Err(ServerFault::Protocol);
        }
        self.untagged_lines += 1;
        if self.untagged_lines > self.attempt.max_untagged_lines
            || self.untagged.len() + line.len() > self.attempt.max_untagged_bytes
        {
            return Err(ServerFault::TooMuchUntagged);
        }
        if is_word(content, b"CAPABILITY") {
            let capabilities = CapabilityList::new(&content[b"CAPABILITY".len()..]);
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
    ) -> Result<Option<LoginStep>, ServerFault> {
        match (self.phase, tag, status) {
            (Phase::Capability, b"C", Status::Ok) => {
                // A server that names none can do what every server can.
                self.capabilities.get_or_insert_default();
                self.proceed(out)
            }
            (Phase::StartTls, b"S", Status::Ok) if self.framer.has_leftover() => Err(ServerFault::StartTlsResidue),
            (Phase::StartTls, b"S", Status::Ok) => {
                self.phase = Phase::Handshake;
                Ok(Some(LoginStep::StartTls))
            }
            (Phase::StartTls, b"S", _) => Err(ServerFault::StartTlsRefused),
            // Whether the server likes our ID does not matter.
            (Phase::Login, b"I", _) => {
                let trusted = status == Status::Ok
                    && text.get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"Trusted ID"));
                self.id_answer = Some(if trusted { IdAnswer::Trusted } else { IdAnswer::Ambiguous });
                Ok(None)
            }
            (Phase::Login, b"L", Status::Ok) => Ok(self.logged_in(text, out)),
            (Phase::Login, b"L", Status::Bad) => match self.verdict(ServerAnswer::Bad).action {
                Action::Refuse(kind) => {
                    let reply = refusal_text::bad(self.attempt.tag.as_str(), text);
                    Ok(Some(LoginStep::Refused { reply, kind }))
                }
                _ => {
                    self.form.into_iter().for_each(|form| self.rejected.insert(form));
                    self.retried = true;
                    self.send_login(out)
                }
            },
            (Phase::CapabilityAfterLogin, b"D", _) => {
                let known = self.capabilities.take().map(|capabilities| capabilities.after_login());
                let text = std::mem::take(&mut self.accepted);
                Ok(Some(self.accept(known.as_deref(), &text)))
            }
            _ => Err(ServerFault::Protocol),
        }
    }

    /// The client is told the capabilities with the OK. Where the server told none, it is asked.
    fn logged_in(&mut self, text: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Option<LoginStep> {
        if let Some(capabilities) = CapabilityList::from_code(text) {
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
    fn accept(&mut self, capabilities: Option<&[u8]>, text: &[u8]) -> LoginStep {
        self.phase = Phase::LoggedIn;
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
        let framer = std::mem::replace(&mut self.framer, Framer::new(FrameLimits { line: 0, literals: 0 }));
        to_client.extend_from_slice(&framer.into_leftover());
        LoginStep::Accepted { to_client }
    }

    /// The server answered NO.
    fn refused(&self, line: &[u8], text: &[u8]) -> LoginStep {
        let DialogueRules { unavailable_texts, limit_texts, .. } = self.attempt.rules;
        self.answered(line, text, refusal_text::classify_no(text, unavailable_texts, limit_texts))
    }

    /// The server sent BYE instead of an answer.
    fn bye(&self, line: &[u8], text: &[u8]) -> LoginStep {
        self.answered(line, text, refusal_text::classify_bye(text, self.attempt.rules.limit_texts))
    }

    fn answered(&self, line: &[u8], text: &[u8], meaning: refusal_text::ClassifiedRefusal) -> LoginStep {
        let reply = refusal_text::refusal(self.attempt.tag.as_str(), text, meaning.code);
        let verdict = self.verdict(meaning.answer);
        match (meaning.answer, verdict.action) {
            (ServerAnswer::Fault(fault), _) => {
                // The client cannot do anything about the proxy's TLS, and BYE may come without a text.
                let has_words = fault != ServerFault::TlsRequired && !(fault == ServerFault::Bye && text.is_empty());
                let reply = has_words.then_some(reply);
                LoginStep::Unavailable(Unavailable { fault, verdict, reply, excerpt: Some(self.excerpt(line)) })
            }
            (_, Action::FollowReferral) => match capability::code(text).and_then(|(_, url, _)| referred(url)) {
                Some((host, port)) => LoginStep::Referred(Referral { host, port, reply }),
                None => LoginStep::Refused { reply, kind: RefusalKind::NotCounted },
            },
            (_, Action::Refuse(kind)) => LoginStep::Refused { reply, kind },
            (_, _) => LoginStep::Refused { reply, kind: RefusalKind::NotCounted },
        }
    }
}
