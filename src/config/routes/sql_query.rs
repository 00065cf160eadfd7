//! Mistakes in an SQL query that can be seen without a database.
//!
//! `%{user}` becomes a bound parameter. Within quotes a database takes it for text, so that the query finds no user.

/// The first variable of `query` that is within quotes, as it is written. `backslash` escapes a quote in MySQL.
pub(super) fn quoted_variable(query: &str, backslash: bool) -> Option<&str> {
    let bytes = query.as_bytes();
    let mut quote = None;
    let mut at = 0;
    while at < bytes.len() {
        let rest = &query[at..];
        let step = match quote {
            None if rest.starts_with("--") || rest.starts_with('#') && backslash => end_of(rest, "\n"),
            None if rest.starts_with("/*") => end_of(rest, "*/"),
            None => {
                quote = Some(bytes[at]).filter(|byte| matches!(byte, b'\'' | b'"' | b'`'));
                1
            }
            Some(_) if rest.starts_with("%{") => return Some(&rest[..end_of(rest, "}")]),
            Some(_) if rest.starts_with('\\') && backslash => 2,
            Some(open) => {
                // A doubled quote closes and opens again, which comes to the same.
                if bytes[at] == open {
                    quote = None;
                }
                1
            }
        };
        at += step;
        while at < bytes.len() && !query.is_char_boundary(at) {
            at += 1;
        }
    }
    None
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
            assert_eq!(quoted_variable(query, false), found, "{query}");
        }
    }

    #[test]
    fn backslashes_escape_in_mysql_alone() {
        let query = r"SELECT 'it\'s' FROM u WHERE n = %{user}";
        assert_eq!(quoted_variable(query, true), None);
        assert_eq!(quoted_variable(query, false), Some("%{user}"), "the quote after s opens a text");
        assert_eq!(quoted_variable(r"SELECT '\\' , %{user}", true), None);
        assert_eq!(quoted_variable("SELECT '\\", true), None);
    }
}
