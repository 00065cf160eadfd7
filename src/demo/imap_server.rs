//! A small IMAP server based on imap-codec, with one user and one INBOX whose messages can be read and flagged.
//!
//! It is the mailbox server of the demo. It is not for production: it has no TLS and no limits except the size of a command, and
//! stores nothing.

use std::borrow::Cow;
use std::num::NonZeroU32;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use imap_codec::decode::{CommandDecodeError, Decoder};
use imap_codec::encode::Encoder;
use imap_codec::imap_types::IntoStatic;
use imap_codec::imap_types::auth::AuthMechanism;
use imap_codec::imap_types::command::{Command, CommandBody};
use imap_codec::imap_types::core::{QuotedChar, Tag, Vec1};
use imap_codec::imap_types::fetch::{MacroOrMessageDataItemNames, MessageDataItem, MessageDataItemName};
use imap_codec::imap_types::flag::{Flag, FlagPerm, StoreResponse, StoreType};
use imap_codec::imap_types::mailbox::{ListMailbox, Mailbox as MailboxName};
use imap_codec::imap_types::response::{
    Capability, Code, CodeOther, CommandContinuationRequest, Data, Greeting, Response, Status,
};
use imap_codec::imap_types::search::SearchKey;
use imap_codec::imap_types::sequence::SequenceSet;
use imap_codec::imap_types::status::{StatusDataItem, StatusDataItemName};
use imap_codec::{CommandCodec, GreetingCodec, ResponseCodec};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::items::{expanded, item, matches_key, number, sets_seen};
use super::mailbox::Mailbox;

/// Maximum size of a command in bytes.
const MAX_COMMAND: usize = 64 * 1024;
const UID_VALIDITY: u32 = 1;

/// Accepts connections until `stop` is cancelled.
pub(crate) async fn serve(listener: TcpListener, mailbox: Arc<Mailbox>, stop: CancellationToken) {
    let accept = async {
        while let Ok((socket, _)) = listener.accept().await {
            // Without it replies are only delayed.
            let _ = socket.set_nodelay(true);
            let connection = Connection::new(socket, mailbox.clone());
            let stop = stop.clone();
            tokio::spawn(async move {
                // An error means that the client is gone.
                let _ = stop.run_until_cancelled(connection.run()).await;
            });
        }
    };
    stop.run_until_cancelled(accept).await;
}

/// The connection of a client.
struct Connection<S> {
    socket: S,
    mailbox: Arc<Mailbox>,
    input: Vec<u8>,
    output: Vec<u8>,
    logged_in: bool,
    /// The access to INBOX, if it is selected.
    selected: Option<Access>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadOnly,
    ReadWrite,
}

/// The tagged response to a command: its status, code and text.
enum TaggedResponse {
    Ok(Option<Code<'static>>, &'static str),
    No(Option<Code<'static>>, &'static str),
    Bad(&'static str),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn new(socket: S, mailbox: Arc<Mailbox>) -> Self {
        Self { socket, mailbox, input: Vec::new(), output: Vec::new(), logged_in: false, selected: None }
    }

    async fn run(mut self) -> std::io::Result<()> {
        let text = format!("{} ready", self.mailbox.server);
        if let Ok(greeting) = Greeting::ok(Some(Code::Capability(capabilities(false))), &text) {
            self.output.extend(GreetingCodec::default().encode(&greeting).dump());
        }
        self.send().await?;
        while let Some(command) = self.command().await? {
            let logout = matches!(command.body, CommandBody::Logout);
            let tag = command.tag.clone();
            let response = self.execute(command).await?;
            self.answer(tag, response);
            self.send().await?;
            if logout {
                break;
            }
        }
        self.socket.shutdown().await
    }

    async fn send(&mut self) -> std::io::Result<()> {
        self.socket.write_all(&self.output).await?;
        self.socket.flush().await?;
        self.output.clear();
        Ok(())
    }

