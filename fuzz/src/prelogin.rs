//! The dialogue with a client before login: framing, commands and SASL messages. The same bytes lead to the same replies and steps
//! however they are split.

use vestibule::identity::{Mechanism, Mechanisms, Proof, UserName};
use vestibule::protocol::imap::capability::{Extensions, Transport};
use vestibule::protocol::imap::prelogin::{ChallengeStep, LoginRequest, Prelogin, PreloginSettings, PreloginStep};
use vestibule::protocol::imap::refusal::RefusalKind;
use vestibule::protocol::imap::reply;
use vestibule::protocol::imap::tag::Tag;

pub fn run(input: &[u8]) {
    // The first byte selects the settings; the other bytes are the client's input unchanged, so that the dictionary applies.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let transport = [Transport::Tls, Transport::Plain, Transport::StartTls][usize::from(choice % 3)];
    let policy = PreloginSettings {
        transport,
        max_line: 1024,
        max_literal: 256,
        max_bad_commands: 10,
        max_failed_logins: 3,
        mechanisms: if choice & 0x40 == 0 { Mechanism::ALL.into_iter().collect() } else { Mechanisms::PASSWORDS },
        certificate: (choice & 0x80 == 0).then(|| UserName::new(b"carol").expect("a user name")),
        extensions: Extensions::ALL,
        issuers: Vec::new().into(),
    };
    // After STARTTLS the result depends on which bytes have arrived, because plaintext after the command is refused.
    let whole = transcript(&policy, bytes.chunks(bytes.len().max(1)));
    if transport == Transport::StartTls {
        return;
    }
    assert_eq!(whole, transcript(&policy, bytes.chunks(1)), "byte by byte");
    assert_eq!(whole, transcript(&policy, bytes.chunks(usize::from(choice) + 2)), "in pieces");
}

/// Returns all replies and steps as text.
fn transcript<'a>(policy: &PreloginSettings, pieces: impl Iterator<Item = &'a [u8]>) -> String {
    let mut dialogue = Prelogin::new(policy.clone());
    let (mut replies, mut sent) = (Vec::new(), Vec::new());
    let mut steps = String::new();
    // The tag of the command that waits for the client's response to a challenge.
    let mut challenged: Option<Tag> = None;
    for piece in pieces {
        dialogue.input(piece);
        loop {
            if let Some(tag) = &challenged {
                match dialogue.challenge_step(tag, &mut replies) {
                    ChallengeStep::NeedInput => break,
                    ChallengeStep::Close(reason) => return format!("{steps}{reason:?} {:?}", [sent, replies].concat()),
                    ChallengeStep::Response(line) => {
                        steps += &format!("response {:?}\n", *line);
                        let reply = reply::authentication_failed(tag, None);
                        dialogue.refused(&reply, RefusalKind::FailedLogin, &mut replies);
                        challenged = None;
                    }
                }
            }
            match dialogue.step(&mut replies) {
                PreloginStep::NeedInput => break,
                PreloginStep::Send => sent.append(&mut replies),
                PreloginStep::StartTls => return format!("{steps}starttls {:?}", [sent, replies].concat()),
                PreloginStep::Close(reason) => return format!("{steps}{reason:?} {:?}", [sent, replies].concat()),
                PreloginStep::Login(LoginRequest { tag, credentials }) => {
                    let proof = match &credentials.proof {
                        Proof::Password(secret) | Proof::Message { first: secret, .. } => secret.expose(),
                        Proof::Certificate => b"",
                    };
                    steps += &format!("{tag:?} {credentials:?} {proof:?}\n");
                    if matches!(credentials.proof, Proof::Message { .. }) {
                        dialogue.challenge(b"Y2hhbGxlbmdl", &mut replies);
                        challenged = Some(tag);
                    } else {
                        dialogue.refused(
                            &reply::authentication_failed(&tag, None),
                            RefusalKind::FailedLogin,
                            &mut replies,
                        );
                    }
                }
                PreloginStep::InvalidLogin(login) => {
                    steps += &format!("{:?} {:?} {}\n", login.tag, login.mechanism, login.fault);
                    dialogue.refused(
                        &reply::authentication_failed(&login.tag, None),
                        RefusalKind::FailedLogin,
                        &mut replies,
                    );
                }
            }
        }
    }
    format!("{steps}open {:?} {:?}", [sent, replies].concat(), dialogue.client_id())
}
