//! Routes by DNS: a TXT record contains the answer, or the target of an SRV record is the backend's name.
//!
//! A missing name or record means an unknown user; every other error fails the lookup. A user name that cannot be part of a DNS name is
//! unknown without a query, and so is one that would add labels that begin with `_`.

use std::cell::Cell;

use hickory_resolver::TokioResolver;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RData;
use tokio::sync::OnceCell;

use crate::config::{self, Config, DnsQuery};
use crate::lookup::dns;
use crate::route::LookupResult;
use crate::route::answer::{AnswerFields, DeclaredBackends};
use crate::route::request::LookupRequest;
use crate::template::Template;

/// Maximum length of a name in text form (RFC 1035 section 2.3.4).
const MAX_NAME: usize = 253;
/// Maximum length of a label (RFC 1035 section 2.3.4).
const MAX_LABEL: usize = 63;

/// A DNS zone that is queried once per lookup.
#[derive(Debug)]
pub(in crate::route) struct Dns {
    query: DnsQuery,
    config: config::ResolverConfig,
    /// Created on the runtime of the first query.
    resolver: OnceCell<TokioResolver>,
    declared: DeclaredBackends,
}

impl Dns {
    pub(in crate::route) fn new(config: &Config, dns: &config::Dns, declared: &DeclaredBackends) -> Self {
        let mut resolver = config.resolver.clone();
        if !dns.servers.is_empty() {
            resolver.servers.clone_from(&dns.servers);
        }
        let declared = declared.clone().with_directory_names(&dns.lookup.names);
        Self { query: dns.query.clone(), config: resolver, resolver: OnceCell::new(), declared }
    }

    pub(in crate::route) async fn query(&self, request: &LookupRequest) -> LookupResult {
        let (DnsQuery::Txt(template) | DnsQuery::Srv(template)) = &self.query;
        let Some(name) = query_name(template, &request.user) else { return LookupResult::Unknown };
        let create = || async { dns::resolver(&self.config.servers, self.config.timeout) };
        let resolver = match self.resolver.get_or_try_init(create).await {
            Ok(resolver) => resolver,
            Err(error) => return LookupResult::Failed(error),
        };
        // A name that ends with a dot is not combined with the search domains of the system.
        let name = format!("{name}.");
        match &self.query {
            DnsQuery::Txt(_) => match resolver.txt_lookup(name).await {
                Ok(found) => self.check_txt(found.answers().iter().map(|record| &record.data)),
                Err(error) => error_result(&error),
            },
            DnsQuery::Srv(_) => match resolver.srv_lookup(name).await {
                Ok(found) => self.check_srv(found.answers().iter().map(|record| &record.data)),
                Err(error) => error_result(&error),
            },
        }
    }

    fn check_txt<'a>(&self, records: impl Iterator<Item = &'a RData>) -> LookupResult {
        let texts: Vec<String> = records
            .filter_map(|record| match record {
                // The strings of a record are concatenated, as in RFC 7208 section 3.3.
                RData::TXT(txt) => Some(String::from_utf8_lossy(&txt.txt_data.concat()).into_owned()),
                _ => None,
            })
            .collect();
        match &texts[..] {
            [] => LookupResult::Unknown,
            [text] => LookupResult::from(self.declared.check_text(text)),
            _ => LookupResult::Failed(format!("expected one TXT record, found {}", texts.len())),
        }
    }

    fn check_srv<'a>(&self, records: impl Iterator<Item = &'a RData>) -> LookupResult {
        let services = records.filter_map(|record| match record {
            // RFC 2782: a target of "." means that the service does not exist.
            RData::SRV(srv) if !srv.target.is_root() => Some(srv),
            _ => None,
        });
        let Some(first) = services.min_by_key(|srv| srv.priority) else { return LookupResult::Unknown };
        let name = first.target.to_ascii().trim_end_matches('.').to_ascii_lowercase();
        LookupResult::from(self.declared.check_fields(AnswerFields { backend: Some(&name), ..AnswerFields::default() }))
    }
}

/// The user is unknown only if a server has answered that there is no such name or record.
fn error_result(error: &NetError) -> LookupResult {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(response))
            if matches!(response.response_code, ResponseCode::NXDomain | ResponseCode::NoError) =>
        {
            LookupResult::Unknown
        }
        error => LookupResult::Failed(error.to_string()),
    }
}

/// Returns the name to query, or `None` if the user's name cannot be part of it.
///
/// A dot in a value separates labels (`john.smith`), but a value must not add labels that begin with `_`: only the template contains
/// these, so that with one between two variables no two users share a name.
fn query_name(template: &Template, user: &str) -> Option<String> {
    let adds_service_label = |value: &str| value.contains('.') && value.split('.').any(|label| label.starts_with('_'));
    let is_refused = Cell::new(false);
    let name = template.fill(user, |value| {
        is_refused.set(is_refused.get() || adds_service_label(value));
        value.to_owned()
    });
    (!is_refused.get() && is_plain_name(&name)).then_some(name)
}

/// Whether the name consists of letters, digits, hyphens and underscores between single dots, which need no escaping.
fn is_plain_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    name.len() <= MAX_NAME && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_names_add_no_labels_of_the_template() {
        let template = Template::new("%{local}._mailbox.%{domain}").unwrap();
        let name_of = |user: &str| query_name(&template, user);
        assert_eq!(name_of("john.smith@example.org").as_deref(), Some("john.smith._mailbox.example.org"));
        assert_eq!(name_of("_john@example.org").as_deref(), Some("_john._mailbox.example.org"));
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
            assert_eq!(name_of(hostile), None, "{hostile:?}");
        }
    }

    #[test]
    fn only_names_that_need_no_escaping_are_queried() {
        for good in ["alice._imap.example.org", "john.smith.example.org", "xn--bcher-kva.example"] {
            assert!(is_plain_name(good), "{good}");
        }
        let long = format!("{}.example.org", "a".repeat(64));
        for bad in ["", ".", "a..b", ".a", "a.", "al ice.x", "a*b.x", "zoë.x", "a\\.b", "a@b", "a\0.x", &long] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
        assert!(!is_plain_name(&"a.".repeat(200)));
    }
}
