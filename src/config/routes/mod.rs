//! `routes`: one source an item, every backend declared, none behind one that knows everybody. Called by `check`.

mod directories;
mod maps;
mod sql_query;

use std::collections::{BTreeMap, HashMap as Map};
use std::path::Path;

use serde_yaml::Value;

use self::directories::Section;
pub(super) use self::maps::{CacheMap, HashMap};
use self::maps::{HashShareMap, HashStyleWord, RegexMap, RouteMap};
use super::check::located;
use super::error::Help;
use super::limits::number;
use super::locate::child;
use super::read::Reader;
use super::values::HashEntry;
use super::{BackendId, HashShare, HashStyle, RegexRule, Route};

/// The kinds of routes, as the configuration calls them.
const KINDS: &str = "table, domain, regex, hash, default, sql, ldap, http, redis, dns";

/// Names of backends, and their places.
type Declared<'a> = Map<&'a str, BackendId>;

/// What is known around `routes`.
struct Context<'a> {
    folder: &'a Path,
    declared: &'a Declared<'a>,
}

/// All routes; `names` are those of the backends, in their order.
pub(super) fn routes(reader: &mut Reader<'_>, folder: &Path, names: &[String], items: Vec<Value>) -> Vec<Route> {
    if items.is_empty() && !reader.blamed("routes") {
        reader.problem("routes", "at least one route is needed, such as {default: BACKEND}");
    }
    let declared: Declared<'_> =
        names.iter().enumerate().map(|(index, name)| (name.as_str(), BackendId(index))).collect();
    let context = Context { folder, declared: &declared };
    let mut routes = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("routes[{index}]");
        if routes.iter().any(|route| matches!(route, Route::Default(_) | Route::Hash { .. })) {
            reader.problem(&key, "is never asked: a route before it knows every user");
        }
        let Some(written) = reader.read::<RouteMap>(&key, item) else { continue };
        routes.extend(route(reader, &context, &key, written));
    }
    routes
}

fn route(reader: &mut Reader<'_>, context: &Context<'_>, key: &str, written: RouteMap) -> Option<Route> {
    let RouteMap { table, domain, regex, hash, default, sql, ldap, http, redis, dns } = written;
    let given = [
        table.is_some(),
        domain.is_some(),
        regex.is_some(),
        hash.is_some(),
        default.is_some(),
        sql.is_some(),
        ldap.is_some(),
        http.is_some(),
        redis.is_some(),
        dns.is_some(),
    ];
    if given.iter().filter(|given| **given).count() != 1 {
        if !reader.blamed(key) {
            reader.problem(key, format!("expected exactly one of {KINDS}"));
        }
        return None;
    }
    if let Some(path) = table {
        return Some(Route::Table(located(reader, context.folder, &child(key, "table"), &path)));
    }
    if let Some(domains) = domain {
        return Some(Route::Domain(by_domain(reader, context, &child(key, "domain"), domains)));
    }
    if let Some(rules) = regex {
        return Some(Route::Regex(by_regex(reader, &child(key, "regex"), rules)));
    }
    if let Some(entry) = hash {
        return by_hash(reader, context, &child(key, "hash"), entry);
    }
    if let Some(name) = default {
        return declared_backend(reader, context.declared, &child(key, "default"), &name).map(Route::Default);
    }
    let section = |name: &str, reader| Section { key: child(key, name), reader, context };
    match (sql, ldap, http, redis, dns) {
        (Some(value), ..) => section("sql", reader).sql(value),
        (_, Some(value), ..) => section("ldap", reader).ldap(value),
        (_, _, Some(value), ..) => section("http", reader).http(value),
        (_, _, _, Some(value), _) => section("redis", reader).redis(value),
        (.., Some(value)) => section("dns", reader).dns(value),
        // One was given, and it was none of those above.
        (None, None, None, None, None) => None,
    }
}

