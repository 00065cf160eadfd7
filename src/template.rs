//! Texts with variables for the user name: `(mail=%{user})`, `user:%{local}:%{domain}`.
//!
//! Each source escapes the values by its own rules or sends them as bound parameters. A value is never inserted unescaped.

use std::fmt;

/// A text with variables, all of which are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(Variable),
}

/// A part of the user name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// The whole user name.
    User,
    /// The part before the last `@`; the whole name if there is none.
    Local,
    /// The part after the last `@`; empty if there is none.
    Domain,
}

impl Variable {
    const ALL: [(&'static str, Self); 3] = [("user", Self::User), ("local", Self::Local), ("domain", Self::Domain)];

    /// The value for `user`.
    pub fn of(self, user: &str) -> &str {
        match (self, user.rsplit_once('@')) {
            (Self::User, _) | (Self::Local, None) => user,
            (Self::Local, Some((local, _))) => local,
            (Self::Domain, Some((_, domain))) => domain,
            (Self::Domain, None) => "",
        }
    }
}

/// A variable with an unknown name, or without the closing `}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownVariable(String);

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown variable %{{{}}}: expected %{{user}}, %{{local}} or %{{domain}}", self.0)
    }
}

impl Template {
    /// Parses a template. `%` is an ordinary character unless `{` follows.
    ///
    /// # Errors
    /// A variable is unknown.
    pub fn new(text: &str) -> Result<Self, UnknownVariable> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("%{") {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let unknown = |name: &str| UnknownVariable(name.chars().take(30).collect());
            let (name, remainder) = after.split_once('}').ok_or_else(|| unknown(after))?;
            let known = Variable::ALL.into_iter().find(|(known, _)| *known == name);
            pieces.push(Piece::Variable(known.ok_or_else(|| unknown(name))?.1));
            rest = remainder;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The text for `user`, with values escaped by `escape`.
    pub fn fill<T: AsRef<str>>(&self, user: &str, escape: impl Fn(&str) -> T) -> String {
        let mut filled = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => filled.push_str(text),
                Piece::Variable(variable) => filled.push_str(escape(variable.of(user)).as_ref()),
            }
        }
        filled
    }

    /// The text with a placeholder for each variable, and the variables in order. The argument of `placeholder` is the number
    /// of variables before it.
    pub fn bind(&self, placeholder: impl Fn(usize) -> String) -> (String, Vec<Variable>) {
        let mut text = String::new();
        let mut variables = Vec::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(part) => text.push_str(part),
                Piece::Variable(variable) => {
                    text.push_str(&placeholder(variables.len()));
                    variables.push(*variable);
                }
            }
        }
        (text, variables)
    }

    /// Whether every variable is part of a value: after an `=` that follows the last of `separators`, as in `(mail=%{user})`.
    /// Elsewhere, such as in an attribute's name, the escaping rules for values do not apply.
    pub fn has_variables_in_values_only(&self, separators: &[char]) -> bool {
        let mut before = String::new();
        for piece in &self.0 {
            match piece {
                // An escaped separator does not end a value.
                Piece::Text(text) => before.push_str(&text.replace("\\,", "").replace("\\+", "")),
                Piece::Variable(_) => {
                    let start = before.rfind(separators).map_or(0, |at| at + 1);
                    if !before[start..].contains('=') {
                        return false;
                    }
                    before.push('_');
                }
            }
        }
        true
    }

    /// Whether the text is the same for every user.
    pub fn is_constant(&self) -> bool {
        !self.0.iter().any(|piece| matches!(piece, Piece::Variable(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_escapes_values_and_not_the_text() {
        let template = Template::new("100% (mail=%{user}) %{local}/%{domain}").unwrap();
        let escaped = template.fill("a(b@c@d", |value| value.replace('(', "\\28"));
        assert_eq!(escaped, "100% (mail=a\\28b@c@d) a\\28b@c/d");
        assert_eq!(template.fill("plain", str::to_owned), "100% (mail=plain) plain/");
    }

    #[test]
    fn variables_in_values_are_not_expanded() {
        let template = Template::new("%{user}").unwrap();
        assert_eq!(template.fill("%{domain}@x", str::to_owned), "%{domain}@x");
    }

    #[test]
    fn bind_numbers_the_placeholders() {
        let template = Template::new("SELECT '%' WHERE u = %{local} AND d = %{domain}").unwrap();
        let (text, variables) = template.bind(|before| format!("${}", before + 1));
        assert_eq!(text, "SELECT '%' WHERE u = $1 AND d = $2");
        assert_eq!(variables, [Variable::Local, Variable::Domain]);
        assert!(!template.is_constant());
        assert!(Template::new("plain").unwrap().is_constant());
    }

    #[test]
    fn variables_outside_of_values_are_detected() {
        let is_accepted =
            |text: &str, separators: &[char]| Template::new(text).unwrap().has_variables_in_values_only(separators);
        for filter in
            ["(&(a=b)(mail=%{user}))", "(mail=*%{local}.%{domain}*)", "(cn:dn:2.4.6:=%{user})", "(a=b)", "a=%{user}"]
        {
            assert!(is_accepted(filter, &['(', ')']), "{filter}");
        }
        for filter in ["%{user}", "(%{user}=b)", "(&(a=b)%{user})", "(&(a=b)(%{local}:=x))"] {
            assert!(!is_accepted(filter, &['(', ')']), "{filter}");
        }
        for base in ["ou=%{domain},dc=x", "cn=a\\,%{local},dc=x", "cn=%{local}+uid=%{local}", "dc=x"] {
            assert!(is_accepted(base, &[',', '+']), "{base}");
        }
        for base in ["%{user}", "ou=x,%{domain}", "cn=x+%{local},dc=x"] {
            assert!(!is_accepted(base, &[',', '+']), "{base}");
        }
    }

    #[test]
    fn unknown_variable_is_refused() {
        assert_eq!(
            Template::new("%{password}").unwrap_err().to_string(),
            "unknown variable %{password}: expected %{user}, %{local} or %{domain}"
        );
        assert!(Template::new("%{user").is_err());
    }
}
