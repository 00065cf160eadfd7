//! What the process asks of the system before it serves: descriptors, and no core dump. Called by `main`.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// Each session holds two descriptors; the rest is for listeners, DNS, files and the runtime.
const RESERVED: u64 = 256;

/// Raises the soft limit of descriptors to the hard one and logs a warning if `sessions` do not fit; forbids core dumps.
pub(crate) fn prepare(sessions: usize) {
    let descriptors = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, maximum: descriptors.maximum })
    {
        tracing::warn!(%error, "the limit of descriptors could not be raised");
    }
    let wanted = 2 * sessions as u64 + RESERVED;
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if allowed < wanted {
        tracing::warn!(
            allowed,
            wanted,
            "descriptors do not suffice for limits.sessions: raise LimitNOFILE or lower limits.sessions"
        );
    }
    forbid_core_dumps();
}

/// Forbids core dumps, which would hold passwords, and debuggers of the same user. To be called again after the user has
/// changed: the kernel then resets one of the two.
pub(crate) fn forbid_core_dumps() {
    // A core pattern that is a pipe is not bound by the limit below, but by this.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "the process could not be made undumpable");
    }
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        tracing::warn!(%error, "core dumps could not be forbidden");
    }
}
