//! The dialogue with a client until it has logged in: takes bytes, returns replies and steps.
//!
//! It implements the eight commands of this state and the SASL mechanisms, and decides when a connection must close. It does
//! not decide whether a password is right, and it knows no server. All data of a login attempt is in the [`LoginRequest`] that
//! it returns; nothing of it remains here after a refusal. Implements RFC 3501 sections 6.1 and 6.2, RFC 4959 (SASL-IR), RFC 7888
//! (LITERAL+), RFC 2971 (ID) and RFC 5161 (ENABLE); where clients expect more than the RFCs specify, it behaves like Dovecot.

mod arguments;
mod bye;
mod command;
mod memory;
mod sasl_exchange;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use zeroize::Zeroizing;

use self::arguments::{Arguments, MalformedArguments};
pub use self::bye::ByeReason;
use self::command::{Command, is_foreign, literals};
use self::sasl_exchange::SaslExchange;
use super::capability::{Extensions, Transport};
use super::client_id::{self, ClientId};
use super::framing::{Frame, FrameLimits, Framer, LineFrame, without_line_end};
use super::refusal::RefusalKind;
use super::sasl::{self, InvalidCredentials};
use super::tag::Tag;
use super::{capability, reply};
use crate::identity::{Credentials, Mechanism, Mechanisms, TokenIssuer, UserName};

/// Maximum number of commands before login, valid ones included: the deadline alone does not limit the work that a client causes.
const MAX_COMMANDS: u32 = 1000;
/// Bytes of replies after which they are sent before the next command is read: a client may send hundreds of commands at once and
/// read no reply.
const MAX_REPLIES: usize = 4096;
/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// The listener's settings for the dialogue.
#[derive(Debug, Clone)]
pub struct PreloginSettings {
    /// Whether the connection is encrypted, and whether it may be.
    pub transport: Transport,
    /// Maximum size of a command line or a SASL response, in bytes.
    pub max_line: usize,
    /// Maximum total size of a command's literals, in bytes.
    pub max_literal: usize,
    /// The number of invalid commands after which the connection is closed.
    pub max_bad_commands: u32,
    /// The number of failed logins after which the connection is closed.
    pub max_failed_logins: u32,
    /// Mechanisms offered to the client.
    pub mechanisms: Mechanisms,
    /// The owner of the client's certificate, if it presented one.
    pub certificate: Option<UserName>,
    /// Extensions that all servers support.
    pub extensions: Extensions,
    /// Token issuers whose tokens may name the user.
    pub issuers: Arc<[TokenIssuer]>,
}

/// What the caller must do next.
#[derive(Debug)]
pub enum PreloginStep {
    /// Send the replies, read from the client, and pass the bytes to [`Prelogin::input`].
    NeedInput,
    /// Send the replies, and call [`Prelogin::step`] again.
    Send,
    /// Send the replies, perform the TLS handshake, and start a new dialogue with [`Transport::Tls`], without a greeting.
    StartTls,
    /// Verify these credentials, then call [`Prelogin::refused`], [`Prelogin::unavailable`], [`Prelogin::challenge`] or
    /// [`Prelogin::into_leftover`].
    Login(LoginRequest),
    /// Refuse these credentials with the same delay as a wrong password, then call [`Prelogin::refused`]. No server could accept
    /// them.
    InvalidLogin(InvalidLogin),
    /// Send the replies and close the connection.
    Close(CloseReason),
}

/// What the caller must do next while the client has to answer a server's challenge.
#[derive(Debug)]
pub enum ChallengeStep {
    /// Read from the client, and pass the bytes to [`Prelogin::input`].
    NeedInput,
    /// Pass the client's response, still in base64, to the server. It may be `*`, with which the client cancels the exchange.
    Response(Zeroizing<Vec<u8>>),
    /// Send the replies and close the connection.
    Close(CloseReason),
}

/// A login command and the credentials in it.
#[derive(Debug)]
pub struct LoginRequest {
    /// The tag of the command.
    pub tag: Tag,
    /// The credentials, which are not verified.
    pub credentials: Credentials,
}

/// A well-formed login command with credentials that cannot be right: an empty name, control characters, or a token that names no
/// user. RFC 9051 section 6.2.3 requires NO for them; BAD is for syntax errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidLogin {
    /// The tag of the command.
    pub tag: Tag,
    /// The mechanism that the client used.
    pub mechanism: Mechanism,
    /// The error for the log. It contains no part of the credentials.
    pub fault: InvalidCredentials,
}

