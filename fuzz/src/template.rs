//! Templates and the user names with which they are filled. Every value is escaped and is not parsed as a part of the template, the
//! text around the values is unchanged, and the size of the result is limited by the sizes of template and name. The same text is
//! the `to` of a regex route, in which a user name changes neither the number nor the names of the fields.

use std::path::Path;
use std::pin::pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use vestibule::config::{self, Config, RegexRule, Route};
use vestibule::metrics::{Metrics, Names};
use vestibule::route::{LookupRequest, RouteDecision, RouteError, Router, ServerChoice};
use vestibule::template::Template;

/// Marks of the beginning and the end of a value, which are removed from the input.
const MARKS: [char; 2] = ['\u{e000}', '\u{e001}'];

/// The input is a template, a zero byte and a user name.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input).replace(MARKS, "");
    let (text, user) = text.split_once('\0').unwrap_or((&text, "alice@example.org"));
    regex_target(text, user);
    let Ok(template) = Template::new(text) else {
        assert!(text.contains("%{"), "only variables can be invalid");
        return;
    };
    let filled = template.fill(user, |value| format!("{}{}{}", MARKS[0], value.replace('%', "%25"), MARKS[1]));
    let (bound, variables) = template.bind(|before| format!("{}{before}{}", MARKS[0], MARKS[1]));
    let (around_filled, values) = split_at_marks(&filled);
    let (around_bound, indexes) = split_at_marks(&bound);
    assert_eq!(around_filled, around_bound, "the text around the values is the same");
    assert_eq!(indexes, (0..variables.len()).map(|index| index.to_string()).collect::<Vec<_>>());
    let expected: Vec<String> = variables.iter().map(|variable| variable.of(user).replace('%', "%25")).collect();
    assert_eq!(values, expected, "each value is escaped and not parsed again");
    assert_eq!(template.is_constant(), variables.is_empty());
    let size: usize = around_filled.iter().map(|part| part.len()).sum();
    let unescaped = template.fill(user, str::to_owned);
    assert!(size <= text.len() && unescaped.len() <= text.len() + variables.len() * user.len(), "the size is limited");
    for variable in &variables {
        assert!(user.contains(variable.of(user)));
    }
}

/// A pattern whose groups are the whole name, its local part and its domain.
const PATTERN: &str = "(?s)^(.*?)(?:@(?<domain>.*))?$";

struct Regex {
    config: Config,
    metrics: Metrics,
}

static REGEX: LazyLock<Regex> = LazyLock::new(|| {
    let text = "listeners: [{address: '127.0.0.1:0', tls: none}]\n\
                backends: {shard-a: {servers: ['127.0.0.1:1']}, shard-b: {servers: ['127.0.0.1:2']}}\n\
                routes: [{regex: [{match: '', to: shard-a}]}]\n";
    let config = config::parse(Path::new("vestibule.yaml"), text).expect("the configuration is valid");
    let metrics = Metrics::new(&Names { routes: vec!["regex".to_owned()], ..Names::default() });
    Regex { config, metrics }
});

/// Looks up `user` and harmless users with the target `to`, and compares the fields of the results.
fn regex_target(to: &str, user: &str) {
    // Compiling a pattern is slow, and most texts contain no backend or no group.
    let first = to.split_whitespace().next().unwrap_or_default();
    let is_verdict = first.starts_with("refuse:") || first.starts_with("maintenance:");
    if !to.contains('$') || !(is_verdict || first.contains('$') || matches!(first, "shard-a" | "shard-b")) {
        return;
    }
    let Regex { config, metrics } = &*REGEX;
    let mut config = config.clone();
    let Some(Route::Regex(rules)) = config.routes.first_mut() else { unreachable!("the route is a regex") };
    let location = rules[0].location.clone();
    *rules = vec![RegexRule { pattern: PATTERN.to_owned(), to: to.to_owned(), location }];
    let Ok(router) = Router::build(&config, metrics, None) else { return };
    let fields = |user: &str| {
        let question = LookupRequest { user: user.into(), login_context: None };
        let Poll::Ready(routed) = pin!(router.route(&question, metrics)).poll(&mut Context::from_waker(Waker::noop()))
        else {
            unreachable!("a regex route does not wait")
        };
        match routed {
            Ok(routed) => match &*routed.decision {
                RouteDecision::Destination(place) => {
                    Some(("place", place.server != ServerChoice::Any, place.user.is_some()))
                }
                RouteDecision::Refuse(_) => Some(("refuse", false, false)),
                RouteDecision::Maintenance(_) => Some(("maintenance", false, false)),
                other => panic!("a regex cannot say {other:?}"),
            },
            Err(RouteError::Failed { reason, .. }) => {
                assert!(reason.len() < 600, "the size is limited: {reason}");
                None
            }
            Err(RouteError::Unknown) => None,
        }
    };
    for harmless in ["alice@example.org", "shard-a@shard-b", "a@shard-a"] {
        if let (Some(expected), Some(found)) = (fields(harmless), fields(user)) {
            assert_eq!(found, expected, "the user name changes no fields: {to:?} {user:?}");
        }
    }
}

/// Splits a text into the parts around the values, and the values.
fn split_at_marks(text: &str) -> (Vec<&str>, Vec<&str>) {
    let mut parts = text.split(MARKS);
    let (mut around, mut values) = (Vec::new(), Vec::new());
    while let Some(part) = parts.next() {
        around.push(part);
        values.extend(parts.next());
    }
    (around, values)
}
