//! Route by DNS: a TXT record that names the backend, or an SRV record whose target has a name here.
//!
//! No such name, and no such record, mean an unknown user; all else that is no answer is a failure. A user name that
//! cannot stand in a DNS name is unknown without a question, and so is one with labels of its own that begin with `_`.

use std::cell::Cell;

use hickory_resolver::TokioResolver;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RData;
use tokio::sync::OnceCell;

use crate::config::{self, Config, DnsQuery};
use crate::lookup::dns;
use crate::route::LookupResult;
use crate::route::decision::{Declared, Fields};
use crate::route::request::LookupRequest;
use crate::template::Template;

/// RFC 1035 section 2.3.4.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// A question a user.
#[derive(Debug)]
pub(in crate::route) struct Dns {
    query: DnsQuery,
    resolver: config::ResolverConfig,
    /// Made on the runtime that asks.
    connected: OnceCell<TokioResolver>,
    declared: Declared,
}

impl Dns {
    pub(in crate::route) fn new(config: &Config, dns: &config::Dns, declared: &Declared) -> Self {
        let mut resolver = config.resolver.clone();
        if !dns.servers.is_empty() {
            resolver.servers.clone_from(&dns.servers);
        }
        let declared = declared.clone().with_names(&dns.lookup.names);
        Self { query: dns.query.clone(), resolver, connected: OnceCell::new(), declared }
    }

    pub(in crate::route) async fn ask(&self, question: &LookupRequest) -> LookupResult {
        let (DnsQuery::Txt(template) | DnsQuery::Srv(template)) = &self.query;
        let Some(name) = filled(template, &question.user) else { return LookupResult::Unknown };
        let connect = || async { dns::resolver(&self.resolver.servers, self.resolver.timeout) };
        let resolver = match self.connected.get_or_try_init(connect).await {
            Ok(resolver) => resolver,
            Err(error) => return LookupResult::Failed(error),
        };
        // The dot at the end keeps the system's search domains out.
        let name = format!("{name}.");
        match &self.query {
            DnsQuery::Txt(_) => match resolver.txt_lookup(name).await {
                Ok(found) => self.text(found.answers().iter().map(|record| &record.data)),
                Err(error) => no_answer(&error),
            },
            DnsQuery::Srv(_) => match resolver.srv_lookup(name).await {
                Ok(found) => self.service(found.answers().iter().map(|record| &record.data)),
                Err(error) => no_answer(&error),
            },
        }
    }

    fn text<'a>(&self, records: impl Iterator<Item = &'a RData>) -> LookupResult {
        let texts: Vec<String> = records
            .filter_map(|record| match record {
                // The strings of a record are one text (RFC 7208 section 3.3 has the same).
                RData::TXT(txt) => Some(String::from_utf8_lossy(&txt.txt_data.concat()).into_owned()),
                _ => None,
            })
            .collect();
        match &texts[..] {
            [] => LookupResult::Unknown,
            [text] => LookupResult::from(self.declared.text(text)),
            _ => LookupResult::Failed(format!("{} TXT records, one is expected", texts.len())),
        }
    }

    fn service<'a>(&self, records: impl Iterator<Item = &'a RData>) -> LookupResult {
        let services = records.filter_map(|record| match record {
            // RFC 2782: a target of "." says that the service does not exist.
            RData::SRV(srv) if !srv.target.is_root() => Some(srv),
            _ => None,
        });
        let Some(first) = services.min_by_key(|srv| srv.priority) else { return LookupResult::Unknown };
        let target = first.target.to_ascii().trim_end_matches('.').to_ascii_lowercase();
        LookupResult::from(self.declared.fields(Fields { backend: Some(&target), ..Fields::default() }))
    }
}

/// Only a server that says that there is nothing knows it.
fn no_answer(error: &NetError) -> LookupResult {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(nothing))
            if matches!(nothing.response_code, ResponseCode::NXDomain | ResponseCode::NoError) =>
        {
            LookupResult::Unknown
        }
        error => LookupResult::Failed(error.to_string()),
    }
}

/// The name to ask for. `None`: the user's name cannot stand in it.
///
/// A dot in a value makes labels (`john.smith`), but none that begins with `_`: such labels are the template's, and with one between two
/// variables no two users have the same name.
fn filled(template: &Template, user: &str) -> Option<String> {
    let adds_service_label = |value: &str| value.contains('.') && value.split('.').any(|label| label.starts_with('_'));
    let refused = Cell::new(false);
    let name = template.fill(user, |value| {
        refused.set(refused.get() || adds_service_label(value));
        value.to_owned()
    });
    (!refused.get() && is_name(&name)).then_some(name)
}

/// Letters, digits, hyphens and underscores between single dots: what nobody needs to escape.
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    name.len() <= MAX_NAME && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_users_add_no_labels_of_the_template() {
        let template = Template::new("%{local}._mailbox.%{domain}").unwrap();
        let of = |user: &str| filled(&template, user);
        assert_eq!(of("john.smith@example.org").as_deref(), Some("john.smith._mailbox.example.org"));
        assert_eq!(of("_john@example.org").as_deref(), Some("_john._mailbox.example.org"));
        for hostile in [
            "alice@b._mailbox.example.org",
            "alice._mailbox.b@example.org",
            "alice@_mailbox.example.org",
            "a b=c@x",
            "*)(uid=*@x",
            "a'OR'1'='1@x",
            "$1@x",
            "%{user}@x",
            "\"q\"@x",
            "a\nb@x",
            "a\0@x",
            "a\\.b@x",
            "zo\u{eb}@x",
            "",
            "@x",
            "x@",
            &format!("{}@x", "n".repeat(512)),
        ] {
            assert_eq!(of(hostile), None, "{hostile:?}");
        }
    }

    #[test]
    fn only_names_that_need_no_escape_are_asked() {
        for good in ["alice._imap.example.org", "john.smith.example.org", "xn--bcher-kva.example"] {
            assert!(is_name(good), "{good}");
        }
        let long = format!("{}.example.org", "a".repeat(64));
        for bad in ["", ".", "a..b", ".a", "a.", "al ice.x", "a*b.x", "zoë.x", "a\\.b", "a@b", "a\0.x", &long] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(!is_name(&"a.".repeat(200)));
    }
}
