use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::*;

const ANSWERS: [ServerAnswer; 5] = [
    ServerAnswer::Refusal,
    ServerAnswer::AccountClosed,
    ServerAnswer::Referral,
    ServerAnswer::Bad,
    ServerAnswer::EmptyContinuation,
];
const STAGES: [LoginStage; 5] = [
    LoginStage::BeforeLogin,
    LoginStage::LoginSent,
    LoginStage::LongPasswordSent,
    LoginStage::Retried,
    LoginStage::Challenged,
];

fn all_answers() -> impl Iterator<Item = ServerAnswer> {
    ANSWERS.into_iter().chain(ServerFault::ALL.iter().copied().map(ServerAnswer::Fault))
}

/// A verdict in the words of the documentation's table.
fn describe(verdict: Verdict) -> String {
    let action = match verdict.action {
        Action::Refuse(RefusalKind::FailedLogin) => "refused, counted",
        Action::Refuse(RefusalKind::NotCounted) => "refused, not counted",
        Action::FollowReferral => "referral",
        Action::TryAnotherServer => "next server",
        Action::GiveUp => "no other server",
        Action::TryAnotherForm => "next form",
        Action::Reconnect => "same server again",
    };
    match verdict.health {
        HealthEffect::Failure => format!("{action}; counts against the server"),
        HealthEffect::Success | HealthEffect::Unchanged => action.to_owned(),
    }
}

#[test]
fn verdicts_match_every_row_of_the_table() {
    use ServerFault::*;
    let fault = ServerAnswer::Fault;
    // Columns: before the login; after it with user-hash; after it with another balance; after a challenge.
    let counted = "next server; counts against the server";
    let table: &[(ServerAnswer, [&str; 4])] = &[
        (ServerAnswer::Refusal, ["refused, counted"; 4]),
        (ServerAnswer::AccountClosed, ["refused, not counted"; 4]),
        (ServerAnswer::Referral, ["referral"; 4]),
        (ServerAnswer::Bad, ["next form", "next form", "next form", "refused, counted"]),
        (ServerAnswer::EmptyContinuation, ["next form"; 4]),
        (fault(Unreachable), [counted, "no other server", "next server", "no other server"]),
        (fault(Silent), [counted, "no other server", "next server", "no other server"]),
        (fault(Crowded), ["no other server", "no other server", "next server", "no other server"]),
        (fault(Greeting), [counted, "no other server", "next server", "no other server"]),
        (fault(StartTlsNotOffered), [counted, "no other server", "next server", "no other server"]),
        (fault(StartTlsRefused), [counted, "no other server", "next server", "no other server"]),
        (fault(StartTlsResidue), [counted, "no other server", "next server", "no other server"]),
        (fault(LoginDisabled), [counted, "no other server", "next server", "no other server"]),
        (fault(AuthzidUnsupported), ["next server", "no other server", "next server", "no other server"]),
        (fault(MechanismUnsupported), ["next server", "no other server", "next server", "no other server"]),
        (fault(Protocol), [counted, "no other server", "next server", "no other server"]),
        (fault(TooMuchUntagged), [counted, "no other server", "next server", "no other server"]),
        (fault(Bye), [counted, "no other server", "next server", "no other server"]),
        (fault(Closed), [counted, "no other server", "next server", "no other server"]),
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
            decide(*answer, LoginStage::BeforeLogin, true),
            decide(*answer, LoginStage::LoginSent, true),
            decide(*answer, LoginStage::LoginSent, false),
            decide(*answer, LoginStage::Challenged, false),
        ];
        assert_eq!(columns.map(describe), *expected, "{answer:?}");
        assert_eq!(decide(*answer, LoginStage::LongPasswordSent, true), long_password(*answer, true), "{answer:?}");
        assert_eq!(decide(*answer, LoginStage::LongPasswordSent, false), long_password(*answer, false), "{answer:?}");
        let retried = decide(*answer, LoginStage::Retried, true);
        match answer {
            ServerAnswer::Fault(Bye | Closed) => assert_eq!(describe(retried), "same server again"),
            _ => assert_eq!(retried, decide(*answer, LoginStage::LoginSent, true), "{answer:?}"),
        }
    }
}

/// A server's reaction to an over-long password is a refusal; all other answers have their usual verdict.
fn long_password(answer: ServerAnswer, one_server_per_user: bool) -> Verdict {
    use ServerFault::*;
    match answer {
        ServerAnswer::Fault(Bye | Closed | Protocol | TooMuchUntagged | LoginBad) => {
            Verdict { action: Action::Refuse(RefusalKind::FailedLogin), health: HealthEffect::Unchanged }
        }
        _ => decide(answer, LoginStage::LoginSent, one_server_per_user),
    }
}

#[test]
fn overload_marks_no_server_as_failed_and_moves_no_user_of_user_hash() {
    let crowded = |one_server| decide(ServerAnswer::Fault(ServerFault::Crowded), LoginStage::BeforeLogin, one_server);
    assert_eq!((describe(crowded(true)), describe(crowded(false))), ("no other server".into(), "next server".into()));
}

#[test]
fn after_the_login_was_sent_no_answer_marks_a_server_as_failed_or_moves_a_user() {
    for answer in all_answers() {
        for stage in STAGES.into_iter().filter(|stage| *stage != LoginStage::BeforeLogin) {
            for one_server_per_user in [true, false] {
                let verdict = decide(answer, stage, one_server_per_user);
                assert_ne!(verdict.health, HealthEffect::Failure, "{answer:?} {stage:?}");
                if one_server_per_user {
                    assert_ne!(verdict.action, Action::TryAnotherServer, "{answer:?} {stage:?}");
                }
            }
        }
    }
}

