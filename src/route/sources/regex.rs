//! Route by regular expressions, in time linear to the name's length whatever the pattern. The first that matches wins.
//!
//! The syntax of `to` is read when the configuration is loaded; a lookup fills the groups of the match into the values of its
//! fields. What a user name holds is therefore always a part of one value.

use std::sync::Arc;

use regex::{Captures, Regex};

use crate::config::{Problem, RegexRule};
use crate::route::LookupResult;
use crate::route::decision::{Declared, RouteDecision, named_values};

/// Rules in order.
#[derive(Debug)]
pub(in crate::route) struct Rules {
    rules: Vec<Rule>,
    declared: Declared,
}

#[derive(Debug)]
struct Rule {
    pattern: Regex,
    to: To,
}

#[derive(Debug)]
enum To {
    /// The same for all that match.
    Fixed(Arc<RouteDecision>),
    /// Fields by name, filled from the groups of the match.
    Expanded(Vec<(&'static str, Expansion)>),
}

/// The value of one field.
#[derive(Debug)]
struct Expansion(Vec<Piece>);

#[derive(Debug)]
enum Piece {
    Text(Box<str>),
    /// By its number in the pattern.
    Group(usize),
}

impl Rules {
    /// # Errors
    /// Patterns that are none, groups that do not exist, and fixed targets that are wrong.
    pub(in crate::route) fn build(rules: &[RegexRule], declared: &Declared) -> Result<Self, Vec<Problem>> {
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

    /// A name that no rule matches is unknown; one whose target is wrong fails.
    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        for rule in &self.rules {
            let Some(caught) = rule.pattern.captures(user) else { continue };
            return match &rule.to {
                To::Fixed(target) => LookupResult::Found(target.clone()),
                To::Expanded(fields) => {
                    let filled: Vec<_> = fields.iter().map(|(name, value)| (*name, value.fill(&caught))).collect();
                    let values: Vec<_> = filled.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    LookupResult::from(self.declared.values(&values))
                }
            };
        }
        LookupResult::Unknown
    }

    /// Number of rules.
    pub(in crate::route) fn len(&self) -> usize {
        self.rules.len()
    }
}

impl Rule {
    fn build(rule: &RegexRule, declared: &Declared) -> Result<Self, String> {
        // The crate's own text draws the pattern over several lines; its last says what is wrong.
        let pattern = Regex::new(&rule.pattern).map_err(|error| {
            let text = error.to_string();
            format!("the pattern cannot be read: {}", text.lines().last().unwrap_or_default().trim())
        })?;
        let to = if rule.to.contains('$') {
            To::Expanded(expansions(&pattern, &rule.to, declared)?)
        } else {
            To::Fixed(declared.text(&rule.to)?.ok_or("`to` is empty")?.into())
        };
        Ok(Self { pattern, to })
    }
}

/// # Errors
/// Invalid syntax, a group that does not exist, or an undeclared backend whose name does not depend on the match.
fn expansions(pattern: &Regex, to: &str, declared: &Declared) -> Result<Vec<(&'static str, Expansion)>, String> {
    let mut fields = Vec::new();
    for (name, value) in named_values(to)? {
        let expansion = Expansion::new(pattern, value)?;
        if let ("backend", Some(backend)) = (name, expansion.constant()) {
            declared.backend(backend)?;
        }
        fields.push((name, expansion));
    }
    Ok(fields)
}

impl Expansion {
    /// Reads `$1`, `${name}`, and `$$` for a dollar sign.
    ///
    /// # Errors
    /// A group that does not exist: it would silently be empty.
    fn new(pattern: &Regex, text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            pieces.push(Piece::Text(before.into()));
            if let Some(behind) = after.strip_prefix('$') {
                pieces.push(Piece::Text("$".into()));
                rest = behind;
                continue;
            }
            let (name, behind) = match after.strip_prefix('{') {
                Some(braced) => braced.split_once('}').ok_or("${ without }")?,
                None => {
                    let is_name = |char: char| char.is_ascii_alphanumeric() || char == '_';
                    after.split_at(after.find(|char| !is_name(char)).unwrap_or(after.len()))
                }
            };
            pieces.push(Piece::Group(group(pattern, name)?));
            rest = behind;
        }
        pieces.push(Piece::Text(rest.into()));
        pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
        Ok(Self(pieces))
    }

    /// The value, if it is the same for every match.
    fn constant(&self) -> Option<&str> {
        match &self.0[..] {
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The value for a match. A group that took no part in it is empty.
    fn fill(&self, caught: &Captures<'_>) -> String {
        let pieces = self.0.iter().map(|piece| match piece {
            Piece::Text(text) => &**text,
            Piece::Group(number) => caught.get(*number).map_or("", |group| group.as_str()),
        });
        pieces.collect()
    }
}

/// The number of a group, by its number or name.
fn group(pattern: &Regex, name: &str) -> Result<usize, String> {
    let is_number = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let number = match is_number {
        true => name.parse().ok().filter(|number| *number < pattern.captures_len()),
        false => pattern.capture_names().position(|known| known == Some(name)),
    };
    number.ok_or_else(|| format!("the pattern has no group {name:?}: write ${{1}} where letters follow a number"))
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

    fn declared() -> Declared {
        Declared::named(["shard-0", "shard-1"])
    }

    fn rules(list: &[(&str, &str)]) -> Rules {
        let rules = list.iter().map(|(pattern, to)| rule(pattern, to).unwrap()).collect();
        Rules { rules, declared: declared() }
    }

    #[test]
    fn the_first_match_wins_and_captures_fill_in() {
        let rules = rules(&[
            ("^root@", "refuse: Not here."),
            (r"^(\w+)-(?<digit>\d)@", "shard-${digit} user=$1"),
            (r"@example\.org$", "shard-0"),
        ]);
        assert!(
            matches!(rules.lookup("root@example.org"), LookupResult::Found(target) if matches!(*target, RouteDecision::Refuse(_)))
        );
        let LookupResult::Found(target) = rules.lookup("bob-1@x") else { panic!() };
        let RouteDecision::Destination(place) = &*target else { panic!() };
        assert_eq!((place.backend, place.user.as_ref().unwrap().as_str()), (BackendId(1), "bob"));
        assert_eq!(rules.lookup("carol@example.org"), LookupResult::Found(RouteDecision::backend(BackendId(0)).into()));
        assert_eq!(rules.lookup("carol@exampleXorg"), LookupResult::Unknown);
        // A shard that is not declared is no reason to ask the next route.
        assert!(matches!(rules.lookup("bob-7@x"), LookupResult::Failed(reason) if reason.contains("shard-7")));
    }

    #[test]
    fn mistakes_are_told_when_it_is_built() {
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
    fn a_captured_text_is_a_value_and_never_a_field() {
        let rules = rules(&[
            ("(?s)^plain-(.*)@x$", "shard-0 user=$1"),
            ("(?s)^both-(.*)/(.*)@x$", "shard-0 server=$1 user=$2"),
            ("^backend-(.*)@x$", "$1"),
            ("^verdict-(.*)@x$", "refuse: Sorry, $1"),
        ]);
        let place = |name: &str| match rules.lookup(name) {
            LookupResult::Found(target) => match &*target {
                RouteDecision::Destination(place) => place.clone(),
                other => panic!("{name}: {other:?}"),
            },
            other => panic!("{name}: {other:?}"),
        };
        for value in
            ["a=b", "server=y", "*)(uid=*", "a'OR'1'='1", "$1", "${1}", "%{user}", "\"q\"", "zo\u{eb}", "refuse:x"]
        {
            let (plain, both) = (place(&format!("plain-{value}@x")), place(&format!("both-s:1/{value}@x")));
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
    fn a_hostile_name_costs_little() {
        let rules = rules(&[("^(a+)+$", "shard-0")]);
        assert_eq!(rules.lookup(&("a".repeat(500) + "!")), LookupResult::Unknown);
    }
}
