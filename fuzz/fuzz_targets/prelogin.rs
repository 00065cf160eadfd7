//! What clients say before they are logged in: framing, commands, SASL payloads. Cut anywhere, the same bytes lead to the same
//! replies and the same steps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vestibule::imap::prelogin::{Policy, Prelogin, Step, Transport};
use vestibule::imap::reply;

fuzz_target!(|input: &[u8]| {
    // The first byte chooses; the others are spoken as they are, so that the dictionary fits.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let transport = [Transport::Tls, Transport::Plain, Transport::StartTls][usize::from(choice % 3)];
    let policy = Policy { transport, max_line: 1024, max_literal: 256, max_bad_commands: 10, max_failed_logins: 3 };
    // After STARTTLS the bytes that follow are looked at only as far as they have come: that is its purpose.
    let whole = transcript(policy, bytes.chunks(bytes.len().max(1)));
    if transport == Transport::StartTls {
        return;
    }
    assert_eq!(whole, transcript(policy, bytes.chunks(1)), "byte by byte");
    assert_eq!(whole, transcript(policy, bytes.chunks(usize::from(choice) + 2)), "in pieces");
});

/// All replies and steps, as text.
fn transcript<'a>(policy: Policy, pieces: impl Iterator<Item = &'a [u8]>) -> String {
    let mut dialogue = Prelogin::new(policy);
    let mut replies = Vec::new();
    let mut steps = String::new();
    for piece in pieces {
        dialogue.input(piece);
        loop {
            match dialogue.step(&mut replies) {
                Step::NeedInput => break,
                Step::StartTls => return format!("{steps}starttls {replies:?}"),
                Step::Close(reason) => return format!("{steps}{reason:?} {replies:?}"),
                Step::Login(request) => {
                    let credentials = &request.credentials;
                    steps += &format!("{:?} {:?} {:?}\n", request.tag, credentials, credentials.password.expose());
                    dialogue.refused(&reply::authentication_failed(&request.tag), true, &mut replies);
                }
            }
        }
    }
    format!("{steps}open {replies:?} {:?}", dialogue.client_id())
}