    /// Reads the next command, or returns `None` if the client is gone. The codec is called only for complete lines, because decoding
    /// a growing buffer again and again takes quadratic time.
    async fn command(&mut self) -> std::io::Result<Option<Command<'static>>> {
        let mut accepted_literals = 0;
        let mut scanned = 0;
        loop {
            let complete = self.input[scanned..].contains(&b'\n');
            scanned = self.input.len();
            if complete {
                match CommandCodec::default().decode(&self.input) {
                    Ok((rest, command)) => {
                        let command = command.into_static();
                        self.input = rest.to_vec();
                        return Ok(Some(command));
                    }
                    Err(CommandDecodeError::LiteralFound { length, .. }) if (length as usize) <= MAX_COMMAND => {
                        // The codec reports the same literal until it is complete, so each one is accepted once.
                        let literals = self.input.windows(3).filter(|window| window == b"}\r\n").count();
                        if literals > accepted_literals {
                            accepted_literals = literals;
                            self.respond(&continuation());
                            self.send().await?;
                        }
                    }
                    Err(CommandDecodeError::Incomplete) => {}
                    Err(_) => {
                        self.malformed().await?;
                        (accepted_literals, scanned) = (0, 0);
                        continue;
                    }
                }
            }
            if self.input.len() > MAX_COMMAND || self.socket.read_buf(&mut self.input).await? == 0 {
                return Ok(None);
            }
        }
    }

    async fn malformed(&mut self) -> std::io::Result<()> {
        let end = self.input.iter().position(|byte| *byte == b'\n').map_or(self.input.len(), |at| at + 1);
        let line: Vec<u8> = self.input.drain(..end).collect();
        let tag = line.split(|byte| *byte == b' ').next().and_then(|tag| Tag::try_from(tag).ok());
        if let Ok(status) = Status::bad(tag, None, "command not understood") {
            self.respond(&Response::Status(status));
        }
        self.send().await
    }

    fn respond(&mut self, response: &Response<'_>) {
        self.output.extend(ResponseCodec::default().encode(response).dump());
    }

    fn data(&mut self, data: Data<'_>) {
        self.respond(&Response::Data(data));
    }

    fn answer(&mut self, tag: Tag<'static>, response: TaggedResponse) {
        let status = match response {
            TaggedResponse::Ok(code, text) => Status::ok(Some(tag), code, text),
            TaggedResponse::No(code, text) => Status::no(Some(tag), code, text),
            TaggedResponse::Bad(text) => Status::bad(Some(tag), None, text),
        };
        // The conversion cannot fail: the texts are constants without line breaks.
        if let Ok(status) = status {
            self.respond(&Response::Status(status));
        }
    }

    async fn execute(&mut self, command: Command<'static>) -> std::io::Result<TaggedResponse> {
        Ok(match command.body {
            CommandBody::Capability => {
                self.data(Data::Capability(capabilities(self.logged_in)));
                TaggedResponse::Ok(None, "capabilities listed")
            }
            CommandBody::Noop | CommandBody::Check => TaggedResponse::Ok(None, "done"),
            CommandBody::Id { .. } => {
                self.data(Data::Id { parameters: None });
                TaggedResponse::Ok(None, "noted")
            }
            CommandBody::Logout => {
                if let Ok(bye) = Status::bye(None, "see you") {
                    self.respond(&Response::Status(bye));
                }
                TaggedResponse::Ok(None, "logged out")
            }
            CommandBody::Login { username, password } if !self.logged_in => {
                self.log_in(username.as_ref(), password.declassify().as_ref())
            }
            CommandBody::Authenticate { mechanism: AuthMechanism::Plain, initial_response } if !self.logged_in => {
                let response = match initial_response {
                    Some(response) => Some(response.declassify().to_vec()),
                    None => self.request_response().await?,
                };
                self.authenticate(response.as_deref())
            }
            CommandBody::Authenticate { .. } => TaggedResponse::No(None, "PLAIN only"),
            _ if !self.logged_in => TaggedResponse::Bad("log in first"),
            CommandBody::List { mailbox_wildcard, .. } => self.list(&mailbox_wildcard, false),
            CommandBody::Lsub { mailbox_wildcard, .. } => self.list(&mailbox_wildcard, true),
            CommandBody::Status { mailbox: MailboxName::Inbox, item_names } => self.status(&item_names),
            CommandBody::Select { mailbox: MailboxName::Inbox, .. } => self.select(Access::ReadWrite),
            CommandBody::Examine { mailbox: MailboxName::Inbox, .. } => self.select(Access::ReadOnly),
            CommandBody::Select { .. } | CommandBody::Examine { .. } | CommandBody::Status { .. } => {
                TaggedResponse::No(None, "there is only INBOX")
            }
            CommandBody::Idle => self.idle().await?,
            _ if self.selected.is_none() => TaggedResponse::Bad("select a mailbox first"),
            CommandBody::Fetch { sequence_set, macro_or_item_names, uid, .. } => {
                self.fetch(&sequence_set, macro_or_item_names, uid)
            }
            CommandBody::Store { sequence_set, kind, response, flags, uid, .. } => {
                self.store(&sequence_set, kind, response, &flags, uid)
            }
            CommandBody::Search { criteria, .. } => self.search(&criteria),
            CommandBody::Close | CommandBody::Unselect => {
                self.selected = None;
                TaggedResponse::Ok(None, "closed")
            }
            _ => TaggedResponse::No(None, "not in this demo"),
        })
    }

    fn log_in(&mut self, user: &[u8], password: &[u8]) -> TaggedResponse {
        if user.eq_ignore_ascii_case(self.mailbox.user.as_bytes()) && password == self.mailbox.password.as_bytes() {
            self.logged_in = true;
            return TaggedResponse::Ok(Some(Code::Capability(capabilities(true))), "logged in");
        }
        TaggedResponse::No(Some(code("AUTHENTICATIONFAILED")), "wrong user or password")
    }

    fn authenticate(&mut self, response: Option<&[u8]>) -> TaggedResponse {
        let Some(response) = response else { return TaggedResponse::Bad("no response") };
        match *response.split(|byte| *byte == 0).collect::<Vec<_>>() {
            [authzid, user, password] if authzid.is_empty() || authzid == user => self.log_in(user, password),
            [..] => TaggedResponse::No(Some(code("AUTHORIZATIONFAILED")), "only for yourself"),
        }
    }

    /// Sends a continuation request, and decodes the next line from base64.
    async fn request_response(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        self.respond(&Response::CommandContinuationRequest(CommandContinuationRequest::base64(&b""[..])));
        self.send().await?;
        let line = self.line().await?;
        Ok(line.and_then(|line| STANDARD.decode(line.trim_ascii()).ok()))
    }

    async fn line(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.input.drain(..=end).collect()));
            }
            if self.input.len() > MAX_COMMAND || self.socket.read_buf(&mut self.input).await? == 0 {
                return Ok(None);
            }
        }
    }

    async fn idle(&mut self) -> std::io::Result<TaggedResponse> {
        self.respond(&continuation());
        self.send().await?;
        Ok(match self.line().await? {
            Some(line) if line.trim_ascii().eq_ignore_ascii_case(b"DONE") => TaggedResponse::Ok(None, "idle no more"),
            _ => TaggedResponse::Bad("expected DONE"),
        })
    }

    fn list(&mut self, wildcard: &ListMailbox<'_>, subscribed: bool) -> TaggedResponse {
        let pattern = match wildcard {
            ListMailbox::Token(token) => token.as_ref().to_vec(),
            ListMailbox::String(string) => string.as_ref().to_vec(),
        };
        let inbox = pattern.eq_ignore_ascii_case(b"INBOX") || pattern.iter().any(|byte| matches!(byte, b'*' | b'%'));
        if inbox {
            let (items, delimiter, mailbox) = (Vec::new(), QuotedChar::try_from('/').ok(), MailboxName::Inbox);
            self.data(match subscribed {
                true => Data::Lsub { items, delimiter, mailbox },
                false => Data::List { items, delimiter, mailbox },
            });
        }
        TaggedResponse::Ok(None, "listed")
    }

    fn status(&mut self, names: &[StatusDataItemName]) -> TaggedResponse {
        let (count, unseen) = self.counts();
        let items: Vec<StatusDataItem> = names
            .iter()
            .filter_map(|name| match name {
                StatusDataItemName::Messages => Some(StatusDataItem::Messages(count)),
                StatusDataItemName::Recent => Some(StatusDataItem::Recent(0)),
                StatusDataItemName::Unseen => Some(StatusDataItem::Unseen(unseen)),
                StatusDataItemName::UidNext => NonZeroU32::new(count + 1).map(StatusDataItem::UidNext),
                StatusDataItemName::UidValidity => NonZeroU32::new(UID_VALIDITY).map(StatusDataItem::UidValidity),
                _ => None,
            })
            .collect();
        self.data(Data::Status { mailbox: MailboxName::Inbox, items: Cow::Owned(items) });
        TaggedResponse::Ok(None, "status told")
    }

    fn counts(&self) -> (u32, u32) {
        let messages = self.mailbox.messages();
        let unseen = messages.iter().filter(|message| !message.is_seen()).count();
        (number(messages.len()), number(unseen))
    }

    fn select(&mut self, access: Access) -> TaggedResponse {
        let (count, _) = self.counts();
        let flags = [Flag::Answered, Flag::Flagged, Flag::Deleted, Flag::Seen, Flag::Draft];
        self.data(Data::Flags(flags.to_vec()));
        self.data(Data::Exists(count));
        self.data(Data::Recent(0));
        let mut permanent: Vec<FlagPerm<'_>> = flags.into_iter().map(FlagPerm::Flag).collect();
        permanent.push(FlagPerm::Asterisk);
        let codes = [
            Some(Code::PermanentFlags(permanent)),
            Code::uidvalidity(UID_VALIDITY).ok(),
            Code::uidnext(count + 1).ok(),
        ];
        for code in codes.into_iter().flatten() {
            if let Ok(status) = Status::ok(None, Some(code), "so it is") {
                self.respond(&Response::Status(status));
            }
        }
        self.selected = Some(access);
        match access {
            Access::ReadWrite => TaggedResponse::Ok(Some(Code::ReadWrite), "INBOX is open"),
            Access::ReadOnly => TaggedResponse::Ok(Some(Code::ReadOnly), "INBOX is open"),
        }
    }

    /// Returns the positions, counted from 1, of the messages in `set`. UIDs are equal to positions.
    fn selected_positions(&self, set: &SequenceSet) -> Vec<NonZeroU32> {
        let count = number(self.mailbox.messages().len());
        let Some(largest) = NonZeroU32::new(count) else { return Vec::new() };
        let mut positions: Vec<NonZeroU32> = set.iter(largest).filter(|position| *position <= largest).collect();
        positions.sort_unstable();
        positions.dedup();
        positions
    }

    fn fetch(&mut self, set: &SequenceSet, items: MacroOrMessageDataItemNames<'static>, uid: bool) -> TaggedResponse {
        let mut names = match items {
            MacroOrMessageDataItemNames::MessageDataItemNames(names) => names,
            MacroOrMessageDataItemNames::Macro(kind) => expanded(kind),
        };
        if uid && !names.contains(&MessageDataItemName::Uid) {
            names.insert(0, MessageDataItemName::Uid);
        }
        let marks_seen = self.selected == Some(Access::ReadWrite) && names.iter().any(sets_seen);
        if marks_seen && !names.contains(&MessageDataItemName::Flags) {
            names.push(MessageDataItemName::Flags);
        }
        let mailbox = self.mailbox.clone();
        for position in self.selected_positions(set) {
            let mut messages = mailbox.messages();
            let Some(message) = messages.get_mut(position.get() as usize - 1) else { continue };
            if marks_seen {
                message.store(StoreType::Add, &[Flag::Seen]);
            }
            let items: Vec<MessageDataItem<'_>> =
                names.iter().filter_map(|name| item(name, message, position)).collect();
            if let Ok(items) = Vec1::try_from(items) {
                self.data(Data::Fetch { seq: position, items });
            }
        }
        TaggedResponse::Ok(None, "fetched")
    }

    fn store(
        &mut self,
        set: &SequenceSet,
        kind: StoreType,
        response: StoreResponse,
        flags: &[Flag<'static>],
        uid: bool,
    ) -> TaggedResponse {
        if self.selected != Some(Access::ReadWrite) {
            return TaggedResponse::No(None, "the mailbox is read-only");
        }
        let mailbox = self.mailbox.clone();
        for position in self.selected_positions(set) {
            let mut messages = mailbox.messages();
            let Some(message) = messages.get_mut(position.get() as usize - 1) else { continue };
            message.store(kind, flags);
            let mut names = vec![MessageDataItemName::Flags];
            if uid {
                names.insert(0, MessageDataItemName::Uid);
            }
            let items: Vec<MessageDataItem<'_>> =
                names.iter().filter_map(|name| item(name, message, position)).collect();
            if response == StoreResponse::Answer
                && let Ok(items) = Vec1::try_from(items)
            {
                self.data(Data::Fetch { seq: position, items });
            }
        }
        TaggedResponse::Ok(None, "stored")
    }

    fn search(&mut self, keys: &Vec1<SearchKey<'_>>) -> TaggedResponse {
        let messages = self.mailbox.messages();
        let largest = NonZeroU32::new(number(messages.len())).unwrap_or(NonZeroU32::MIN);
        let found = messages.iter().zip(1_u32..).filter_map(|(message, position)| {
            let position = NonZeroU32::new(position)?;
            keys.as_ref().iter().all(|key| matches_key(key, message, position, largest)).then_some(position)
        });
        let found: Vec<NonZeroU32> = found.collect();
        drop(messages);
        self.data(Data::Search(found));
        TaggedResponse::Ok(None, "searched")
    }
}

