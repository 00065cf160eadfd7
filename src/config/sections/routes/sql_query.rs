//! Finds variables within quotes in an SQL query, without a database.
//!
//! `%{user}` becomes a bound parameter. Within quotes, the database reads it as text, and the query finds no user.

/// Syntax of string literals of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Backslashes escape only after `E`; `$tag$` is a quote too.
    Postgres,
    /// Backslashes escape; `#` starts a comment.
    MySql,
    /// Backslashes do not escape.
    Sqlite,
}

/// The first variable of `query` that is within quotes, as written.
pub(super) fn quoted_variable(query: &str, syntax: Syntax) -> Option<&str> {
    let mut at = 0;
    while at < query.len() {
        let (before, rest) = query.split_at(at);
        let mut is_string = false;
        at += match rest.as_bytes()[0] {
            b'-' if rest.starts_with("--") => end_of(rest, "\n"),
            b'#' if syntax == Syntax::MySql => end_of(rest, "\n"),
            b'/' if rest.starts_with("/*") => comment_length(rest, syntax == Syntax::Postgres),
            quote @ (b'\'' | b'"' | b'`') => {
                is_string = true;
                let escapes = match syntax {
                    Syntax::Postgres => quote == b'\'' && is_escape_string(before),
                    Syntax::MySql => true,
                    Syntax::Sqlite => false,
                };
                quoted_length(rest, quote, escapes)
            }
            b'$' if syntax == Syntax::Postgres && !ends_in_word(before) => dollar_tag(rest).map_or(1, |tag| {
                is_string = true;
                tag.len() + end_of(&rest[tag.len()..], tag)
            }),
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
        let quoted = &query[before.len()..at];
        if is_string && let Some(start) = quoted.find("%{") {
            return Some(&quoted[start..start + end_of(&quoted[start..], "}")]);
        }
    }
    None
}

/// Length of the comment at the start of `text`. PostgreSQL allows nested comments.
fn comment_length(text: &str, nested: bool) -> usize {
    let mut at = 2;
    let mut depth = 1;
    while depth > 0 {
        let end = at + end_of(&text[at..], "*/");
        if nested && let Some(inner) = text[at..end].find("/*") {
            at += inner + 2;
            depth += 1;
        } else {
            at = end;
            depth -= 1;
        }
    }
    at
}

/// Length of the quoted string at the start of `text`, including both quotes. A doubled quote ends one string and starts
/// the next, which makes no difference here.
fn quoted_length(text: &str, quote: u8, escapes: bool) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\\' if escapes => at += 2,
            byte if *byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// Whether a quote after `before` starts a string with escapes: `E'…'`, if the E is a separate word.
fn is_escape_string(before: &str) -> bool {
    before.strip_suffix(['E', 'e']).is_some_and(|before| !ends_in_word(before))
}

/// Whether the last character of `text` belongs to a name or a number.
fn ends_in_word(text: &str) -> bool {
    text.ends_with(|last: char| last.is_alphanumeric() || matches!(last, '_' | '$'))
}

/// The tag of a dollar-quoted string at the start of `text`: `$$` or `$name$`.
fn dollar_tag(text: &str) -> Option<&str> {
    let name = text[1..].split('$').next()?;
    let is_name = !name.starts_with(|first: char| first.is_ascii_digit())
        && name.chars().all(|letter| letter.is_alphanumeric() || letter == '_');
    text.get(..name.len() + 2).filter(|_| is_name)
}

/// Length of `text` up to and including `end`, or of all of it.
fn end_of(text: &str, end: &str) -> usize {
    text.find(end).map_or(text.len(), |at| at + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_variable_is_found() {
        for (query, found) in [
            ("SELECT b FROM u WHERE n = '%{user}'", Some("%{user}")),
            ("SELECT b FROM u WHERE n = \"%{local}\"", Some("%{local}")),
            ("SELECT b FROM u WHERE n LIKE '%%{domain}'", Some("%{domain}")),
            ("SELECT 'it''s' FROM u WHERE n = '%{user}'", Some("%{user}")),
            ("SELECT b FROM u WHERE n = %{user} AND t = 'mail' AND d = %{domain}", None),
            ("SELECT 'it''s', \"a'b\" FROM u WHERE n = %{user}", None),
            ("SELECT b -- don't\nFROM u WHERE n = %{user} /* isn't */ AND d = %{domain}", None),
            ("SELECT 'gr\u{fc}n\u{20ac}' FROM u WHERE n = %{user}", None),
            ("SELECT '\u{20ac}%{user}", Some("%{user}")),
            ("'%{", Some("%{")),
        ] {
            assert_eq!(quoted_variable(query, Syntax::Sqlite), found, "{query}");
            assert_eq!(quoted_variable(query, Syntax::Postgres), found, "{query}");
        }
    }

    #[test]
    fn backslash_escapes_in_mysql_only() {
        let query = r"SELECT 'it\'s' FROM u WHERE n = %{user}";
        assert_eq!(quoted_variable(query, Syntax::MySql), None);
        assert_eq!(quoted_variable(query, Syntax::Sqlite), Some("%{user}"), "the quote after s starts a string");
        assert_eq!(quoted_variable(r"SELECT '\\' , %{user}", Syntax::MySql), None);
        assert_eq!(quoted_variable("SELECT '\\", Syntax::MySql), None);
    }

    #[test]
    fn escape_strings_and_dollar_quotes_of_postgresql_are_recognised() {
        for (query, found) in [
            (r"SELECT E'it\'s' FROM u WHERE n = %{user}", None),
            (r"SELECT e'it\'s', 'a' FROM u WHERE n = %{user}", None),
            (r"SELECT E'\\' FROM u WHERE n = %{user}", None),
            (r"SELECT E'\\', '%{user}'", Some("%{user}")),
            (r"SELECT E'it\'s %{user}'", Some("%{user}")),
            (r"SELECT b FROM u WHERE path LIKE 'a\' AND n = %{user}", None),
            (r"SELECT b FROM u WHERE name='\' AND n = %{user}", None),
            ("SELECT $$'$$ FROM u WHERE n = %{user}", None),
            ("SELECT $a$ $$ ' $b$ $a$, %{user}", None),
            ("SELECT $a$ %{user} $a$", Some("%{user}")),
            ("SELECT a$b$c, '%{user}', d$b$e", Some("%{user}")),
            ("SELECT $1, 'x$', %{user}", None),
            ("SELECT $", None),
            ("/* /* */ don't */ SELECT %{user}", None),
            ("/* /* */ '%{user}'", None),
            ("/* it's */ SELECT '%{user}'", Some("%{user}")),
            ("SELECT $\u{fc}$ ' $\u{fc}$, %{user}", None),
        ] {
            assert_eq!(quoted_variable(query, Syntax::Postgres), found, "{query}");
        }
    }
}
