use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::*;

const ANSWERS: [Answer; 5] = [Answer::Refusal, Answer::AccountClosed, Answer::Referral, Answer::Bad, Answer::AsksAgain];
const POINTS: [Point; 4] = [Point::BeforeLogin, Point::LoginSent, Point::Retried, Point::Challenged];

fn all_answers() -> impl Iterator<Item = Answer> {
    ANSWERS.into_iter().chain(ServerFault::ALL.iter().copied().map(Answer::Fault))
}

/// Shorthand of the expected table: what happens, and the server's health.
fn words(verdict: Verdict) -> String {
    let action = match verdict.action {
        Action::Refuse { counts: true } => "refused, counted",
        Action::Refuse { counts: false } => "refused, not counted",
        Action::Refer => "referral",
        Action::TryAnotherServer => "next server",
        Action::GiveUp => "no other server",
        Action::AnotherForm => "next form",
        Action::Reconnect => "same server again",
    };
    match verdict.health {
        Health::Suffers => format!("{action}; counts against the server"),
        Health::Answers | Health::Unchanged => action.to_owned(),
    }
}

#[test]
fn every_row_of_the_table() {
    use ServerFault::*;
    let fault = Answer::Fault;
    // Before the login; after it with user-hash; after it with another balance; after a challenge.
    let blamed = "next server; counts against the server";
    let table: &[(Answer, [&str; 4])] = &[
        (Answer::Refusal, ["refused, counted"; 4]),
        (Answer::AccountClosed, ["refused, not counted"; 4]),
        (Answer::Referral, ["referral"; 4]),
        (Answer::Bad, ["next form", "next form", "next form", "refused, counted"]),
        (Answer::AsksAgain, ["next form"; 4]),
        (fault(Unreachable), [blamed, "no other server", "next server", "no other server"]),
        (fault(Silent), [blamed, "no other server", "next server", "no other server"]),
        (fault(Greeting), [blamed, "no other server", "next server", "no other server"]),
        (fault(StartTlsNotOffered), [blamed, "no other server", "next server", "no other server"]),
        (fault(StartTlsRefused), [blamed, "no other server", "next server", "no other server"]),
        (fault(StartTlsResidue), [blamed, "no other server", "next server", "no other server"]),
        (fault(LoginDisabled), [blamed, "no other server", "next server", "no other server"]),
        (fault(AuthzidUnsupported), ["next server", "no other server", "next server", "no other server"]),
        (fault(MechanismUnsupported), ["next server", "no other server", "next server", "no other server"]),
        (fault(Protocol), [blamed, "no other server", "next server", "no other server"]),
        (fault(TooMuchUntagged), [blamed, "no other server", "next server", "no other server"]),
        (fault(Bye), [blamed, "no other server", "next server", "no other server"]),
        (fault(Closed), [blamed, "no other server", "next server", "no other server"]),
        (fault(Timeout), ["next server", "no other server", "next server", "no other server"]),
        (fault(Overloaded), ["next server", "no other server", "next server", "no other server"]),
        (fault(UserLimit), ["no other server"; 4]),
        (fault(TlsRequired), ["no other server"; 4]),
        (fault(LoginBad), ["no other server"; 4]),
        (fault(TooManyChallenges), ["no other server"; 4]),
    ];
    assert_eq!(table.iter().map(|(answer, _)| *answer).collect::<Vec<_>>(), all_answers().collect::<Vec<_>>());
    for (answer, expected) in table {
        let columns = [
            decide(*answer, Point::BeforeLogin, true),
            decide(*answer, Point::LoginSent, true),
            decide(*answer, Point::LoginSent, false),
            decide(*answer, Point::Challenged, false),
        ];
        assert_eq!(columns.map(words), *expected, "{answer:?}");
        let retried = decide(*answer, Point::Retried, true);
        match answer {
            Answer::Fault(Bye | Closed) => assert_eq!(words(retried), "same server again"),
            _ => assert_eq!(retried, decide(*answer, Point::LoginSent, true), "{answer:?}"),
        }
    }
}