/// Returns a response code of RFC 5530, which the codec does not define.
fn code(name: &'static str) -> Code<'static> {
    Code::Other(CodeOther::unvalidated(name.as_bytes()))
}

fn continuation() -> Response<'static> {
    let basic = CommandContinuationRequest::basic(None, "go on");
    Response::CommandContinuationRequest(basic.unwrap_or_else(|_| CommandContinuationRequest::base64(&b""[..])))
}

fn capabilities(logged_in: bool) -> Vec1<Capability<'static>> {
    let words: &[&str] =
        if logged_in { &["ID", "IDLE", "UNSELECT"] } else { &["ID", "SASL-IR", "AUTH=PLAIN", "LITERAL+"] };
    let mut list = vec![Capability::Imap4Rev1];
    list.extend(words.iter().filter_map(|word| Capability::try_from(*word).ok()));
    Vec1::try_from(list).unwrap_or_else(|_| Vec1::from(Capability::Imap4Rev1))
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    async fn dialogue(input: &str) -> String {
        let (mut client, server): (DuplexStream, DuplexStream) = duplex(1 << 16);
        let mailbox = Arc::new(Mailbox::new("shard-a", "alice", "secret"));
        let server = tokio::spawn(Connection::new(server, mailbox).run());
        client.write_all(input.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut output = String::new();
        client.read_to_string(&mut output).await.unwrap();
        server.await.unwrap().unwrap();
        output
    }

    #[tokio::test]
    async fn session_with_all_commands_succeeds() {
        let output = dialogue(
            "a LOGIN alice wrong\r\nb LOGIN {5}\r\nalice {6+}\r\nsecret\r\nc LIST \"\" *\r\nd STATUS INBOX (MESSAGES UNSEEN)\r\n\
             e SELECT INBOX\r\nf FETCH 1 (FLAGS BODY[HEADER.FIELDS (X-Served-By)])\r\ng UID STORE 2 +FLAGS (\\Flagged)\r\n\
             h SEARCH UNSEEN\r\ni IDLE\r\nDONE\r\nj FETCH 1:* (UID FLAGS ENVELOPE BODYSTRUCTURE RFC822.SIZE INTERNALDATE)\r\nk NONSENSE\r\nl LOGOUT\r\n",
        )
        .await;
        for part in [
            "* OK [CAPABILITY IMAP4REV1 ID SASL-IR AUTH=PLAIN LITERAL+] shard-a ready\r\n",
            "a NO [AUTHENTICATIONFAILED]",
            "b OK [CAPABILITY IMAP4REV1 ID IDLE UNSELECT]",
            "* LIST () \"/\" INBOX\r\n",
            "* STATUS INBOX (MESSAGES 3 UNSEEN 3)\r\n",
            "* 3 EXISTS\r\n",
            "e OK [READ-WRITE]",
            "X-Served-By: shard-a\r\n",
            "* 2 FETCH (UID 2 FLAGS (\\Flagged))\r\n",
            "* SEARCH 2 3\r\n",
            "i OK",
            "\"Welcome\"",
            "k BAD",
            "* BYE see you\r\nl OK logged out\r\n",
        ] {
            assert!(output.contains(part), "{part} is missing in\n{output}");
        }
    }

    #[tokio::test]
    async fn authenticate_accepts_an_optional_initial_response() {
        let with = dialogue("a AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==\r\nb LOGOUT\r\n").await;
        assert!(with.contains("\r\na OK "), "{with}");
        let without = dialogue("a AUTHENTICATE PLAIN\r\nAGFsaWNlAHNlY3JldA==\r\nb LOGOUT\r\n").await;
        assert!(without.contains("\r\n+ \r\na OK "), "{without}");
        let wrong = dialogue("a AUTHENTICATE PLAIN AGJvYgBzZWNyZXQ=\r\nb SELECT INBOX\r\n").await;
        assert!(wrong.contains("\r\na NO [AUTHENTICATIONFAILED]") && wrong.contains("\r\nb BAD "), "{wrong}");
    }
}
