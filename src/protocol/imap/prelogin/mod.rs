//! The client before it has logged in: bytes in, replies and steps out.
//!
//! Knows the eight commands of this state, the SASL mechanisms, and when to stop listening. It does not know whether
//! a password is right and never sees a server. Everything about one login attempt lives in the [`LoginRequest`] it
//! hands out; after a refusal nothing of it is left here. RFC 3501 section 6.1 and 6.2, RFC 4959 (SASL-IR), RFC 7888
//! (LITERAL+), RFC 2971 (ID), RFC 5161 (ENABLE); where clients expect more than these say, Dovecot is followed.

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
use super::framing::{Frame, FrameLimits, Framer, without_line_end};
use super::sasl::{self, InvalidCredentials};
use super::tag::Tag;
use super::{capability, reply};
use crate::identity::{Credentials, Mechanism, Mechanisms, TokenIssuer, UserName};

/// Commands, good ones too: a client that never logs in may not go on for ever within its deadline.
const MAX_COMMANDS: u32 = 1000;
/// Bytes of replies, without the last one, that wait to be sent: a client may send hundreds of commands at once, and read nothing.
const MAX_REPLIES: usize = 4096;
/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// What is allowed.
#[derive(Debug, Clone)]
pub struct PreloginSettings {
    /// See [`Transport`].
    pub transport: Transport,
    /// Bytes of a command line or a SASL response.
    pub max_line: usize,
    /// Bytes of the literals of a command, together.
    pub max_literal: usize,
    /// The bad command that ends the connection.
    pub max_bad_commands: u32,
    /// The failed login that ends the connection.
    pub max_failed_logins: u32,
    /// Ways to log in that are offered.
    pub mechanisms: Mechanisms,
    /// Whose certificate the client has shown.
    pub certificate: Option<UserName>,
    /// Extensions that every server has, whichever the user's is.
    pub extensions: Extensions,
    /// Issuers whose tokens may name the user.
    pub issuers: Arc<[TokenIssuer]>,
}

/// What the caller does next.
#[derive(Debug)]
pub enum PreloginStep {
    /// Send the replies, read more, hand it to [`Prelogin::input`].
    NeedInput,
    /// Send the replies before there are more of them.
    Send,
    /// Send the replies, perform the handshake, begin anew with [`Transport::Tls`] and no greeting.
    StartTls,
    /// Find out whether these credentials are good; then [`Prelogin::refused`], [`Prelogin::unavailable`],
    /// [`Prelogin::challenge`], or [`Prelogin::into_leftover`].
    Login(LoginRequest),
    /// Refuse these credentials, which no server could accept, as late as a wrong password; then [`Prelogin::refused`].
    InvalidLogin(InvalidLogin),
    /// The client's answer to a challenge: the server's to judge, as it stands in the line.
    Response(Zeroizing<Vec<u8>>),
    /// Send the replies and close.
    Close(CloseReason),
}

/// One login command.
#[derive(Debug)]
pub struct LoginRequest {
    /// To answer under.
    pub tag: Tag,
    /// What it brought.
    pub credentials: Credentials,
}

/// A well-formed login command with credentials that cannot be right: an empty name, control characters, a token that names no
/// user (RFC 9051 section 6.2.3: NO; BAD is for what does not fit the grammar).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidLogin {
    /// The tag to answer under.
    pub tag: Tag,
    /// How it arrived.
    pub mechanism: Mechanism,
    /// What is wrong, for the log: never a part of the credentials.
    pub fault: InvalidCredentials,
}

/// Why a connection closes before login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client asked for it.
    Logout,
    /// See [`PreloginSettings::max_bad_commands`].
    TooManyBadCommands,
    /// See [`PreloginSettings::max_failed_logins`].
    TooManyFailedLogins,
    /// See [`PreloginSettings::max_line`].
    LineTooLong,
    /// See [`PreloginSettings::max_literal`].
    LiteralTooLong,
    /// Bytes came with STARTTLS (CVE-2011-0411).
    StartTlsInjection,
    /// HTTP or SMTP (CVE-2021-3618).
    ForeignProtocol,
    /// A TLS hello where plaintext is spoken.
    TlsOnPlainPort,
}

/// The dialogue so far.
#[derive(Debug)]
pub struct Prelogin {
    settings: PreloginSettings,
    framer: Framer,
    state: State,
    commands: u32,
    bad_commands: u32,
    failed_logins: u32,
    client_id: Option<ClientId>,
    /// Replied to already; the next step says so.
    closing: Option<CloseReason>,
}

