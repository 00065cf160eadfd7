//! Texts with places for the user's name: `(mail=%{user})`, `user:%{local}:%{domain}`.
//!
//! Every source escapes what is filled in by its own rules, or hands it over as a bound parameter; nothing is ever
//! pasted in as it is. Read by `config`, filled by the sources of `route`.

use std::fmt;

/// A checked template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(Variable),
}

/// What can be filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// The whole routing name.
    User,
    /// What stands before the last `@`; the whole name where there is none.
    Local,
    /// What follows the last `@`; nothing where there is none.
    Domain,
}

impl Variable {
    const ALL: [(&'static str, Self); 3] = [("user", Self::User), ("local", Self::Local), ("domain", Self::Domain)];

    /// Its value for `user`.
    pub fn of(self, user: &str) -> &str {
        match (self, user.rsplit_once('@')) {
            (Self::User, _) | (Self::Local, None) => user,
            (Self::Local, Some((local, _))) => local,
            (Self::Domain, Some((_, domain))) => domain,
            (Self::Domain, None) => "",
        }
    }
}

/// `%{` without `}`, or with another name than those that can be filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownVariable(String);

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{{{}}} is not known; known: %{{user}}, %{{local}}, %{{domain}}", self.0)
    }
}

impl Template {
    /// Reads a template. `%` means something only before `{`.
    ///
    /// # Errors
    /// A variable that does not exist.
    pub fn new(text: &str) -> Result<Self, UnknownVariable> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("%{") {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let unknown = |name: &str| UnknownVariable(name.chars().take(30).collect());
            let (name, behind) = after.split_once('}').ok_or_else(|| unknown(after))?;
            let known = Variable::ALL.into_iter().find(|(known, _)| *known == name);
            pieces.push(Piece::Variable(known.ok_or_else(|| unknown(name))?.1));
            rest = behind;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The text for `user`, each value passed through `escape`.
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

    /// The text with a placeholder for each variable (`placeholder` is told how many came before), and the variables in
    /// their order.
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

    /// Whether every variable is a part of a value: after an `=` that follows the last of `separators`, as in `(mail=%{user})`. In
    /// other places, such as the name of an attribute, the rules for escaping values do not apply.
    pub fn has_variables_in_values_only(&self, separators: &[char]) -> bool {
        let mut before = String::new();
        for piece in &self.0 {
            match piece {
                // An escaped separator separates nothing.
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

    /// Whether it says the same for every user.
    pub fn is_constant(&self) -> bool {
        !self.0.iter().any(|piece| matches!(piece, Piece::Variable(_)))
    }

    /// Whether a name without `@` leaves a gap in it.
    pub fn needs_domain(&self) -> bool {
        self.0.contains(&Piece::Variable(Variable::Domain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_escaped_and_text_is_not() {
        let template = Template::new("100% (mail=%{user}) %{local}/%{domain}").unwrap();
        let escaped = template.fill("a(b@c@d", |value| value.replace('(', "\\28"));
        assert_eq!(escaped, "100% (mail=a\\28b@c@d) a\\28b@c/d");
        assert_eq!(template.fill("plain", str::to_owned), "100% (mail=plain) plain/");
    }

    #[test]
    fn what_is_filled_in_is_not_read_again() {
        let template = Template::new("%{user}").unwrap();
        assert_eq!(template.fill("%{domain}@x", str::to_owned), "%{domain}@x");
    }

    #[test]
    fn placeholders_count() {
        let template = Template::new("SELECT '%' WHERE u = %{local} AND d = %{domain}").unwrap();
        let (text, variables) = template.bind(|before| format!("${}", before + 1));
        assert_eq!(text, "SELECT '%' WHERE u = $1 AND d = $2");
        assert_eq!(variables, [Variable::Local, Variable::Domain]);
        assert!(template.needs_domain() && !template.is_constant());
        assert!(Template::new("plain").unwrap().is_constant());
    }

    #[test]
    fn variables_outside_of_values_are_noticed() {
        let is_good =
            |text: &str, separators: &[char]| Template::new(text).unwrap().has_variables_in_values_only(separators);
        for filter in
            ["(&(a=b)(mail=%{user}))", "(mail=*%{local}.%{domain}*)", "(cn:dn:2.4.6:=%{user})", "(a=b)", "a=%{user}"]
        {
            assert!(is_good(filter, &['(', ')']), "{filter}");
        }
        for filter in ["%{user}", "(%{user}=b)", "(&(a=b)%{user})", "(&(a=b)(%{local}:=x))"] {
            assert!(!is_good(filter, &['(', ')']), "{filter}");
        }
        for base in ["ou=%{domain},dc=x", "cn=a\\,%{local},dc=x", "cn=%{local}+uid=%{local}", "dc=x"] {
            assert!(is_good(base, &[',', '+']), "{base}");
        }
        for base in ["%{user}", "ou=x,%{domain}", "cn=x+%{local},dc=x"] {
            assert!(!is_good(base, &[',', '+']), "{base}");
        }
    }

    #[test]
    fn unknown_variables_are_named() {
        assert_eq!(
            Template::new("%{password}").unwrap_err().to_string(),
            "%{password} is not known; known: %{user}, %{local}, %{domain}"
        );
        assert!(Template::new("%{user").is_err());
    }
}
