//! Becoming an ordinary user once all ports are bound, for those who start the program as root without systemd.
//!
//! Called by `main`, before any thread serves a byte. What is bound later, by a reload, is bound without root's rights.

use anyhow::{Context as _, bail};
use nix::unistd::{Group, User, getegid, geteuid, initgroups, setgid, setuid};

use crate::config::RunAs;

/// Takes the user's rights, and no others: groups first, and for good.
///
/// # Errors
/// There is no such user or group, or the process may not become it.
pub fn drop_to(wanted: &RunAs) -> anyhow::Result<()> {
    let user = User::from_name(&wanted.user).context("users cannot be looked up")?;
    let user = user.with_context(|| format!("there is no user {:?} (run_as.user)", wanted.user))?;
    let group = match &wanted.group {
        None => user.gid,
        Some(name) => {
            let group = Group::from_name(name).context("groups cannot be looked up")?;
            group.with_context(|| format!("there is no group {name:?} (run_as.group)"))?.gid
        }
    };
    if geteuid() == user.uid && getegid() == group {
        return Ok(());
    }
    let name = std::ffi::CString::new(wanted.user.as_str()).context("run_as.user")?;
    initgroups(&name, group).with_context(|| format!("cannot take the groups of {:?} (run_as)", wanted.user))?;
    setgid(group).with_context(|| format!("cannot become group {group} (run_as)"))?;
    setuid(user.uid).with_context(|| format!("cannot become user {:?} (run_as)", wanted.user))?;
    // Root is not to be had back, or something is very wrong.
    if !user.uid.is_root() && setuid(nix::unistd::Uid::from_raw(0)).is_ok() {
        bail!("root's rights could be taken back after run_as");
    }
    tracing::info!(user = %wanted.user, "rights dropped");
    Ok(())
}
