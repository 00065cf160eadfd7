//! The dialogue with a server until it accepts or refuses a login: takes bytes, returns bytes and steps.
//!
//! The login is sent in a form that the server supports (see [`command::forms`]), and in the next form if the server answers
//! BAD. The messages of a relayed mechanism are passed on unchanged. A login takes one round trip if the greeting lists the
//! capabilities. Input from the server is untrusted: its size is limited, tags must match exactly, and everything received in
//! plaintext is discarded when TLS starts. Only [`verdict::decide`] decides what an answer means.

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
use self::response::{Line, Status, referral_target, starts_with_word, status};
use self::verdict::{Action, LONG_PASSWORD, LoginStage, ServerAnswer, Verdict};
use super::capability::{self, CapabilityList, ServerCapabilities};
use super::framing::{FrameLimits, Framer, LineFrame, literal_header, without_line_end};
use super::refusal::RefusalKind;
use crate::identity::{ServerLogin, append_wiped};

/// Maximum number of challenges in one login. SCRAM has two, a refused token one.
const MAX_CHALLENGES: usize = 4;

/// The state of the dialogue.
#[derive(Debug)]
pub struct BackendLogin<'a> {
    attempt: LoginAttempt<'a>,
    framer: Framer,
    phase: Phase,
    encrypted: bool,
    /// The list that the server sent last, or `None` if it has sent none.
    capabilities: Option<CapabilityList>,
    /// Forms of the login that the server supports, the preferred one first.
    forms: Vec<LoginForm>,
    /// Forms to which the server has answered BAD.
    rejected: LoginForms,
    /// The form that was sent last, if any.
    form: Option<LoginForm>,
    /// Whether the server has answered BAD to another form on this connection.
    retried: bool,
    /// Whether the login was sent on an earlier connection.
    reconnected: bool,
    /// Fingerprint of the capabilities by which the forms were chosen.
    fingerprint: Option<u64>,
    /// Parts of the login that are sent after a continuation request each.
    parts: std::vec::IntoIter<Zeroizing<Vec<u8>>>,
    /// The client's response to a challenge, which the next step sends.
    response: Option<Zeroizing<Vec<u8>>>,
    challenges: usize,
    /// The server's answer to the ID command.
    id_answer: Option<IdAnswer>,
    /// Untagged lines that the client receives before the answer.
    untagged: Vec<u8>,
    untagged_lines: usize,
    /// Whether a capability list has contained UNAUTHENTICATE.
    unauthenticate: bool,
    /// Whether a CAPABILITY line came with the answer to the login.
    capabilities_after_login: bool,
    /// The text of the server's OK while its capabilities are queried.
    accepted: Vec<u8>,
}

