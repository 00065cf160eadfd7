//! Runs transcripts of the login dialogue: lines of the server, and the expected lines to the server and steps.

use std::ops::ControlFlow;

use zeroize::Zeroizing;

use crate::identity::{Credentials, LoginWith, Mechanism, PasswordLogin, Proof, Secret, ServerLogin, UserName};
use crate::protocol::imap::backend_login::verdict::Action;
use crate::protocol::imap::backend_login::{
    BackendLogin, DialogueRules, LoginAttempt, LoginStep, Unavailable, UnsupportedForms,
};
use crate::protocol::imap::client_id::IdPair;
use crate::protocol::imap::refusal::RefusalKind;
use crate::protocol::imap::tag::Tag;

/// How the server's bytes are split into reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum Split {
    Whole,
    Bytes,
    At(usize),
}

impl Split {
    fn apply(self, bytes: &[u8]) -> Vec<&[u8]> {
        match self {
            Self::Whole => vec![bytes],
            Self::Bytes => bytes.chunks(1).collect(),
            Self::At(index) => {
                let (first, second) = bytes.split_at(index.min(bytes.len()));
                vec![first, second]
            }
        }
    }
}

/// A login with these settings on a server that a transcript plays.
pub(super) struct Server {
    pub(super) starttls: bool,
    pub(super) is_probe: bool,
    pub(super) id: Vec<IdPair>,
    pub(super) login_with: LoginWith,
    pub(super) unsupported_forms: Option<UnsupportedForms>,
    pub(super) credentials: Credentials,
}

impl Server {
    pub(super) fn new(user: &str, password: &[u8]) -> Self {
        Self {
            starttls: false,
            is_probe: false,
            id: Vec::new(),
            login_with: LoginWith::Automatic,
            unsupported_forms: None,
            credentials: Credentials {
                user: UserName::new(user.as_bytes()).unwrap(),
                authzid: None,
                mechanism: Mechanism::Login,
                proof: Proof::Password(Secret::new(password.to_vec())),
            },
        }
    }

    /// Runs a dialogue: `S: ` is a line from the server, `C: ` an expected line to the server, `! ` an expected step. The server's
    /// bytes between two expected lines arrive in one piece, byte by byte, and split in two at every position.
    #[track_caller]
    pub(super) fn check(&self, dialogue: &str) {
        let expected = dialogue.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
        let longest = dialogue.len();
        for split in [Split::Whole, Split::Bytes].into_iter().chain((1..longest).map(Split::At)) {
            let output = self.run(dialogue, split);
            assert_eq!(output, expected, "{split:?}\n--- output:\n{output}\n--- expected:\n{expected}\n");
        }
    }

    pub(super) fn run(&self, dialogue: &str, split: Split) -> String {
        self.run_dialogue(dialogue, split).0
    }

    /// Returns the transcript, and the forms that the server rejected.
    pub(super) fn run_for_rejected_forms(&self, dialogue: &str) -> (String, Option<UnsupportedForms>) {
        self.run_dialogue(dialogue, Split::Whole)
    }

    fn run_dialogue(&self, dialogue: &str, split: Split) -> (String, Option<UnsupportedForms>) {
        let tag = Tag::new(b"tag1").unwrap();
        let (unavailable_texts, limit_texts) = (["is on fire".to_owned()], ["quota of logins".to_owned()]);
        let mut login = BackendLogin::new(self.attempt(&tag, &unavailable_texts, &limit_texts));
        let mut log: Vec<String> = Vec::new();
        let lines: Vec<&str> = dialogue.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let mut index = 0;
        'dialogue: while index < lines.len() {
            // Consecutive lines of the server arrive together.
            let mut batch = Vec::new();
            while let Some(line) = lines.get(index).and_then(|line| line.strip_prefix("S: ")) {
                batch.extend_from_slice(&unescape(line));
                log.push(lines[index].to_owned());
                index += 1;
            }
            for chunk in split.apply(&batch) {
                login.input(chunk);
                if run_steps(&mut login, &mut log).is_break() {
                    break 'dialogue;
                }
            }
            while lines.get(index).is_some_and(|line| !line.starts_with("S: ")) {
                index += 1;
            }
        }
        (log.join("\n"), login.unsupported_forms())
    }

    fn attempt<'a>(
        &'a self,
        tag: &'a Tag,
        unavailable_texts: &'a [String],
        limit_texts: &'a [String],
    ) -> LoginAttempt<'a> {
        let Credentials { user, authzid, mechanism: client, proof } = &self.credentials;
        let authzid = authzid.as_ref();
        let login = match proof {
            Proof::Message { mechanism, first } => ServerLogin::Relayed { mechanism: *mechanism, first, user, authzid },
            Proof::Password(password) => ServerLogin::Password(PasswordLogin { user, authzid, password }),
            Proof::Certificate => panic!("a certificate is not sent to servers"),
        };
        LoginAttempt {
            login: (!self.is_probe).then_some(login),
            tag,
            starttls: self.starttls,
            id: self.id.clone(),
            max_line: 1024,
            max_untagged_lines: 4,
            max_untagged_bytes: 512,
            rules: DialogueRules {
                login_with: self.login_with,
                client: Some(*client),
                one_server_per_user: true,
                unavailable_texts,
                limit_texts,
                unsupported_forms: self.unsupported_forms,
            },
        }
    }
}

