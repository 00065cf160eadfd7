//! Mistakes in an SQL query that can be seen without a database.
//!
//! `%{user}` becomes a bound parameter. Within quotes a database takes it for text, so that the query finds no user.

/// How a database writes text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Backslashes escape only after `E`; `$tag$` quotes, too.
    Postgres,
    /// Backslashes escape. `#` begins a comment.
    MySql,
    /// Nothing but quotes.
    Sqlite,
}

/// The first variable of `query` that is within quotes, as it is written.
pub(super) fn quoted_variable(query: &str, syntax: Syntax) -> Option<&str> {
    let mut at = 0;
    while at < query.len() {
        let (before, rest) = query.split_at(at);
        let mut is_text = false;
        at += match rest.as_bytes()[0] {
            b'-' if rest.starts_with("--") => end_of(rest, "\n"),
            b'#' if syntax == Syntax::MySql => end_of(rest, "\n"),
            b'/' if rest.starts_with("/*") => comment_length(rest, syntax == Syntax::Postgres),
            quote @ (b'\'' | b'"' | b'`') => {
                is_text = true;
                let escapes = match syntax {
                    Syntax::Postgres => quote == b'\'' && is_escape_string(before),
                    Syntax::MySql => true,
                    Syntax::Sqlite => false,
                };
                quoted_length(rest, quote, escapes)
            }
            b'$' if syntax == Syntax::Postgres && !ends_in_word(before) => dollar_tag(rest).map_or(1, |tag| {
                is_text = true;
                tag.len() + end_of(&rest[tag.len()..], tag)
            }),
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
        let quoted = &query[before.len()..at];
        if is_text && let Some(start) = quoted.find("%{") {
            return Some(&quoted[start..start + end_of(&quoted[start..], "}")]);
        }
    }
    None
}

/// The length of the comment at the start of `text`. Comments may be nested in PostgreSQL.
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

/// The length of the quoted text at the start of `text`, both quotes included. A doubled quote ends one text and begins
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

/// Whether a quote after `before` begins a text with escapes: `E'…'`, where the E is a word of its own.
fn is_escape_string(before: &str) -> bool {
    before.strip_suffix(['E', 'e']).is_some_and(|before| !ends_in_word(before))
}

/// Whether the last character of `text` belongs to a name or a number.
fn ends_in_word(text: &str) -> bool {
    text.ends_with(|last: char| last.is_alphanumeric() || matches!(last, '_' | '$'))
}

/// The tag of a dollar-quoted text at the start of `text`: `$$` or `$name$`.
fn dollar_tag(text: &str) -> Option<&str> {
    let name = text[1..].split('$').next()?;
    let is_name = !name.starts_with(|first: char| first.is_ascii_digit())
        && name.chars().all(|letter| letter.is_alphanumeric() || letter == '_');
    text.get(..name.len() + 2).filter(|_| is_name)
}

/// The length of `text` up to the end of `end`, or all of it.
fn end_of(text: &str, end: &str) -> usize {
    text.find(end).map_or(text.len(), |at| at + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_in_quotes_are_found() {
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
    fn backslashes_escape_in_mysql_alone() {
        let query = r"SELECT 'it\'s' FROM u WHERE n = %{user}";
        assert_eq!(quoted_variable(query, Syntax::MySql), None);
        assert_eq!(quoted_variable(query, Syntax::Sqlite), Some("%{user}"), "the quote after s opens a text");
        assert_eq!(quoted_variable(r"SELECT '\\' , %{user}", Syntax::MySql), None);
        assert_eq!(quoted_variable("SELECT '\\", Syntax::MySql), None);
    }

    #[test]
    fn texts_with_escapes_and_dollar_quotes_of_postgresql_are_recognised() {
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