#[test]
fn a_client_can_neither_blame_a_server_nor_move_a_user_once_its_login_was_sent() {
    for answer in all_answers() {
        for point in POINTS.into_iter().filter(|point| *point != Point::BeforeLogin) {
            for one_server_per_user in [true, false] {
                let verdict = decide(answer, point, one_server_per_user);
                assert_ne!(verdict.health, Health::Suffers, "{answer:?} {point:?}");
                if one_server_per_user {
                    assert_ne!(verdict.action, Action::TryAnotherServer, "{answer:?} {point:?}");
                }
            }
        }
    }
}

#[test]
fn a_server_that_refuses_works() {
    for answer in all_answers() {
        for point in POINTS {
            let Verdict { action, health } = decide(answer, point, false);
            if matches!(action, Action::Refuse { .. } | Action::Refer) {
                assert_eq!(health, Health::Answers, "{answer:?} {point:?}");
            }
        }
    }
}

/// When an answer can occur.
#[derive(PartialEq)]
enum When {
    Before,
    After,
    Both,
}

/// The answer in operators' words.
fn row(answer: Answer) -> (String, When) {
    use ServerFault::*;
    let (text, when) = match answer {
        Answer::Refusal => ("`NO` with no response code, or with any code that is not in this table", When::After),
        Answer::AccountClosed => ("`NO [CONTACTADMIN]`", When::After),
        Answer::Referral => ("`NO [REFERRAL …]`", When::After),
        Answer::Bad => ("`BAD`", When::After),
        Answer::AsksAgain => ("`+` although the command carried the response", When::After),
        Answer::Fault(Overloaded) => {
            ("`NO [UNAVAILABLE]`, `[SERVERBUG]`, `[TEMPFAIL]`, or a text that means an outage", When::After)
        }
        Answer::Fault(UserLimit) => {
            ("`NO [LIMIT]`, `[INUSE]`, `[OVERQUOTA]`, or a text that means a limit of the user", When::After)
        }
        Answer::Fault(TlsRequired) => ("`NO [PRIVACYREQUIRED]`", When::After),
        Answer::Fault(LoginBad) => ("`BAD` to every form of the login", When::After),
        Answer::Fault(Bye) => ("`* BYE` instead of an answer", When::Both),
        Answer::Fault(fault @ TooManyChallenges) => (fault.as_str(), When::After),
        Answer::Fault(fault @ (Protocol | TooMuchUntagged | Closed | Timeout)) => (fault.as_str(), When::Both),
        Answer::Fault(fault) => (fault.as_str(), When::Before),
    };
    (text.to_owned(), when)
}

fn printed() -> String {
    let mut table =
        "| the server's answer | before the login was sent | after, `balance: user-hash` | after, other balance \
                     | after a challenge |\n|---|---|---|---|---|\n"
            .to_owned();
    for answer in all_answers() {
        let (text, when) = row(answer);
        let columns = [
            (Point::BeforeLogin, true),
            (Point::LoginSent, true),
            (Point::LoginSent, false),
            (Point::Challenged, true),
        ];
        let cells = columns.map(|(point, one_server_per_user)| {
            let shown = when == When::Both || (when == When::Before) == (point == Point::BeforeLogin);
            if shown { words(decide(answer, point, one_server_per_user)) } else { "–".to_owned() }
        });
        writeln!(table, "| {text} | {} |", cells.join(" | ")).unwrap();
    }
    for answer in [Answer::Fault(ServerFault::Bye), Answer::Fault(ServerFault::Closed)] {
        let cells = [true, false].map(|one_server_per_user| words(decide(answer, Point::Retried, one_server_per_user)));
        let (text, _) = row(answer);
        writeln!(table, "| after `BAD` to another form: {text} | – | {} | – |", cells.join(" | ")).unwrap();
    }
    table
}

#[test]
fn the_documentation_shows_this_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/server-answers.md");
    let text = fs::read_to_string(&path).unwrap();
    let shown: String = text
        .lines()
        .filter(|line| line.starts_with("| ") || line.starts_with("|-"))
        .map(|line| format!("{line}\n"))
        .collect();
    let expected = printed();
    assert!(shown.contains(&expected), "docs/server-answers.md must contain this table:\n{expected}");
}
