//! Route by regular expressions, in time linear to the name's length whatever the pattern. The first that matches wins.

use std::sync::Arc;

use regex::Regex;

use super::Answer;
use super::directory::answer;
use super::target::{Declared, Target};
use crate::config::{Config, Problem, RegexRule};

/// Rules in order.
#[derive(Debug)]
pub(super) struct Rules {
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
    Fixed(Arc<Target>),
    /// Depends on what was caught.
    Expanded(Box<str>),
}

impl Rules {
    /// # Errors
    /// Patterns that are none, groups that do not exist, and fixed targets that are wrong.
    pub(super) fn build(config: &Config, rules: &[RegexRule], declared: &Declared) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut built = Vec::new();
        for rule in rules {
            match Rule::build(rule, declared) {
                Ok(rule) => built.push(rule),
                Err(message) => problems.push(config.problem(&rule.place, message)),
            }
        }
        let rules = Self { rules: built, declared: declared.clone() };
        if problems.is_empty() { Ok(rules) } else { Err(problems) }
    }

    /// A name that no rule matches is unknown; one whose target is wrong fails.
    pub(super) fn lookup(&self, user: &str) -> Answer {
        for rule in &self.rules {
            let Some(caught) = rule.pattern.captures(user) else { continue };
            return match &rule.to {
                To::Fixed(target) => Answer::Found(target.clone()),
                To::Expanded(to) => {
                    let mut text = String::new();
                    caught.expand(to, &mut text);
                    answer(self.declared.text(&text))
                }
            };
        }
        Answer::Unknown
    }

    /// Number of rules.
    pub(super) fn len(&self) -> usize {
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
            groups_exist(&pattern, &rule.to)?;
            To::Expanded(rule.to.as_str().into())
        } else {
            To::Fixed(declared.text(&rule.to)?.ok_or("`to` is empty")?.into())
        };
        Ok(Self { pattern, to })
    }
}

/// A group that does not exist would silently be nothing.
fn groups_exist(pattern: &Regex, to: &str) -> Result<(), String> {
    let to = to.replace("$$", "");
    for part in to.split('$').skip(1) {
        let name = match part.strip_prefix('{') {
            Some(rest) => rest.split_once('}').ok_or("${ without }")?.0,
            None => part.split(|char: char| !char.is_ascii_alphanumeric() && char != '_').next().unwrap_or_default(),
        };
        let known = match name.parse::<usize>() {
            Ok(number) => number < pattern.captures_len(),
            Err(_) => pattern.capture_names().flatten().any(|known| known == name),
        };
        if !known {
            return Err(format!("the pattern has no group {name:?}: write ${{1}} where letters follow a number"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackendId, Place};

    fn rule(pattern: &str, to: &str) -> Result<Rule, String> {
        let place = Place { line: 1, column: 1, key: String::new() };
        Rule::build(&RegexRule { pattern: pattern.into(), to: to.into(), place }, &declared())
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
            matches!(rules.lookup("root@example.org"), Answer::Found(target) if matches!(*target, Target::Refuse(_)))
        );
        let Answer::Found(target) = rules.lookup("bob-1@x") else { panic!() };
        let Target::Place(place) = &*target else { panic!() };
        assert_eq!((place.backend, place.user.as_ref().unwrap().as_str()), (BackendId(1), "bob"));
        assert_eq!(rules.lookup("carol@example.org"), Answer::Found(Target::backend(BackendId(0)).into()));
        assert_eq!(rules.lookup("carol@exampleXorg"), Answer::Unknown);
        // A shard that is not declared is no reason to ask the next route.
        assert!(matches!(rules.lookup("bob-7@x"), Answer::Failed(reason) if reason.contains("shard-7")));
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
        ] {
            let error = rule(pattern, to).unwrap_err();
            assert!(error.contains(part), "{pattern} {to}: {error}");
        }
        assert!(rule("(?<a>a)", "shard-${a}$1 user=$$").is_ok());
    }

    #[test]
    fn a_hostile_name_costs_little() {
        let rules = rules(&[("^(a+)+$", "shard-0")]);
        assert_eq!(rules.lookup(&("a".repeat(500) + "!")), Answer::Unknown);
    }
}