/// Why a connection closes before login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent LOGOUT.
    Logout,
    /// The client sent [`PreloginSettings::max_bad_commands`] invalid commands, or too many commands in all.
    TooManyBadCommands,
    /// [`PreloginSettings::max_failed_logins`] logins have failed.
    TooManyFailedLogins,
    /// A line exceeds [`PreloginSettings::max_line`].
    LineTooLong,
    /// A literal exceeds [`PreloginSettings::max_literal`].
    LiteralTooLong,
    /// Plaintext followed the STARTTLS command (CVE-2011-0411).
    StartTlsInjection,
    /// The client speaks HTTP or SMTP (CVE-2021-3618).
    ForeignProtocol,
    /// The client started a TLS handshake on a plaintext port.
    TlsOnPlainPort,
}

/// The state of the dialogue.
#[derive(Debug)]
pub struct Prelogin {
    settings: PreloginSettings,
    framer: Framer,
    state: State,
    commands: u32,
    bad_commands: u32,
    failed_logins: u32,
    client_id: Option<ClientId>,
    /// Set if the replies that precede the close are written already; the next step returns it.
    closing: Option<CloseReason>,
}

#[derive(Debug)]
enum State {
    /// The next line is a command.
    Command,
    /// The next line is the response of a SASL exchange.
    Sasl(Tag, SaslExchange),
}

impl Prelogin {
    /// Starts the dialogue of a new connection, or restarts it after STARTTLS.
    pub fn new(settings: PreloginSettings) -> Self {
        Self {
            framer: Framer::new(FrameLimits { line: settings.max_line, literals: settings.max_literal })
                .with_literals(literals),
            settings,
            state: State::Command,
            commands: 0,
            bad_commands: 0,
            failed_logins: 0,
            client_id: None,
            closing: None,
        }
    }

    /// Writes the greeting.
    pub fn greet(&self, out: &mut Vec<u8>) {
        let capabilities = self.capabilities();
        reply::untagged(&format!("OK [CAPABILITY {capabilities}] {}", reply::READY), out);
    }

    /// Adds bytes received from the client.
    pub fn input(&mut self, bytes: &[u8]) {
        self.framer.input(bytes);
    }

    /// Processes the input up to the next step, and appends replies to `out`.
    pub fn step(&mut self, out: &mut Vec<u8>) -> PreloginStep {
        loop {
            if let Some(reason) = self.closing.take() {
                return PreloginStep::Close(reason);
            }
            if out.len() > MAX_REPLIES {
                return PreloginStep::Send;
            }
            let next = match std::mem::replace(&mut self.state, State::Command) {
                State::Command => self.next_command(out),
                State::Sasl(tag, exchange) => self.next_response(tag, exchange, out),
            };
            if let Some(step) = next {
                return step;
            }
        }
    }

    /// Sends `reply`, a complete line that refuses the login.
    pub fn refused(&mut self, reply: &[u8], kind: RefusalKind, out: &mut Vec<u8>) {
        out.extend_from_slice(reply);
        if kind == RefusalKind::FailedLogin {
            self.count_failed_login(out);
        }
    }

    /// Reports that no server could verify the login.
    pub fn unavailable(&mut self, tag: &Tag, out: &mut Vec<u8>) {
        reply::unavailable(tag, out);
    }