#[derive(Debug)]
enum State {
    /// Waiting for a command.
    Command,
    /// Waiting for the response of a SASL exchange.
    Sasl(Tag, SaslExchange),
    /// Waiting for the response to a server's challenge.
    Relayed(Tag),
}

/// What a command led to: `None` goes on.
type Next = Option<PreloginStep>;

impl Prelogin {
    /// For a fresh connection, or anew after STARTTLS.
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

    /// The first line of a connection.
    pub fn greet(&self, out: &mut Vec<u8>) {
        let capabilities = self.capabilities();
        reply::untagged(&format!("OK [CAPABILITY {capabilities}] {}", reply::READY), out);
    }

    /// Bytes from the client.
    pub fn input(&mut self, bytes: &[u8]) {
        self.framer.input(bytes);
    }

    /// Goes on as far as the input allows; replies are appended to `out`.
    pub fn step(&mut self, out: &mut Vec<u8>) -> PreloginStep {
        loop {
            if let Some(reason) = self.closing.take() {
                return PreloginStep::Close(reason);
            }
            if out.len() > MAX_REPLIES {
                return PreloginStep::Send;
            }
            let next = match &self.state {
                State::Command => self.next_command(out),
                State::Sasl(..) | State::Relayed(_) => self.next_response(out),
            };
            if let Some(step) = next {
                return step;
            }
        }
    }

    /// The attempt was refused with `answer`, a complete line; `counts` against [`PreloginSettings::max_failed_logins`].
    pub fn refused(&mut self, answer: &[u8], counts: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(answer);
        if counts {
            self.count_failed_login(out);
        }
    }

    /// The attempt could not be decided.
    pub fn unavailable(&mut self, tag: &Tag, out: &mut Vec<u8>) {
        reply::unavailable(tag, out);
    }

    /// The server the attempt was passed to asks something: `line` is what follows `+ `. The client's answer is the next
    /// step.
    pub fn challenge(&mut self, tag: &Tag, line: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(b"+ ");
        out.extend_from_slice(line);
        out.extend_from_slice(b"\r\n");
        self.state = State::Relayed(tag.clone());
    }

    fn capabilities(&self) -> String {
        capability::before_login(self.settings.transport, self.offered(), self.settings.extensions)
    }

    /// What may be used: EXTERNAL only with a certificate.
    fn offered(&self) -> Mechanisms {
        let without = Mechanism::ALL
            .into_iter()
            .filter(|mechanism| *mechanism != Mechanism::External || self.settings.certificate.is_some());
        self.settings.mechanisms.and(without.collect())
    }

    /// What the client said of itself.
    pub fn client_id(&self) -> &ClientId {
        static NOTHING: ClientId = ClientId::empty();
        self.client_id.as_ref().unwrap_or(&NOTHING)
    }

    /// What followed the login command: the server's, once it has accepted.
    pub fn into_leftover(self) -> Vec<u8> {
        self.framer.into_leftover()
    }

    /// The farewell for `why`.
    pub fn bye(&self, why: ByeReason, out: &mut Vec<u8>) {
        reply::bye(why.text(), out);
    }

