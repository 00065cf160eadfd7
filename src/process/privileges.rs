//! Drops root privileges: changes to the user of `run_as` after all ports are bound.
//!
//! The user is looked up before anything is bound, so that an unknown name is an error of the configuration. A process that already
//! runs as that user, such as a successor, changes nothing. Ports that are bound later are bound without root privileges.

use std::ffi::CString;

use anyhow::{Context as _, bail};
use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgrouplist, initgroups, setgid, setuid};

use crate::config::{Config, Problem, Report};

/// The user and group of `run_as`, looked up.
#[derive(Debug, Clone)]
pub struct Identity {
    name: String,
    uid: Uid,
    gid: Gid,
}

/// Looks up the user and the group of `run_as`.
///
/// # Errors
/// The user or the group does not exist, or the lookup fails.
pub(crate) fn resolve(config: &Config) -> Result<Option<Identity>, Report> {
    let Some(wanted) = &config.run_as else { return Ok(None) };
    let problem = |message: String| Report::new(vec![wanted.user.location.problem(message)]);
    let name = &wanted.user.value;
    let user = User::from_name(name).map_err(|error| problem(format!("users cannot be looked up: {error}")))?;
    let user = user.ok_or_else(|| problem(format!("unknown user {name:?}")))?;
    let gid = match &wanted.group {
        None => user.gid,
        Some(group) => {
            let problem = |message: String| -> Problem { group.location.problem(message) };
            let found = Group::from_name(&group.value).map_err(|error| format!("groups cannot be looked up: {error}"));
            let found = found.and_then(|found| found.ok_or_else(|| format!("unknown group {:?}", group.value)));
            found.map_err(|message| Report::new(vec![problem(message)]))?.gid
        }
    };
    Ok(Some(Identity { name: name.clone(), uid: user.uid, gid }))
}

impl Identity {
    pub(crate) fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Returns the user and group ids, as the owner of files and sockets.
    pub fn owner(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Returns all groups that the process will have.
    ///
    /// # Errors
    /// The groups cannot be looked up.
    pub fn groups(&self) -> anyhow::Result<Vec<u32>> {
        let groups = getgrouplist(&self.c_name()?, self.gid).context("groups cannot be looked up")?;
        Ok(groups.into_iter().map(Gid::as_raw).collect())
    }

    /// Whether the process now runs as another user or group.
    pub fn is_change(&self) -> bool {
        geteuid() != self.uid || getegid() != self.gid
    }

    /// Checks early that the process may take this identity.
    ///
    /// # Errors
    /// The process runs as another user, and not as root.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.is_change() && !geteuid().is_root() {
            bail!(
                "this process runs as uid {}, and only root can change to user {:?} (run_as): if run_as has changed, restart \
                 instead of upgrading",
                geteuid(),
                self.name
            );
        }
        Ok(())
    }

    /// Takes the groups and the user of this identity, and checks that root privileges cannot be regained.
    ///
    /// # Errors
    /// The process may not change to the user.
    pub fn assume(&self) -> anyhow::Result<()> {
        if !self.is_change() {
            return Ok(());
        }
        self.check()?;
        let Self { name, uid, gid } = self;
        initgroups(&self.c_name()?, *gid).with_context(|| format!("cannot take the groups of {name:?} (run_as)"))?;
        setgid(*gid).with_context(|| format!("cannot become group {gid} (run_as)"))?;
        setuid(*uid).with_context(|| format!("cannot become user {name:?} (run_as)"))?;
        if !uid.is_root() && setuid(Uid::from_raw(0)).is_ok() {
            bail!("root privileges could be regained after run_as");
        }
        tracing::info!(user = %name, "privileges dropped");
        Ok(())
    }

    fn c_name(&self) -> anyhow::Result<CString> {
        CString::new(self.name.as_str()).context("run_as.user")
    }
}