#[test]
fn refusal_shows_that_the_server_works() {
    for answer in all_answers() {
        for stage in STAGES {
            let Verdict { action, health } = decide(answer, stage, false);
            // A close after a long password is a refusal for the client, but shows nothing about the server.
            let is_answer = stage != LoginStage::LongPasswordSent || !matches!(answer, ServerAnswer::Fault(_));
            if is_answer && matches!(action, Action::Refuse(_) | Action::FollowReferral) {
                assert_eq!(health, HealthEffect::Success, "{answer:?} {stage:?}");
            }
        }
    }
}

/// The stages at which an answer can occur.
#[derive(PartialEq)]
enum When {
    Before,
    After,
    Both,
}

/// An answer as the documentation describes it, and when it can occur.
fn row(answer: ServerAnswer) -> (String, When) {
    use ServerFault::*;
    let (text, when) = match answer {
        ServerAnswer::Refusal => {
            ("`NO` with no response code, or with any code that is not in this table", When::After)
        }
        ServerAnswer::AccountClosed => ("`NO [CONTACTADMIN]`", When::After),
        ServerAnswer::Referral => ("`NO [REFERRAL …]`", When::After),
        ServerAnswer::Bad => ("`BAD`", When::After),
        ServerAnswer::EmptyContinuation => ("`+` although the command carried the response", When::After),
        ServerAnswer::Fault(Overloaded) => {
            ("`NO [UNAVAILABLE]`, `[SERVERBUG]`, `[TEMPFAIL]`, or a text that means an outage", When::After)
        }
        ServerAnswer::Fault(UserLimit) => {
            ("`NO [LIMIT]`, `[INUSE]`, `[OVERQUOTA]`, or a text that means a limit of the user", When::After)
        }
        ServerAnswer::Fault(TlsRequired) => ("`NO [PRIVACYREQUIRED]`", When::After),
        ServerAnswer::Fault(LoginBad) => ("`BAD` to every form of the login", When::After),
        ServerAnswer::Fault(Bye) => ("`* BYE` instead of an answer", When::Both),
        ServerAnswer::Fault(fault @ TooManyChallenges) => (fault.as_str(), When::After),
        ServerAnswer::Fault(fault @ (Protocol | TooMuchUntagged | Closed | Timeout)) => (fault.as_str(), When::Both),
        ServerAnswer::Fault(fault) => (fault.as_str(), When::Before),
    };
    (text.to_owned(), when)
}

fn documented_table() -> String {
    let mut table =
        "| the server's answer | before the login was sent | after, `balance: user-hash` | after, other balance \
                     | after a challenge |\n|---|---|---|---|---|\n"
            .to_owned();
    for answer in all_answers().filter(|answer| *answer != ServerAnswer::Fault(ServerFault::Crowded)) {
        let (text, when) = row(answer);
        let columns = [
            (LoginStage::BeforeLogin, true),
            (LoginStage::LoginSent, true),
            (LoginStage::LoginSent, false),
            (LoginStage::Challenged, true),
        ];
        let cells = columns.map(|(stage, one_server_per_user)| {
            let shown = when == When::Both || (when == When::Before) == (stage == LoginStage::BeforeLogin);
            if shown { describe(decide(answer, stage, one_server_per_user)) } else { "–".to_owned() }
        });
        writeln!(table, "| {text} | {} |", cells.join(" | ")).unwrap();
    }
    for answer in [ServerAnswer::Fault(ServerFault::Bye), ServerAnswer::Fault(ServerFault::Closed)] {
        let cells =
            [true, false].map(|one_server_per_user| describe(decide(answer, LoginStage::Retried, one_server_per_user)));
        let (text, _) = row(answer);
        writeln!(table, "| after `BAD` to another form: {text} | – | {} | – |", cells.join(" | ")).unwrap();
    }
    let cells = [true, false].map(|one_server_per_user| {
        describe(decide(ServerAnswer::Fault(ServerFault::Crowded), LoginStage::BeforeLogin, one_server_per_user))
    });
    let (text, before) = (ServerFault::Crowded.as_str(), format!("`user-hash`: {}; else {}", cells[0], cells[1]));
    writeln!(table, "| {text} | {before} | – | – | – |").unwrap();
    let action_after_long_password = |answer: &ServerAnswer| decide(*answer, LoginStage::LongPasswordSent, true).action;
    for answer in all_answers().filter(|answer| {
        matches!(answer, ServerAnswer::Fault(_)) && matches!(action_after_long_password(answer), Action::Refuse(_))
    }) {
        let cells = [true, false]
            .map(|one_server_per_user| describe(decide(answer, LoginStage::LongPasswordSent, one_server_per_user)));
        let (text, _) = row(answer);
        writeln!(
            table,
            "| after a password of more than {LONG_PASSWORD} bytes: {text} | – | {} | – |",
            cells.join(" | ")
        )
        .unwrap();
    }
    table
}

#[test]
fn documentation_contains_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/server-answers.md");
    let text = fs::read_to_string(&path).unwrap();
    let shown: String = text
        .lines()
        .filter(|line| line.starts_with("| ") || line.starts_with("|-"))
        .map(|line| format!("{line}\n"))
        .collect();
    let expected = documented_table();
    assert!(shown.contains(&expected), "docs/server-answers.md must contain this table:\n{expected}");
}
