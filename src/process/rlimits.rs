//! Resource limits of the process: open files, and no core dumps.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// Descriptors for listeners, DNS, files and the runtime, in addition to two per session.
const RESERVED: u64 = 256;

/// Raises the soft limit of open files to the hard limit, logs a warning if it is too low for `sessions`, and forbids core dumps.
pub(crate) fn prepare(sessions: usize) {
    let descriptors = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, maximum: descriptors.maximum })
    {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let wanted = 2 * sessions as u64 + RESERVED;
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if allowed < wanted {
        tracing::warn!(
            allowed,
            wanted,
            "open-file limit {allowed} is too low for {sessions} sessions: raise LimitNOFILE or lower limits.sessions"
        );
    }
    forbid_core_dumps();
}

/// Forbids core dumps, which would contain passwords, and debuggers run by the same user. Must be called again after the user has
/// changed, because the kernel then resets the dumpable attribute.
pub(crate) fn forbid_core_dumps() {
    // A core pattern that is a pipe ignores the resource limit below, but not this attribute.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "the process could not be made undumpable");
    }
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        tracing::warn!(%error, "core dumps could not be forbidden");
    }
}