    /// Sends a server's challenge; `line` is the text after `+ `. Then call [`Prelogin::challenge_step`] until it returns the
    /// client's response.
    pub fn challenge(&self, line: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"+ ");
        out.extend_from_slice(line);
        out.extend_from_slice(b"\r\n");
    }

    /// Reads the client's response to a challenge that belongs to the command `tag`.
    pub fn challenge_step(&mut self, tag: &Tag, out: &mut Vec<u8>) -> ChallengeStep {
        match self.framer.line() {
            LineFrame::Incomplete => ChallengeStep::NeedInput,
            LineFrame::TooLong => ChallengeStep::Close(response_too_long(tag, out)),
            // A `*` is passed on too: the server answers the cancelled command.
            LineFrame::Complete => {
                let line = self.framer.take();
                ChallengeStep::Response(Zeroizing::new(without_line_end(&line).to_vec()))
            }
        }
    }

    fn capabilities(&self) -> String {
        capability::before_login(self.settings.transport, self.offered(), self.settings.extensions)
    }

    /// The mechanisms that this client may use: EXTERNAL requires a certificate.
    fn offered(&self) -> Mechanisms {
        let without = Mechanism::ALL
            .into_iter()
            .filter(|mechanism| *mechanism != Mechanism::External || self.settings.certificate.is_some());
        self.settings.mechanisms.and(without.collect())
    }

    /// The ID that the client has sent.
    pub fn client_id(&self) -> &ClientId {
        static EMPTY: ClientId = ClientId::empty();
        self.client_id.as_ref().unwrap_or(&EMPTY)
    }

    /// The bytes after the login command, which are sent to the server after it has accepted the login.
    pub fn into_leftover(self) -> Vec<u8> {
        self.framer.into_leftover()
    }

    /// Writes the BYE that precedes a close by the proxy.
    pub fn bye(&self, reason: ByeReason, out: &mut Vec<u8>) {
        reply::bye(reason.text(), out);
    }

    fn next_command(&mut self, out: &mut Vec<u8>) -> Option<PreloginStep> {
        let plaintext = self.settings.transport != Transport::Tls;
        if self.commands == 0 && plaintext && self.framer.first_byte() == Some(TLS_HANDSHAKE) {
            return Some(PreloginStep::Close(CloseReason::TlsOnPlainPort));
        }
        match self.framer.command() {
            Frame::Incomplete => Some(PreloginStep::NeedInput),
            Frame::Complete => {
                let command = self.framer.take();
                self.command(&command, out)
            }
            Frame::Literal => {
                if self.wants_literal() {
                    self.framer.accept_literal();
                    out.extend_from_slice(b"+ OK\r\n");
                } else {
                    // Without a continuation request the client does not send the literal, which may be a password.
                    let command = Zeroizing::new(self.framer.partial_command().to_vec());
                    self.framer.reject_literal();
                    return self.command(&command, out);
                }
                None
            }
            Frame::LineTooLong => self.over_cap(CloseReason::LineTooLong, "The line is too long.", out),
            Frame::LiteralTooLong => self.over_cap(CloseReason::LiteralTooLong, "The literal is too long.", out),
        }
    }

    /// Only logins and ID have literals.
    fn wants_literal(&self) -> bool {
        let mut arguments = Arguments::new(self.framer.partial_command());
        let tag = Tag::new(arguments.word());
        let verb = arguments.word();
        let login = verb.eq_ignore_ascii_case(b"LOGIN") || verb.eq_ignore_ascii_case(b"AUTHENTICATE");
        let wanted = login && self.settings.transport != Transport::StartTls || verb.eq_ignore_ascii_case(b"ID");
        tag.is_some() && wanted
    }

    fn over_cap(&mut self, reason: CloseReason, text: &str, out: &mut Vec<u8>) -> Option<PreloginStep> {
        let tag = Tag::new(Arguments::new(self.framer.partial_command()).word());
        reply::bad(tag.as_ref(), text, out);
        reply::bye(text, out);
        Some(PreloginStep::Close(reason))
    }

    fn command(&mut self, command: &[u8], out: &mut Vec<u8>) -> Option<PreloginStep> {
        let mut arguments = Arguments::new(command);
        let first = arguments.word();
        let mut after_first = arguments;
        let verb = after_first.word();
        if self.commands == 0 && is_foreign(first, verb) {
            return Some(PreloginStep::Close(CloseReason::ForeignProtocol));
        }
        self.commands += 1;
        if self.commands > MAX_COMMANDS {
            reply::bye("Too many commands without a login.", out);
            return Some(PreloginStep::Close(CloseReason::TooManyBadCommands));
        }
        let Some(tag) = Tag::new(first) else {
            return self.bad_command(None, "Error in IMAP command: no valid tag.", out);
        };
        let Some(name) = Command::named(verb) else {
            let text = if Command::named(first).is_some() {
                "The first word of a line is the command's tag, not the command. Put one before it, like: a login user pass"
            } else {
                "Error in IMAP command: not known, or not allowed before login."
            };
            return self.bad_command(Some(&tag), text, out);
        };
        match self.run(name, &tag, after_first, out) {
            Ok(next) => next,
            Err(MalformedArguments) => self.bad_command(Some(&tag), "Error in IMAP command: wrong arguments.", out),
        }
    }

    fn run(
        &mut self,
        command: Command,
        tag: &Tag,
        mut arguments: Arguments<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Option<PreloginStep>, MalformedArguments> {
        match command {
            Command::Login | Command::Authenticate if self.settings.transport == Transport::StartTls => {
                return Ok(self.refuse_in_clear(tag, out));
            }
            Command::Login => return self.login(tag, arguments, out),
            Command::Authenticate => return self.authenticate(tag, arguments, out),
            Command::Id => self.id(tag, arguments, out)?,
            Command::Enable => {
                if arguments.word().is_empty() {
                    return Err(MalformedArguments);
                }
                reply::untagged("ENABLED", out);
                reply::ok(tag, "ENABLE has no effect before login.", out);
            }
            Command::Noop => {
                arguments.end()?;
                reply::ok(tag, "NOOP completed.", out);
            }
            Command::Capability => {
                arguments.end()?;
                let capabilities = self.capabilities();
                reply::untagged(&format!("CAPABILITY {capabilities}"), out);
                reply::ok(tag, "Capabilities before login listed; there are more after it.", out);
            }
            Command::Logout => {
                arguments.end()?;
                reply::bye("Logging out", out);
                reply::ok(tag, "Logout completed.", out);
                return Ok(Some(PreloginStep::Close(CloseReason::Logout)));
            }
            Command::StartTls => {
                arguments.end()?;
                return Ok(self.start_tls(tag, out));
            }
        }
        Ok(None)
    }

    fn start_tls(&mut self, tag: &Tag, out: &mut Vec<u8>) -> Option<PreloginStep> {
        match self.settings.transport {
            Transport::Tls => self.bad_command(Some(tag), "TLS is already active.", out),
            Transport::Plain => self.bad_command(Some(tag), "TLS is not available on this port.", out),
            // Bytes sent before our answer would be injected into the TLS session.
            Transport::StartTls if self.framer.has_leftover() => {
                Some(PreloginStep::Close(CloseReason::StartTlsInjection))
            }
            Transport::StartTls => {
                reply::ok(tag, "Begin TLS negotiation now.", out);
                Some(PreloginStep::StartTls)
            }
        }
    }

    fn id(&mut self, tag: &Tag, mut arguments: Arguments<'_>, out: &mut Vec<u8>) -> Result<(), MalformedArguments> {
        let pairs = arguments.id_fields(client_id::MAX_ID_PAIRS)?;
        arguments.end()?;
        // Only the first ID is used, as in Dovecot.
        self.client_id.get_or_insert_with(|| {
            ClientId::new(pairs.into_iter().map(|(key, value)| (key.to_vec(), value.map(|value| value.to_vec()))))
        });
        reply::untagged("ID (\"name\" \"Vestibule\")", out);
        reply::ok(tag, "ID completed.", out);
        Ok(())
    }

    fn login(
        &mut self,
        tag: &Tag,
        mut arguments: Arguments<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Option<PreloginStep>, MalformedArguments> {
        let user = arguments.astring()?;
        let password = arguments.astring()?;
        arguments.end()?;
        if !self.offered().has(Mechanism::Login) {
            reply::no(tag, "[CANNOT] LOGIN is disabled: use AUTHENTICATE.", out);
            return Ok(None);
        }
        let credentials = sasl::password_login(&user, &password, Mechanism::Login);
        Ok(self.attempt(tag, Mechanism::Login, credentials, out))
    }

    fn authenticate(
        &mut self,
        tag: &Tag,
        mut arguments: Arguments<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Option<PreloginStep>, MalformedArguments> {
        let mechanism = arguments.astring()?;
        let initial = Zeroizing::new(arguments.word().to_vec());
        arguments.end()?;
        let known = Mechanism::by_sasl_name(&mechanism).filter(|mechanism| self.offered().has(*mechanism));
        let exchange = known.and_then(|mechanism| SaslExchange::new(mechanism, self.settings.certificate.as_ref()));
        let Some(exchange) = exchange else {
            let offered: Vec<&str> = self.offered().iter().filter_map(Mechanism::sasl_name).collect();
            let text = format!("[CANNOT] Mechanism not supported. Offered: {}.", offered.join(", "));
            reply::no(tag, &text, out);
            return Ok(None);
        };
        if initial.is_empty() {
            self.ask(tag.clone(), exchange, out);
            return Ok(None);
        }
        // RFC 4959: "=" is an empty initial response.
        let initial = if initial[..] == *b"=" { Zeroizing::new(Vec::new()) } else { initial };
        Ok(self.response(tag, exchange, &initial, out))
    }

    fn ask(&mut self, tag: Tag, exchange: SaslExchange, out: &mut Vec<u8>) {
        out.extend_from_slice(exchange.prompt());
        self.state = State::Sasl(tag, exchange);
    }

    fn next_response(&mut self, tag: Tag, exchange: SaslExchange, out: &mut Vec<u8>) -> Option<PreloginStep> {
        match self.framer.line() {
            LineFrame::Incomplete => {
                self.state = State::Sasl(tag, exchange);
                Some(PreloginStep::NeedInput)
            }
            LineFrame::TooLong => Some(PreloginStep::Close(response_too_long(&tag, out))),
            LineFrame::Complete => {
                let line = self.framer.take();
                let response = without_line_end(&line);
                if response == b"*" {
                    reply::bad(Some(&tag), "Authentication aborted by client.", out);
                    return None;
                }
                self.response(&tag, exchange, response, out)
            }
        }
    }

    /// Handles a response in base64, which is an initial response or a line of its own.
    fn response(
        &mut self,
        tag: &Tag,
        exchange: SaslExchange,
        response: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<PreloginStep> {
        let mechanism = exchange.mechanism();
        let message = match sasl::decode(response.trim_ascii_end()) {
            Ok(message) => message,
            Err(invalid) => return self.attempt(tag, mechanism, Err(invalid), out),
        };
        let credentials = match exchange {
            SaslExchange::Plain => sasl::plain(&message),
            SaslExchange::First(mechanism) => sasl::first_message(mechanism, &message, &self.settings.issuers),
            SaslExchange::External(owner) => sasl::external(&message, &owner),
            SaslExchange::LoginUserName => {
                self.ask(tag.clone(), SaslExchange::LoginPassword(message), out);
                return None;
            }
            SaslExchange::LoginPassword(user) => sasl::password_login(&user, &message, mechanism),
        };
        self.attempt(tag, mechanism, credentials, out)
    }

    fn attempt(
        &mut self,
        tag: &Tag,
        mechanism: Mechanism,
        credentials: Result<Credentials, InvalidCredentials>,
        out: &mut Vec<u8>,
    ) -> Option<PreloginStep> {
        match credentials {
            Ok(credentials) => Some(PreloginStep::Login(LoginRequest { tag: tag.clone(), credentials })),
            Err(fault) if fault.is_well_formed() => {
                Some(PreloginStep::InvalidLogin(InvalidLogin { tag: tag.clone(), mechanism, fault }))
            }
            Err(fault) => self.bad_command(Some(tag), &format!("Invalid credentials: {fault}."), out),
        }
    }

    fn refuse_in_clear(&mut self, tag: &Tag, out: &mut Vec<u8>) -> Option<PreloginStep> {
        reply::privacy_required(tag, out);
        self.count_failed_login(out);
        None
    }

    fn count_failed_login(&mut self, out: &mut Vec<u8>) {
        self.failed_logins += 1;
        if self.failed_logins >= self.settings.max_failed_logins {
            reply::bye("Too many failed logins.", out);
            self.closing = Some(CloseReason::TooManyFailedLogins);
        }
    }

    fn bad_command(&mut self, tag: Option<&Tag>, text: &str, out: &mut Vec<u8>) -> Option<PreloginStep> {
        reply::bad(tag, text, out);
        self.bad_commands += 1;
        if self.bad_commands < self.settings.max_bad_commands {
            return None;
        }
        reply::bye("Too many invalid IMAP commands.", out);
        Some(PreloginStep::Close(CloseReason::TooManyBadCommands))
    }
}

fn response_too_long(tag: &Tag, out: &mut Vec<u8>) -> CloseReason {
    reply::bad(Some(tag), "The response is too long.", out);
    reply::bye("The response is too long.", out);
    CloseReason::LineTooLong
}
