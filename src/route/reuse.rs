//! Whether a directory of the previous configuration can be used on, with its connections.
//!
//! It can if all it was built from is the same: its section of the configuration, the names of backends and the addresses of
//! servers that its answers are checked against, and the content of the files it names. A changed password file makes a
//! new directory. The system's own root certificates are not compared: they are read when a directory is built.

use std::collections::BTreeMap;
use std::path::PathBuf;

use aws_lc_rs::digest::{Context, SHA256};
use zeroize::Zeroizing;

use super::sources::http;
use crate::config::{self, Config, Located};

/// A digest of what a directory is built from, beside its section of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inputs([u8; 32]);

impl Inputs {
    /// `None` if the directory is not used on: it has no connections, or a file cannot be read.
    pub(super) fn of(config: &Config, route: &config::Route) -> Option<Self> {
        let (files, is_checked_by_address): (Vec<Option<&Located<PathBuf>>>, bool) = match route {
            config::Route::Sql(sql) => (vec![sql.password.as_ref(), sql.ca.as_ref()], false),
            config::Route::Ldap(ldap) => (vec![ldap.password.as_ref(), ldap.ca.as_ref()], false),
            config::Route::Http(http) => (vec![http.token.as_ref(), http.ca.as_ref()], true),
            config::Route::Redis(redis) => (vec![redis.password.as_ref(), redis.ca.as_ref()], false),
            _ => return None,
        };
        let mut digest = Context::new(&SHA256);
        for file in files {
            let content = file.map(|file| std::fs::read(&file.value)).transpose().ok()?.map(Zeroizing::new);
            let length = content.as_ref().map_or(u64::MAX, |content| content.len() as u64);
            digest.update(&length.to_be_bytes());
            digest.update(content.as_ref().map_or(&[], |content| content.as_slice()));
        }
        if is_checked_by_address {
            let servers: BTreeMap<_, _> = http::servers(config).into_iter().collect();
            digest.update(format!("{servers:?}").as_bytes());
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.finish().as_ref());
        Some(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn inputs(folder: &Path, server: &str, route: &str) -> Option<Inputs> {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{a: {{servers: ['{server}']}}}}\n\
             routes: [{route}]\n"
        );
        let config = config::parse(&folder.join("v.yaml"), &text).unwrap();
        Inputs::of(&config, &config.routes[0])
    }

    #[test]
    fn a_changed_secret_or_certificate_changes_the_inputs() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let sql = "{sql: {url: 'postgres://v@h/d', password_file: p, ca: c, query: 'SELECT %{user}'}}";
        let of = |route: &str| inputs(folder.path(), "192.0.2.1:143", route);
        assert_eq!(of(sql), None, "no file can be read");
        write("p", "one");
        write("c", "ca");
        let first = of(sql);
        assert!(first.is_some() && of(sql) == first);
        write("p", "two");
        assert_ne!(of(sql), first);
        // What moves from one file to the other is a change, too.
        write("p", "on");
        write("c", "eca");
        assert_ne!(of(sql), first);
        write("p", "one");
        write("c", "ca");
        assert_eq!(of(sql), first);
        assert_eq!(of("{dns: {txt: '%{local}._mailbox.%{domain}'}}"), None);
    }

    #[test]
    fn only_answers_that_name_addresses_depend_on_the_servers() {
        let folder = tempfile::tempdir().unwrap();
        for (route, depends) in
            [("{http: {url: 'http://h/'}}", true), ("{redis: {url: 'redis://h', key: '%{user}'}}", false)]
        {
            let of = |server: &str| inputs(folder.path(), server, route).unwrap();
            assert_eq!(of("192.0.2.1:143") != of("192.0.2.2:143"), depends, "{route}");
        }
    }
}
