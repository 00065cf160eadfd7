//! Routes by regular expressions; the first that matches decides. Matching takes time linear in the length of the name, whatever the pattern.
//!
//! The syntax of `to` is parsed when the configuration is loaded; a lookup inserts the groups of the match into the values of its
//! fields. The content of a user name is therefore always part of a value.

use std::sync::Arc;

use regex::{Captures, Regex};

use crate::config::{Problem, RegexRule};
use crate::route::LookupResult;
use crate::route::answer::{DeclaredBackends, named_values};
use crate::route::decision::RouteDecision;

/// The rules, in order.
#[derive(Debug)]
pub(in crate::route) struct Rules {
    rules: Vec<Rule>,
    declared: DeclaredBackends,
}

#[derive(Debug)]
struct Rule {
    pattern: Regex,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    /// The same decision for all matching users.
    Fixed(Arc<RouteDecision>),
    /// Names of fields and their values, which depend on the match.
    Expanded(Vec<(&'static str, Expansion)>),
}

/// The value of one field.
#[derive(Debug)]
struct Expansion(Vec<Piece>);

#[derive(Debug)]
enum Piece {
    Text(Box<str>),
    /// Number of a group in the pattern.
    Group(usize),
}

impl Rules {
    /// # Errors
    /// Invalid patterns, unknown groups, and invalid answers that do not depend on the match.
    pub(in crate::route) fn build(rules: &[RegexRule], declared: &DeclaredBackends) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut built = Vec::new();
        for rule in rules {
            match Rule::build(rule, declared) {
                Ok(rule) => built.push(rule),
                Err(message) => problems.push(rule.location.problem(message)),
            }
        }
        let rules = Self { rules: built, declared: declared.clone() };
        if problems.is_empty() { Ok(rules) } else { Err(problems) }
    }

    /// A user name that no rule matches is unknown; if the expanded answer is invalid, the lookup fails.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        for rule in &self.rules {
            let Some(captures) = rule.pattern.captures(user) else { continue };
            return match &rule.outcome {
                Outcome::Fixed(decision) => LookupResult::Found(decision.clone()),
                Outcome::Expanded(fields) => {
                    let filled: Vec<_> = fields.iter().map(|(name, value)| (*name, value.fill(&captures))).collect();
                    let values: Vec<_> = filled.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    LookupResult::from(self.declared.check_values(&values))
                }
            };
        }
        LookupResult::Unknown
    }

    pub(in crate::route) fn len(&self) -> usize {
        self.rules.len()
    }
}

impl Rule {
    fn build(rule: &RegexRule, declared: &DeclaredBackends) -> Result<Self, String> {
        // The message of the library quotes the pattern over several lines; its last line contains the reason.
        let pattern = Regex::new(&rule.pattern).map_err(|error| {
            let text = error.to_string();
            format!("invalid pattern: {}", text.lines().last().unwrap_or_default().trim())
        })?;
        let outcome = if rule.to.contains('$') {
            Outcome::Expanded(parse_expansions(&pattern, &rule.to, declared)?)
        } else {
            Outcome::Fixed(declared.check_text(&rule.to)?.ok_or("`to` is empty")?.into())
        };
        Ok(Self { pattern, outcome })
    }
}

/// Parses `to` into the values of its fields.
///
/// # Errors
/// Invalid syntax, a group that does not exist, or an undeclared backend whose name does not depend on the match.
fn parse_expansions(
    pattern: &Regex,
    to: &str,
    declared: &DeclaredBackends,
) -> Result<Vec<(&'static str, Expansion)>, String> {
    let mut fields = Vec::new();
    for (name, value) in named_values(to)? {
        let expansion = Expansion::new(pattern, value)?;
        if let ("backend", Some(backend)) = (name, expansion.constant()) {
            declared.find(backend)?;
        }
        fields.push((name, expansion));
    }
    Ok(fields)
}

