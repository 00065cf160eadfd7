//! `routes`: one source an item, every backend declared, none behind one that knows everybody. Called by `check`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_yaml::Value;

use super::check::located;
use super::file::RouteMap;
use super::locate::child;
use super::read::Reader;
use super::report::suggestion;
use super::{BackendId, Route};

/// All routes; `names` are those of the backends, in their order.
pub(super) fn routes(reader: &mut Reader<'_>, folder: &Path, names: &[String], items: Vec<Value>) -> Vec<Route> {
    if items.is_empty() && !reader.blamed("routes") {
        reader.problem("routes", "at least one route is needed, such as {default: BACKEND}");
    }
    let declared: HashMap<&str, BackendId> =
        names.iter().enumerate().map(|(index, name)| (name.as_str(), BackendId(index))).collect();
    let mut routes = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        let key = format!("routes[{index}]");
        if routes.iter().any(|route| matches!(route, Route::Default(_) | Route::Hash(_))) {
            reader.problem(&key, "is never asked: a route before it knows every user");
        }
        let Some(written) = reader.read::<RouteMap>(&key, item) else { continue };
        routes.extend(route(reader, folder, &declared, &key, written));
    }
    routes
}

fn route(
    reader: &mut Reader<'_>,
    folder: &Path,
    declared: &HashMap<&str, BackendId>,
    key: &str,
    written: RouteMap,
) -> Option<Route> {
    match written {
        RouteMap { table: Some(path), domain: None, hash: None, default: None } => {
            Some(Route::Table(located(reader, folder, &child(key, "table"), &path)))
        }
        RouteMap { domain: Some(domains), table: None, hash: None, default: None } => {
            let key = child(key, "domain");
            if domains.is_empty() && !reader.blamed(&key) {
                reader.problem(&key, "at least one domain is needed, like example.org: BACKEND");
            }
            let mut known = BTreeMap::new();
            for (domain, name) in domains {
                let place = child(&key, &domain);
                let domain = domain.strip_prefix('@').unwrap_or(&domain).to_ascii_lowercase();
                if !is_domain(&domain) {
                    reader.problem(&place, "no user name can end in this; expected a domain, like example.org");
                    continue;
                }
                let Some(backend) = declared_backend(reader, declared, &place, &name) else { continue };
                if known.insert(domain, backend).is_some() {
                    reader.problem(&place, "the same domain in other letter case stands here already");
                }
            }
            Some(Route::Domain(known))
        }
        RouteMap { hash: Some(names), table: None, domain: None, default: None } => {
            let key = child(key, "hash");
            if names.is_empty() {
                reader.problem(&key, "at least one backend is needed");
            }
            let mut backends = Vec::new();
            for (index, name) in names.iter().enumerate() {
                let place = format!("{key}[{index}]");
                let Some(backend) = declared_backend(reader, declared, &place, name) else { continue };
                if backends.contains(&backend) {
                    reader.problem(&place, format!("{name} stands here twice"));
                }
                backends.push(backend);
            }
            Some(Route::Hash(backends))
        }
        RouteMap { default: Some(name), table: None, domain: None, hash: None } => {
            declared_backend(reader, declared, &child(key, "default"), &name).map(Route::Default)
        }
        RouteMap { .. } => {
            if !reader.blamed(key) {
                reader.problem(key, "expected exactly one of table, domain, hash, default");
            }
            None
        }
    }
}

/// What may stand behind the last `@` of a user name; any script, as the name is compared as it was sent.
fn is_domain(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(|char: char| matches!(char, '@' | '*') || char.is_whitespace() || char.is_control())
}

fn declared_backend(
    reader: &mut Reader<'_>,
    declared: &HashMap<&str, BackendId>,
    key: &str,
    name: &str,
) -> Option<BackendId> {
    let found = declared.get(name).copied();
    // A backend that could not be read is declared all the same.
    if found.is_none() && !reader.is_told("backends") && !reader.blamed(&child("backends", name)) {
        let mut known: Vec<&str> = declared.keys().copied().collect();
        known.sort_unstable();
        reader.problem_with_help(key, format!("no backend is declared as {name:?}"), suggestion(name, &known));
    }
    found
}
