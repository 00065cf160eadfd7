//! A digest that decides whether a directory of the previous configuration is reused, with its connections.
//!
//! It is reused if everything it was built from is unchanged: its section of the configuration, the names of backends and the
//! addresses of servers that its answers are checked against, and the content of the files it names. The root certificates
//! of the system are not compared: they are read when a directory is built.

use std::collections::BTreeMap;
use std::path::PathBuf;

use aws_lc_rs::digest::{Context, SHA256};
use zeroize::Zeroizing;

use super::sources::http;
use crate::config::{self, Config, Located};

/// A digest of everything a directory is built from except its section of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputDigest([u8; 32]);

impl InputDigest {
    /// Returns `None` if the directory is not reused: it has no connections, or a file cannot be read.
    pub(super) fn of(config: &Config, route: &config::Route) -> Option<Self> {
        let (files, names_addresses): (Vec<Option<&Located<PathBuf>>>, bool) = match route {
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
        if names_addresses {
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

    fn digest_of(folder: &Path, server: &str, route: &str) -> Option<InputDigest> {
        let text = format!(
            "listeners: [{{address: '127.0.0.1:0', tls: none}}]\nbackends: {{a: {{servers: ['{server}']}}}}\n\
             routes: [{route}]\n"
        );
        let config = config::parse(&folder.join("v.yaml"), &text).unwrap();
        InputDigest::of(&config, &config.routes[0])
    }

    #[test]
    fn digest_depends_on_secrets_and_certificates() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let sql = "{sql: {url: 'postgres://v@h/d', password_file: p, ca: c, query: 'SELECT %{user}'}}";
        let digest = |route: &str| digest_of(folder.path(), "192.0.2.1:143", route);
        assert_eq!(digest(sql), None, "the files do not exist");
        write("p", "one");
        write("c", "ca");
        let first = digest(sql);
        assert!(first.is_some() && digest(sql) == first);
        write("p", "two");
        assert_ne!(digest(sql), first);
        // Moving bytes from one file to the other is a change.
        write("p", "on");
        write("c", "eca");
        assert_ne!(digest(sql), first);
        write("p", "one");
        write("c", "ca");
        assert_eq!(digest(sql), first);
        assert_eq!(digest("{dns: {txt: '%{local}._mailbox.%{domain}'}}"), None);
    }

    #[test]
    fn digest_depends_on_servers_only_if_answers_name_addresses() {
        let folder = tempfile::tempdir().unwrap();
        for (route, depends) in
            [("{http: {url: 'http://h/'}}", true), ("{redis: {url: 'redis://h', key: '%{user}'}}", false)]
        {
            let digest = |server: &str| digest_of(folder.path(), server, route).unwrap();
            assert_eq!(digest("192.0.2.1:143") != digest("192.0.2.2:143"), depends, "{route}");
        }
    }
}