impl Expansion {
    /// Parses a value with `$1`, `${name}`, and `$$` for a dollar sign.
    ///
    /// # Errors
    /// An unknown group, which would always be empty.
    fn new(pattern: &Regex, text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            pieces.push(Piece::Text(before.into()));
            if let Some(rest_after) = after.strip_prefix('$') {
                pieces.push(Piece::Text("$".into()));
                rest = rest_after;
                continue;
            }
            let (name, rest_after) = match after.strip_prefix('{') {
                Some(braced) => braced.split_once('}').ok_or("${ without }")?,
                None => {
                    let is_name = |char: char| char.is_ascii_alphanumeric() || char == '_';
                    after.split_at(after.find(|char| !is_name(char)).unwrap_or(after.len()))
                }
            };
            pieces.push(Piece::Group(group(pattern, name)?));
            rest = rest_after;
        }
        pieces.push(Piece::Text(rest.into()));
        pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
        Ok(Self(pieces))
    }

    /// The value, if it does not depend on the match.
    fn constant(&self) -> Option<&str> {
        match &self.0[..] {
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The value for a match. A group that did not participate is empty.
    fn fill(&self, captures: &Captures<'_>) -> String {
        let pieces = self.0.iter().map(|piece| match piece {
            Piece::Text(text) => &**text,
            Piece::Group(number) => captures.get(*number).map_or("", |group| group.as_str()),
        });
        pieces.collect()
    }
}

/// Finds the number of a group by its number or name.
fn group(pattern: &Regex, name: &str) -> Result<usize, String> {
    let is_number = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let number = match is_number {
        true => name.parse().ok().filter(|number| *number < pattern.captures_len()),
        false => pattern.capture_names().position(|known| known == Some(name)),
    };
    number.ok_or_else(|| format!("the pattern has no group {name:?}: write ${{1}} if letters follow the number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackendId, Location};
    use crate::route::decision::ServerChoice;

    fn rule(pattern: &str, to: &str) -> Result<Rule, String> {
        let location = Location::of_file(std::path::Path::new("v.yaml"));
        Rule::build(&RegexRule { pattern: pattern.into(), to: to.into(), location }, &declared())
    }

    fn declared() -> DeclaredBackends {
        DeclaredBackends::named(["shard-0", "shard-1"])
    }

    fn rules(list: &[(&str, &str)]) -> Rules {
        let rules = list.iter().map(|(pattern, to)| rule(pattern, to).unwrap()).collect();
        Rules { rules, declared: declared() }
    }

    #[test]
    fn first_match_decides_and_groups_are_inserted() {
        let rules = rules(&[
            ("^root@", "refuse: Not here."),
            (r"^(\w+)-(?<digit>\d)@", "shard-${digit} user=$1"),
            (r"@example\.org$", "shard-0"),
        ]);
        assert!(
            matches!(rules.lookup("root@example.org"), LookupResult::Found(decision) if matches!(*decision, RouteDecision::Refuse(_)))
        );
        let LookupResult::Found(decision) = rules.lookup("bob-1@x") else { panic!() };
        let RouteDecision::Destination(destination) = &*decision else { panic!() };
        assert_eq!((destination.backend, destination.user.as_ref().unwrap().as_str()), (BackendId(1), "bob"));
        assert_eq!(rules.lookup("carol@example.org"), LookupResult::Found(RouteDecision::backend(BackendId(0)).into()));
        assert_eq!(rules.lookup("carol@exampleXorg"), LookupResult::Unknown);
        // An undeclared backend fails the lookup: the next route must not be used.
        assert!(matches!(rules.lookup("bob-7@x"), LookupResult::Failed(reason) if reason.contains("shard-7")));
    }

    #[test]
    fn invalid_rules_are_errors_when_loading() {
        for (pattern, to, part) in [
            ("(", "shard-0", "unclosed group"),
            ("a", "shard-9", "shard-0, shard-1"),
            ("a", "", "empty"),
            ("(a)", "shard-$2", "no group \"2\""),
            ("(a)", "shard-$1x", "no group \"1x\""),
            ("(?<a>a)", "shard-${b}", "no group \"b\""),
            ("(?<a>a)", "shard-${a", "${ without }"),
            ("(?<ab>a)", "shard-$a$$b", "no group \"a\""),
            ("(a)", "shard-${+1}", "no group \"+1\""),
            ("(a)", "shard-9 user=$1", "shard-0, shard-1"),
            ("(a)", "shard-0 $1", "expected server=HOST:PORT"),
            ("(a)", "shard-0 $1=x", "expected server=HOST:PORT"),
            ("(a)", "$1: text", "expected server=HOST:PORT"),
        ] {
            let error = rule(pattern, to).unwrap_err();
            assert!(error.contains(part), "{pattern} {to}: {error}");
        }
        assert!(rule("(?<a>a)", "shard-${a}$1 user=$$").is_ok());
    }

    #[test]
    fn captured_text_is_a_value_and_never_a_field() {
        let rules = rules(&[
            ("(?s)^plain-(.*)@x$", "shard-0 user=$1"),
            ("(?s)^both-(.*)/(.*)@x$", "shard-0 server=$1 user=$2"),
            ("^backend-(.*)@x$", "$1"),
            ("^verdict-(.*)@x$", "refuse: Sorry, $1"),
        ]);
        let destination = |name: &str| match rules.lookup(name) {
            LookupResult::Found(decision) => match &*decision {
                RouteDecision::Destination(found) => found.clone(),
                other => panic!("{name}: {other:?}"),
            },
            other => panic!("{name}: {other:?}"),
        };
        for value in
            ["a=b", "server=y", "*)(uid=*", "a'OR'1'='1", "$1", "${1}", "%{user}", "\"q\"", "zo\u{eb}", "refuse:x"]
        {
            let (plain, both) = (destination(&format!("plain-{value}@x")), destination(&format!("both-s:1/{value}@x")));
            assert_eq!((plain.server, plain.user.unwrap().as_str()), (ServerChoice::Any, value));
            assert_eq!((both.server, both.user.unwrap().as_str()), (ServerChoice::Server("s:1".into()), value));
        }
        for value in ["u2@a.test server=OTHER", "x server=y", "a' OR '1'='1", "a\u{a0}b", "a\nb", "a\0b", "", " "] {
            let failed = rules.lookup(&format!("plain-{value}@x"));
            assert!(
                matches!(&failed, LookupResult::Failed(reason) if reason.contains("value of user")),
                "{value:?}: {failed:?}"
            );
            let failed = rules.lookup(&format!("both-{value}/u@x"));
            assert!(
                matches!(&failed, LookupResult::Failed(reason) if reason.contains("value of server")),
                "{value:?}: {failed:?}"
            );
        }
        for value in ["shard-0 user=root", "shard-0 server=y", "refuse: x", "shard-0 ", "shard-2"] {
            assert!(matches!(rules.lookup(&format!("backend-{value}@x")), LookupResult::Failed(_)), "{value:?}");
        }
        assert_eq!(rules.lookup("backend-@x"), LookupResult::Unknown);
        let long = rules.lookup(&format!("plain-{}@x", "u".repeat(513)));
        assert!(matches!(&long, LookupResult::Failed(reason) if reason.len() < 100), "{long:?}");
        let refused = rules.lookup("verdict-[ALERT] a maintenance: b@x");
        assert_eq!(
            refused,
            LookupResult::Found(RouteDecision::Refuse("Sorry, [ALERT] a maintenance: b".into()).into())
        );
    }

    #[test]
    fn hostile_name_is_matched_in_linear_time() {
        let rules = rules(&[("^(a+)+$", "shard-0")]);
        assert_eq!(rules.lookup(&("a".repeat(500) + "!")), LookupResult::Unknown);
    }
}
