//! Checks of a configuration against its environment: TLS with the servers, and write access to cache files.
//!
//! It connects to the servers of backends with TLS, with a short timeout and without a login. A server that cannot be reached is not
//! reported, because a configuration may be checked on another machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::control_socket::{directory, may_write};
use crate::backend::{ListenerAddresses, TlsFault};
use crate::config::{self, Config, Location, LookupConfig, Problem, Route};
use crate::process::privileges::Identity;
use crate::snapshot::Snapshot;

/// Timeout of the check of one server: DNS, connection and TLS handshake.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Returns a warning for each server with which TLS fails, with its location in the configuration.
pub async fn server_warnings(snapshot: &Snapshot) -> Vec<Problem> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    snapshot.backends.start_discovery(&ListenerAddresses::default(), &tasks, &stop);
    let faults = Arc::clone(&snapshot.backends).tls_faults(&snapshot.limits, TIMEOUT).await;
    stop.cancel();
    let warning = |TlsFault { backend, server, detail }: TlsFault| {
        let backend = &snapshot.config.backends[backend.0];
        let message = format!("TLS with {server} fails, so that every login there would fail too: {detail}");
        location(backend, &server).problem(message)
    };
    faults.into_iter().map(warning).collect()
}

fn location<'a>(backend: &'a config::Backend, server: &str) -> &'a Location {
    let declared = backend.servers.iter().find_map(|declared| match declared {
        config::Server::Address { name, location, .. } => (name == server).then_some(location),
        config::Server::Srv { .. } => None,
    });
    declared.unwrap_or(&backend.location)
}

/// Returns a warning for each cache file that the user of `run_as`, or else of this process, could not write.
///
/// # Errors
/// The groups of that user cannot be looked up.
pub fn cache_file_warnings(config: &Config, identity: Option<&Identity>) -> anyhow::Result<Vec<Problem>> {
    let user = match identity.filter(|identity| identity.is_change()) {
        Some(identity) => Some((identity.uid(), identity.groups()?)),
        None => None,
    };
    let files = config.routes.iter().filter_map(|route| lookup(route)?.cache.as_ref()?.file.as_ref());
    let warning =
        |file: &config::Located<PathBuf>| Some(file.location.problem(write_problem(&file.value, user.as_ref())?));
    Ok(files.filter_map(warning).collect())
}

fn lookup(route: &Route) -> Option<&LookupConfig> {
    match route {
        Route::Sql(sql) => Some(&sql.lookup),
        Route::Ldap(ldap) => Some(&ldap.lookup),
        Route::Http(http) => Some(&http.lookup),
        Route::Redis(redis) => Some(&redis.lookup),
        Route::Dns(dns) => Some(&dns.lookup),
        _ => None,
    }
}

/// Returns the reason why `file` cannot be written by `user` with its groups, or else by the effective user of this process.
fn write_problem(file: &Path, user: Option<&(u32, Vec<u32>)>) -> Option<String> {
    let directory = directory(file);
    let shown = directory.display();
    if directory.exists() && !directory.is_dir() {
        return Some(format!("{shown} is not a directory: the cache file cannot be written there"));
    }
    match accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Err(Errno::NOENT) => Some(format!(
            "the directory {shown} does not exist, so that the cache is lost at a restart: create it for the \
             service's user"
        )),
        Err(error) => Some(format!(
            "this user cannot write in {shown} ({error}): if the service runs as the same user, the cache is lost at a \
             restart; use a directory like /var/lib/vestibule that belongs to the service's user"
        )),
        Ok(()) => {
            let (uid, groups) = user?;
            let is_writable = may_write(directory, *uid, groups).unwrap_or(false);
            (!is_writable).then(|| {
                format!(
                    "the user of run_as cannot write in {shown}, so that the cache is lost at a restart: use a directory \
                     like /var/lib/vestibule that belongs to that user"
                )
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn cache_file_needs_a_directory_that_the_user_may_write() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "").unwrap();
        let other = (54_321, vec![54_321]);
        let found = |name: &str, user| write_problem(&path(name), user).unwrap_or_default();
        assert_eq!(found("cache.json", None), "");
        assert!(found("absent/cache.json", None).contains("does not exist"));
        assert!(found("file/cache.json", None).contains("is not a directory"));
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        assert!(found("cache.json", Some(&other)).starts_with("the user of run_as cannot write in"));
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        assert_eq!(found("cache.json", Some(&other)), "");
    }

    #[test]
    fn warning_names_the_location_of_the_cache_file() {
        let text = "listeners: [{address: '127.0.0.1:0', tls: none}]\nbackends: {a: {servers: ['192.0.2.1:143']}}\n\
                    routes: [{redis: {url: 'redis://h', key: 'u:%{user}', cache: {file: absent/cache.json}}}]\n";
        let folder = tempfile::tempdir().unwrap();
        let config = config::parse(&folder.path().join("v.yaml"), text).unwrap();
        assert_eq!(config.warnings, []);
        let warnings = cache_file_warnings(&config, None).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].to_string().contains(":3:"), "{}", warnings[0]);
        assert!(warnings[0].to_string().contains("routes[0].redis.cache.file: the directory "), "{}", warnings[0]);
    }
}