/// The command or event that the server is expected to answer.
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
    /// Starts the dialogue of a new connection, before the greeting.
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
            fingerprint: None,
            parts: Vec::new().into_iter(),
            response: None,
            challenges: 0,
            id_answer: None,
            untagged: Vec::new(),
            untagged_lines: 0,
            unauthenticate: false,
            capabilities_after_login: false,
            accepted: Vec::new(),
        }
    }

    /// Adds bytes received from the server.
    pub fn input(&mut self, bytes: &[u8]) {
        self.framer.input(bytes);
    }

    /// Continues after the TLS handshake, and discards everything that was received in plaintext.
    pub fn tls_established(&mut self) {
        self.encrypted = true;
        self.capabilities = None;
        self.unauthenticate = false;
        self.untagged_lines = 0;
    }

    /// Restarts the login on a new connection to the same server.
    pub fn reconnected(&mut self) {
        self.framer = Framer::new(FrameLimits { line: self.attempt.max_line, literals: 0 });
        self.phase = Phase::Greeting;
        self.encrypted = false;
        self.capabilities = None;
        self.parts = Vec::new().into_iter();
        self.id_answer = None;
        self.untagged.clear();
        self.untagged_lines = 0;
        self.capabilities_after_login = false;
        self.accepted.clear();
        (self.retried, self.reconnected) = (false, true);
    }

    /// Sends the client's response to [`LoginStep::Challenge`]. `line` is still in base64.
    pub fn respond(&mut self, line: &[u8]) {
        self.response = Some(command::joined(&[line, b"\r\n"]));
    }

    /// The server's answer to the ID command, if it was sent and answered.
    pub fn id_answer(&self) -> Option<IdAnswer> {
        self.id_answer
    }

    /// Whether a capability list of the server has contained UNAUTHENTICATE (RFC 8437).
    pub fn advertises_unauthenticate(&self) -> bool {
        self.unauthenticate
    }

    fn note_unauthenticate(&mut self, capabilities: &CapabilityList) {
        self.unauthenticate |= capabilities.has("UNAUTHENTICATE");
    }

    /// The server's capabilities before login, if they are known.
    pub fn server_capabilities(&self) -> Option<ServerCapabilities> {
        // The list changes at login.
        let is_before = !matches!(self.phase, Phase::CapabilityAfterLogin | Phase::LoggedIn);
        let capabilities = self.capabilities.as_ref().filter(|_| is_before)?;
        Some(capabilities.server_capabilities())
    }

    /// The state of the dialogue, for logs.
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

    /// Returns the forms to which the server answered BAD, once it has accepted the login in another form.
    pub fn unsupported_forms(&self) -> Option<UnsupportedForms> {
        let login = self.attempt.login.as_ref().filter(|_| self.phase == Phase::LoggedIn)?;
        let unsupported = command::unsupported(login, self.rejected);
        let all = UnsupportedForms { capabilities: self.fingerprint?, forms: unsupported.or(self.known_unsupported()) };
        (!unsupported.is_empty()).then_some(all)
    }

    /// Whether the login was sent, and no other server is tried if this one does not answer.
    pub fn is_bound_to_server(&self) -> bool {
        self.login_sent() && self.failed(ServerFault::Timeout).verdict.action == Action::GiveUp
    }

    /// Returns the verdict about a fault that the caller has detected.
    pub fn failed(&self, fault: ServerFault) -> Unavailable {
        Unavailable { fault, verdict: self.verdict(ServerAnswer::Fault(fault)), reply: None, excerpt: None }
    }

    /// Processes the input up to the next step, and appends bytes for the server to `out`.
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

    fn known_unsupported(&self) -> LoginForms {
        let known = self.attempt.rules.unsupported_forms.filter(|known| Some(known.capabilities) == self.fingerprint);
        known.map(|known| known.forms).unwrap_or_default()
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
            Line::Untagged(content) if self.login_sent() && starts_with_word(content, b"BYE") => {
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
        let is_repeated_request =
            text.is_empty() && self.form == Some(LoginForm::InitialResponse) && self.challenges == 0;
        if let Some(login) = self.attempt.login.as_ref().filter(|_| is_repeated_request)
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
                capabilities.iter().for_each(|capabilities| self.note_unauthenticate(capabilities));
                self.capabilities = capabilities;
                Ok(())
            }
            _ if starts_with_word(content, b"BYE") => Err(ServerFault::Bye),
            // PREAUTH is refused too, because it would open the mailbox of an unknown user.
            _ => Err(ServerFault::Greeting),
        }
    }

    /// Sends the next command: CAPABILITY if the capabilities are unknown, STARTTLS if it is required, otherwise the login.
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
            let seen = capabilities.server_capabilities();
            out.extend_from_slice(b"Q LOGOUT\r\n");
            return Ok(Some(LoginStep::Probed(seen)));
        };
        let DialogueRules { login_with, client, .. } = self.attempt.rules;
        let forms = command::forms(login, capabilities, login_with, client)?;
        if capabilities.has("ID") && !self.attempt.id.is_empty() {
            command::id(&self.attempt.id, out);
        }
        self.fingerprint = Some(capabilities.fingerprint());
        let known = self.known_unsupported();
        let understood: Vec<LoginForm> = forms.iter().copied().filter(|form| !known.has(*form)).collect();
        self.forms = if understood.is_empty() { forms } else { understood };
        self.phase = Phase::Login;
        self.send_login(out)
    }

    /// Sends the login in the preferred form to which the server has not answered BAD. All forms have the same tag, because each
    /// is sent after the answer to the previous one.
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
        if starts_with_word(content, b"BYE") {
            return Err(ServerFault::Bye);
        }
        // A literal would continue the line; no server sends one here.
        if status(content).is_none() && literal_header(line).is_some() {
            return Err(ServerFault::Protocol);
        }
        self.untagged_lines += 1;
        if self.untagged_lines > self.attempt.max_untagged_lines
            || self.untagged.len() + line.len() > self.attempt.max_untagged_bytes
        {
            return Err(ServerFault::TooMuchUntagged);
        }
        if starts_with_word(content, b"CAPABILITY") {
            let capabilities = CapabilityList::new(&content[b"CAPABILITY".len()..]);
            self.note_unauthenticate(&capabilities);
            if self.phase == Phase::Login {
                self.capabilities_after_login = true;
                self.queue_for_client(&[b"* CAPABILITY ", &capabilities.after_login()]);
            }
            self.capabilities = Some(capabilities);
            return Ok(());
        }
        let after_login_began = matches!(self.phase, Phase::Login | Phase::CapabilityAfterLogin);
        if after_login_began && !starts_with_word(content, b"ID") {
            self.queue_for_client(&[line]);
        }
        Ok(())
    }

    fn queue_for_client(&mut self, line: &[&[u8]]) {
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
                // A server that lists no capabilities is treated as plain IMAP4rev1.
                self.capabilities.get_or_insert_default();
                self.proceed(out)
            }
            (Phase::StartTls, b"S", Status::Ok) if self.framer.has_leftover() => Err(ServerFault::StartTlsResidue),
            (Phase::StartTls, b"S", Status::Ok) => {
                self.phase = Phase::Handshake;
                Ok(Some(LoginStep::StartTls))
            }
            (Phase::StartTls, b"S", _) => Err(ServerFault::StartTlsRefused),
            // An error in answer to ID does not affect the login.
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

    /// The client receives the server's capabilities with the OK. They are queried if the server has not sent them.
    fn logged_in(&mut self, text: &[u8], out: &mut Zeroizing<Vec<u8>>) -> Option<LoginStep> {
        if let Some(capabilities) = CapabilityList::from_code(text) {
            self.note_unauthenticate(&capabilities);
            let text = capability::code(text).map_or(text, |(_, _, rest)| rest);
            return Some(self.accept(Some(&capabilities.after_login()), text));
        }
        if self.capabilities_after_login {
            return Some(self.accept(None, text));
        }
        self.accepted = text.to_vec();
        self.capabilities = None;
        self.phase = Phase::CapabilityAfterLogin;
        out.extend_from_slice(b"D CAPABILITY\r\n");
        None
    }

    /// `text` follows OK, without a capability code.
    fn accept(&mut self, capabilities: Option<&[u8]>, text: &[u8]) -> LoginStep {
        self.phase = Phase::LoggedIn;
        let mut to_client = std::mem::take(&mut self.untagged);
        let code = match capabilities {
            None => Vec::new(),
            // A response has one response code, and the server's own is kept.
            Some(list) if capability::code(text).is_some() => {
                to_client.extend_from_slice(&[b"* CAPABILITY ", list, b"\r\n"].concat());
                Vec::new()
            }
            Some(list) => [b"[CAPABILITY ", list, b"] "].concat(),
        };
        // resp-text must not be empty (RFC 3501 section 9), although some servers send none.
        let text = if text.is_empty() { b"Logged in." } else { text };
        to_client.extend_from_slice(&[self.attempt.tag.as_str().as_bytes(), b" OK ", &code, text, b"\r\n"].concat());
        let framer = std::mem::replace(&mut self.framer, Framer::new(FrameLimits { line: 0, literals: 0 }));
        to_client.extend_from_slice(&framer.into_leftover());
        LoginStep::Accepted { to_client }
    }

    /// Handles NO.
    fn refused(&self, line: &[u8], text: &[u8]) -> LoginStep {
        let DialogueRules { unavailable_texts, limit_texts, .. } = self.attempt.rules;
        self.answered(line, text, refusal_text::classify_no(text, unavailable_texts, limit_texts))
    }

    /// Handles BYE in place of a tagged answer.
    fn bye(&self, line: &[u8], text: &[u8]) -> LoginStep {
        self.answered(line, text, refusal_text::classify_bye(text, self.attempt.rules.limit_texts))
    }

    fn answered(&self, line: &[u8], text: &[u8], meaning: refusal_text::ClassifiedRefusal) -> LoginStep {
        let reply = refusal_text::refusal(self.attempt.tag.as_str(), text, meaning.code);
        let verdict = self.verdict(meaning.answer);
        match (meaning.answer, verdict.action) {
            (ServerAnswer::Fault(fault), _) => {
                // The client cannot change the proxy's TLS settings, and BYE may have no text.
                let has_text = fault != ServerFault::TlsRequired && !(fault == ServerFault::Bye && text.is_empty());
                let reply = has_text.then_some(reply);
                LoginStep::Unavailable(Unavailable { fault, verdict, reply, excerpt: Some(self.excerpt(line)) })
            }
            (_, Action::FollowReferral) => match capability::code(text).and_then(|(_, url, _)| referral_target(url)) {
                Some((host, port)) => LoginStep::Referred(Referral { host, port, reply }),
                None => LoginStep::Refused { reply, kind: RefusalKind::NotCounted },
            },
            (_, Action::Refuse(kind)) => LoginStep::Refused { reply, kind },
            (_, _) => LoginStep::Refused { reply, kind: RefusalKind::NotCounted },
        }
    }
}