/// Logs the steps up to the next input. The result is a break after the last step of the dialogue.
fn run_steps(login: &mut BackendLogin<'_>, log: &mut Vec<String>) -> ControlFlow<()> {
    loop {
        let mut out = Zeroizing::new(Vec::new());
        let step = login.step(&mut out);
        log.extend(out.split_inclusive(|byte| *byte == b'\n').map(|line| format!("C: {}", escape(line))));
        match step {
            LoginStep::NeedInput => return ControlFlow::Continue(()),
            LoginStep::StartTls => {
                log.push("! start TLS".to_owned());
                login.tls_established();
            }
            LoginStep::Challenge(line) => {
                log.push(format!("! challenge: {}", line.escape_ascii()));
                login.respond(b"YW5zd2Vy");
            }
            LoginStep::Unavailable(Unavailable { verdict, .. }) if verdict.action == Action::Reconnect => {
                log.push("! reconnect".to_owned());
                login.reconnected();
            }
            LoginStep::Accepted { to_client } => {
                let lines = to_client.split_inclusive(|byte| *byte == b'\n');
                log.extend(lines.map(|line| format!("! client: {}", escape(line))));
                return ControlFlow::Break(());
            }
            LoginStep::Refused { reply, kind } => {
                let kind = match kind {
                    RefusalKind::FailedLogin => "",
                    RefusalKind::NotCounted => " (not counted)",
                };
                log.push(format!("! refused{kind}: {}", escape(&reply)));
                return ControlFlow::Break(());
            }
            LoginStep::Referred(referral) => {
                log.push(format!("! referred to {} {}: {}", referral.host, referral.port, escape(&referral.reply)));
                return ControlFlow::Break(());
            }
            LoginStep::Probed(capabilities) => {
                let names: Vec<&str> = capabilities.mechanisms.iter().map(Mechanism::as_str).collect();
                log.push(format!("! seen: {}", names.join(" ")));
                return ControlFlow::Break(());
            }
            LoginStep::Unavailable(Unavailable { fault, reply, .. }) => {
                let reply = reply.map(|reply| format!(" {}", escape(&reply))).unwrap_or_default();
                log.push(format!("! unavailable: {fault:?}{reply}"));
                return ControlFlow::Break(());
            }
        }
    }
}

/// Adds the CRLF that lines in transcripts do not contain; `\q` stands for a bare LF.
fn unescape(line: &str) -> Vec<u8> {
    match line.strip_suffix("\\q") {
        Some(bare) => [bare.as_bytes(), b"\n"].concat(),
        None => [line.as_bytes(), b"\r\n"].concat(),
    }
}

fn escape(line: &[u8]) -> String {
    match line.strip_suffix(b"\r\n") {
        Some(line) => String::from_utf8_lossy(line).into_owned(),
        None => format!("{}\\", String::from_utf8_lossy(line)),
    }
}

/// A client that uses LOGIN.
pub(super) fn alice() -> Server {
    Server::new("alice", b"secret")
}

/// A client that uses AUTHENTICATE PLAIN.
pub(super) fn alice_by_plain() -> Server {
    let mut server = alice();
    server.credentials.mechanism = Mechanism::SaslPlain;
    server
}