    fn next_command(&mut self, out: &mut Vec<u8>) -> Next {
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
                    // Without leave the client sends no literal: a password stays where it is.
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

    /// Only a login, and ID, have a use for literals.
    fn wants_literal(&self) -> bool {
        let mut arguments = Arguments::new(self.framer.partial_command());
        let tag = Tag::new(arguments.word());
        let verb = arguments.word();
        let login = verb.eq_ignore_ascii_case(b"LOGIN") || verb.eq_ignore_ascii_case(b"AUTHENTICATE");
        let wanted = login && self.settings.transport != Transport::StartTls || verb.eq_ignore_ascii_case(b"ID");
        tag.is_some() && wanted
    }

    fn over_cap(&mut self, reason: CloseReason, text: &str, out: &mut Vec<u8>) -> Next {
        let tag = Tag::new(Arguments::new(self.framer.partial_command()).word());
        reply::bad(tag.as_ref(), text, out);
        reply::bye(text, out);
        Some(PreloginStep::Close(reason))
    }

    fn command(&mut self, command: &[u8], out: &mut Vec<u8>) -> Next {
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
        name: Command,
        tag: &Tag,
        mut arguments: Arguments<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Next, MalformedArguments> {
        match name {
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

    fn start_tls(&mut self, tag: &Tag, out: &mut Vec<u8>) -> Next {
        match self.settings.transport {
            Transport::Tls => self.bad_command(Some(tag), "TLS is already active.", out),
            Transport::Plain => self.bad_command(Some(tag), "TLS is not available on this port.", out),
            // Whoever sent more could not yet know our answer: that is how commands are smuggled into a TLS session.
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
        let pairs = arguments.pairs(client_id::MAX_ID_PAIRS)?;
        arguments.end()?;
        // The first ID counts, as for Dovecot.
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
    ) -> Result<Next, MalformedArguments> {
        if self.settings.transport == Transport::StartTls {
            return Ok(self.refuse_in_clear(tag, out));
        }
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
    ) -> Result<Next, MalformedArguments> {
        if self.settings.transport == Transport::StartTls {
            return Ok(self.refuse_in_clear(tag, out));
        }
        let mechanism = arguments.astring()?;
        let initial = Zeroizing::new(arguments.word().to_vec());
        arguments.end()?;
        let known = Mechanism::by_sasl_name(&mechanism).filter(|mechanism| self.offered().has(*mechanism));
        let Some(exchange) = known.and_then(SaslExchange::of) else {
            let offered: Vec<&str> =
                self.offered().iter().map(Mechanism::sasl_name).filter(|name| !name.is_empty()).collect();
            let text = format!("[CANNOT] Mechanism not supported. Offered: {}.", offered.join(", "));
            reply::no(tag, &text, out);
            return Ok(None);
        };
        if initial.is_empty() {
            self.ask(tag.clone(), exchange, out);
            return Ok(None);
        }
        // RFC 4959: "=" is an initial response of no bytes.
        let initial = if initial[..] == *b"=" { Zeroizing::new(Vec::new()) } else { initial };
        Ok(self.response(&tag.clone(), exchange, &initial, out))
    }

    fn ask(&mut self, tag: Tag, exchange: SaslExchange, out: &mut Vec<u8>) {
        out.extend_from_slice(exchange.prompt());
        self.state = State::Sasl(tag, exchange);
    }

    fn next_response(&mut self, out: &mut Vec<u8>) -> Next {
        match self.framer.line() {
            Frame::Complete => {}
            Frame::LineTooLong => {
                if let State::Sasl(tag, _) | State::Relayed(tag) = &self.state {
                    reply::bad(Some(tag), "The response is too long.", out);
                }
                reply::bye("The response is too long.", out);
                return Some(PreloginStep::Close(CloseReason::LineTooLong));
            }
            _ => return Some(PreloginStep::NeedInput),
        }
        let line = self.framer.take();
        let response = without_line_end(&line);
        match std::mem::replace(&mut self.state, State::Command) {
            State::Command => None,
            // The server is told of an abort too: it has the last word.
            State::Relayed(_) => Some(PreloginStep::Response(Zeroizing::new(response.to_vec()))),
            State::Sasl(tag, _) if response == b"*" => {
                reply::bad(Some(&tag), "Authentication aborted by client.", out);
                None
            }
            State::Sasl(tag, exchange) => self.response(&tag, exchange, response, out),
        }
    }

    /// A response in base64, initial or not.
    fn response(&mut self, tag: &Tag, exchange: SaslExchange, response: &[u8], out: &mut Vec<u8>) -> Next {
        let mechanism = exchange.mechanism();
        let message = match sasl::decode(response.trim_ascii_end()) {
            Ok(message) => message,
            Err(invalid) => return self.attempt(tag, mechanism, Err(invalid), out),
        };
        let credentials = match exchange {
            SaslExchange::Plain => sasl::plain(&message),
            SaslExchange::First(mechanism) => sasl::first_message(mechanism, &message, &self.settings.issuers),
            SaslExchange::External => match &self.settings.certificate {
                Some(owner) => sasl::external(&message, owner),
                None => Err(InvalidCredentials::Grammar),
            },
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
    ) -> Next {
        match credentials {
            Ok(credentials) => Some(PreloginStep::Login(LoginRequest { tag: tag.clone(), credentials })),
            Err(fault) if fault.is_well_formed() => {
                Some(PreloginStep::InvalidLogin(InvalidLogin { tag: tag.clone(), mechanism, fault }))
            }
            Err(fault) => self.bad_command(Some(tag), &format!("Invalid credentials: {fault}."), out),
        }
    }

    fn refuse_in_clear(&mut self, tag: &Tag, out: &mut Vec<u8>) -> Next {
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

    fn bad_command(&mut self, tag: Option<&Tag>, text: &str, out: &mut Vec<u8>) -> Next {
        reply::bad(tag, text, out);
        self.bad_commands += 1;
        if self.bad_commands < self.settings.max_bad_commands {
            return None;
        }
        reply::bye("Too many invalid IMAP commands.", out);
        Some(PreloginStep::Close(CloseReason::TooManyBadCommands))
    }
}