fn by_domain(
    reader: &mut Reader<'_>,
    context: &Context<'_>,
    key: &str,
    domains: BTreeMap<String, String>,
) -> BTreeMap<String, BackendId> {
    if domains.is_empty() && !reader.blamed(key) {
        reader.problem(key, "at least one domain is needed, like example.org: BACKEND");
    }
    let mut known = BTreeMap::new();
    for (domain, name) in domains {
        let place = child(key, &domain);
        let domain = domain.strip_prefix('@').unwrap_or(&domain).to_ascii_lowercase();
        if !is_domain(&domain) {
            reader.problem(&place, "no user name can end in this; expected a domain, like example.org");
            continue;
        }
        let Some(backend) = declared_backend(reader, context.declared, &place, &name) else { continue };
        if known.insert(domain, backend).is_some() {
            reader.problem(&place, "the same domain in other letter case stands here already");
        }
    }
    known
}

fn by_regex(reader: &mut Reader<'_>, key: &str, items: Vec<Value>) -> Vec<RegexRule> {
    if items.is_empty() && !reader.blamed(key) {
        reader.problem(key, "at least one rule is needed, like {match: '@example\\.org$', to: BACKEND}");
    }
    let mut rules = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("{key}[{index}]");
        let Some(written) = reader.read::<RegexMap>(&key, item) else { continue };
        rules.push(RegexRule { pattern: written.r#match, to: written.to, location: reader.location(&key) });
    }
    rules
}

fn by_hash(reader: &mut Reader<'_>, context: &Context<'_>, key: &str, entry: HashEntry) -> Option<Route> {
    let (style, entries) = match entry {
        HashEntry::List(names) => {
            let named = names.iter().enumerate().map(|(index, name)| (format!("{key}[{index}]"), name.clone(), None));
            (HashStyleWord::Vestibule, named.collect::<Vec<_>>())
        }
        HashEntry::Map(map) => {
            let place = child(key, "backends");
            let named = map.backends.into_iter().map(|(name, value)| (child(&place, &name), name, Some(value)));
            (map.style, named.collect())
        }
    };
    if entries.is_empty() && !reader.blamed(key) {
        reader.problem(key, "at least one backend is needed");
    }
    let mut shares: Vec<HashShare> = Vec::new();
    for (place, name, value) in entries {
        let given = match value {
            None => HashShareMap { weight: None, host: None },
            Some(Value::Number(number)) => HashShareMap { weight: number.as_i64().or(Some(0)), host: None },
            Some(value) => reader.read(&place, value)?,
        };
        let weight = number(reader, &child(&place, "weight"), given.weight, 1, 1..=1000);
        match (style, &given.host) {
            (HashStyleWord::Director, None) => {
                reader.problem(&place, "needs `host`: the address the director knew the server by");
            }
            (HashStyleWord::Vestibule, Some(_)) => {
                reader.problem(&child(&place, "host"), "has a meaning for `style: director` only");
            }
            _ => {}
        }
        let Some(backend) = declared_backend(reader, context.declared, &place, &name) else { continue };
        if shares.iter().any(|other| other.backend == backend) {
            reader.problem(&place, format!("{name} stands here twice"));
        }
        shares.push(HashShare { backend, weight, hosts: given.host.map(|hosts| hosts.words).unwrap_or_default() });
    }
    let style = match style {
        HashStyleWord::Vestibule => HashStyle::Vestibule,
        HashStyleWord::Director => HashStyle::Director,
    };
    Some(Route::Hash { style, shares })
}

/// What may stand behind the last `@` of a user name; any script, as the name is compared as it was sent.
fn is_domain(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(|char: char| matches!(char, '@' | '*') || char.is_whitespace() || char.is_control())
}

fn declared_backend(reader: &mut Reader<'_>, declared: &Declared<'_>, key: &str, name: &str) -> Option<BackendId> {
    let found = declared.get(name).copied();
    // A backend that could not be read is declared all the same.
    if found.is_none() && !reader.is_told("backends") && !reader.blamed(&child("backends", name)) {
        let mut known: Vec<&str> = declared.keys().copied().collect();
        known.sort_unstable();
        reader.problem_with_help(key, format!("no backend is declared as {name:?}"), Some(Help::suggest(name, &known)));
    }
    found
}
