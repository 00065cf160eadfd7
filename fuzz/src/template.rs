//! Templates and the user names they are filled with. Every value is escaped and is never read as a part of the template; the text
//! around the values is what was written; the length is bounded by that of the template and the name.

use vestibule::template::Template;

/// Marks the beginning and the end of a value. Neither occurs in the input.
const MARKS: [char; 2] = ['\u{e000}', '\u{e001}'];

/// The template, a zero byte, and the user's name.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input).replace(MARKS, "");
    let (text, user) = text.split_once('\0').unwrap_or((&text, "alice@example.org"));
    let Ok(template) = Template::new(text) else {
        assert!(text.contains("%{"), "only a variable can be wrong");
        return;
    };
    let filled = template.fill(user, |value| format!("{}{}{}", MARKS[0], value.replace('%', "%25"), MARKS[1]));
    let (bound, variables) = template.bind(|before| format!("{}{before}{}", MARKS[0], MARKS[1]));
    let (around_filled, values) = taken_apart(&filled);
    let (around_bound, places) = taken_apart(&bound);
    assert_eq!(around_filled, around_bound, "the text around the values is the same");
    assert_eq!(places, (0..variables.len()).map(|place| place.to_string()).collect::<Vec<_>>());
    let expected: Vec<String> = variables.iter().map(|variable| variable.of(user).replace('%', "%25")).collect();
    assert_eq!(values, expected, "each value is escaped, and not read again");
    assert_eq!(template.is_constant(), variables.is_empty());
    let written: usize = around_filled.iter().map(|part| part.len()).sum();
    let unescaped = template.fill(user, str::to_owned);
    assert!(written <= text.len() && unescaped.len() <= text.len() + variables.len() * user.len(), "bounded");
    for variable in &variables {
        assert!(user.contains(variable.of(user)));
    }
}

/// The parts around the values, and the values.
fn taken_apart(text: &str) -> (Vec<&str>, Vec<&str>) {
    let mut parts = text.split(MARKS);
    let (mut around, mut values) = (Vec::new(), Vec::new());
    while let Some(part) = parts.next() {
        around.push(part);
        values.extend(parts.next());
    }
    (around, values)
}
