//! What the process asks of the system before it serves: descriptors, and no core dump.
//!
//! Called by `main` once.

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// Each session holds two descriptors; the rest is for listeners, DNS, files and the runtime.
const RESERVED: u64 = 256;

/// Raises the soft limit of descriptors to the hard one and says so if `sessions` do not fit; forbids core dumps,
/// which would hold passwords.
pub fn prepare(sessions: usize) {
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
    // Nor may a debugger of the same user look into it; a core pattern that is a pipe heeds no limit, but heeds this.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "the process could not be made undumpable");
    }
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        tracing::warn!(%error, "core dumps could not be forbidden");
    }
}
