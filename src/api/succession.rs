//! Which process, if any, is taking this one's place: at most one at a time.
//!
//! [`Stage`] is the state machine, pure; [`Succession`] shares it between the tasks of a process. A stage that belongs to one
//! successor ends with the guard ([`Start`], [`Lease`]) that its task holds, so a task that fails leaves the process ready for
//! the next attempt.
//!
//! Moves of users and hand-overs exclude each other, because a successor knows nothing of a user who is held here: while a user
//! is held ([`Holding`]) no successor is granted the sockets, and none is held from the grant on.

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// Maximum number of users who are held at a time.
pub(super) const MAX_HELD: usize = 500;

/// How far a succession has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// No successor: this process serves.
    Idle,
    /// This process has started a successor, or is about to, which has not asked for the listening sockets yet.
    Starting { pid: Option<u32> },
    /// A successor has been granted the listening sockets. `started` tells a successor that this process started from one that
    /// an operator did.
    HandingOver { pid: u32, started: bool },
    /// The successor serves, and this process only finishes its sessions.
    Retired { pid: u32, version: String },
    /// This process was asked to stop.
    Stopping,
}

/// Why a succession cannot begin, or go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("another successor (pid {0}) is taking over: try again when it has succeeded or failed")]
    Busy(u32),
    #[error("another successor is being started: try again when it has succeeded or failed")]
    BusyStarting,
    #[error("a successor (pid {0}) is taking over: try again when it has succeeded or failed")]
    HandingOver(u32),
    #[error("a user is being moved: try again when that is done")]
    Moving,
    #[error("{MAX_HELD} users are being moved: try again when some of that is done")]
    TooManyHeld,
    #[error("this process has been replaced: ask its successor (pid {0})")]
    Retired(u32),
    #[error("this process is stopping")]
    Stopping,
}

impl Stage {
    /// A successor is about to be started by this process.
    fn start(&self) -> Result<Self, Refusal> {
        match self {
            Self::Idle => Ok(Self::Starting { pid: None }),
            other => Err(other.refusal()),
        }
    }

    /// The successor with this process id asks for the listening sockets.
    fn grant(&self, pid: u32) -> Result<Self, Refusal> {
        match self {
            Self::Idle => Ok(Self::HandingOver { pid, started: false }),
            Self::Starting { pid: Some(child) } if *child == pid => Ok(Self::HandingOver { pid, started: true }),
            other => Err(other.refusal()),
        }
    }

    /// The successor that was granted the sockets has failed. A child is still there, and is waited for as before.
    fn revoke(&self, successor: u32) -> Self {
        match self {
            Self::HandingOver { pid, started: true } if *pid == successor => Self::Starting { pid: Some(*pid) },
            Self::HandingOver { pid, started: false } if *pid == successor => Self::Idle,
            other => other.clone(),
        }
    }

    /// The child of this process has ended, or was never started. There is one child at a time.
    fn abandon(&self) -> Self {
        match self {
            Self::Starting { .. } | Self::HandingOver { started: true, .. } => Self::Idle,
            other => other.clone(),
        }
    }

    fn retire(&self, successor: u32, version: &str) -> Result<Self, Refusal> {
        match self {
            Self::HandingOver { pid, .. } if *pid == successor => {
                Ok(Self::Retired { pid: *pid, version: version.to_owned() })
            }
            other => Err(other.refusal()),
        }
    }

    /// Of a request that this stage does not allow.
    fn refusal(&self) -> Refusal {
        match self {
            Self::Idle | Self::Starting { pid: None } => Refusal::BusyStarting,
            Self::Starting { pid: Some(pid) } | Self::HandingOver { pid, .. } => Refusal::Busy(*pid),
            Self::Retired { pid, .. } => Refusal::Retired(*pid),
            Self::Stopping => Refusal::Stopping,
        }
    }
}

/// The stage of this process, shared.
#[derive(Debug, Clone)]
pub(crate) struct Succession {
    stage: Arc<watch::Sender<Stage>>,
    stopping: CancellationToken,
    /// One permit for each user who may still be held.
    holds: Arc<Semaphore>,
}

impl Default for Succession {
    fn default() -> Self {
        Self {
            stage: Arc::new(watch::Sender::new(Stage::Idle)),
            stopping: CancellationToken::new(),
            holds: Arc::new(Semaphore::new(MAX_HELD)),
        }
    }
}

impl Succession {
    /// The process stops: no succession can begin or be completed from now on.
    pub(crate) fn stop(&self) {
        self.stage.send_replace(Stage::Stopping);
        self.stopping.cancel();
    }

    /// Why the configuration cannot be replaced now: a successor has copies of the sockets that the present one needs.
    pub(crate) fn reload_refusal(&self) -> Option<String> {
        match &*self.stage.borrow() {
            Stage::HandingOver { pid, .. } => {
                Some(format!("a successor (pid {pid}) is taking over: reload again when it has"))
            }
            Stage::Retired { pid, .. } => Some(Refusal::Retired(*pid).to_string()),
            Stage::Idle | Stage::Starting { .. } | Stage::Stopping => None,
        }
    }

    pub(super) fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    pub(super) fn watch(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Whether the control socket's name is this process's to keep.
    pub(super) fn keeps_name(&self) -> bool {
        matches!(*self.stage.borrow(), Stage::Idle | Stage::Starting { .. })
    }

    /// Waits until the process id of a successor that is being started is known.
    pub(super) async fn settled(&self) {
        let mut stages = self.watch();
        // The sender is not dropped as long as this exists.
        let _ = stages.wait_for(|stage| *stage != Stage::Starting { pid: None }).await;
    }

    /// Why operators' commands must go to another process, if so.
    pub(super) fn replaced(&self) -> Option<Refusal> {
        match &*self.stage.borrow() {
            Stage::Retired { pid, .. } => Some(Refusal::Retired(*pid)),
            _ => None,
        }
    }

    /// Before a user is held.
    pub(super) fn hold(&self) -> Result<Holding, Refusal> {
        // The stage does not change while it is borrowed, so that no hand-over begins in between.
        match &*self.stage.borrow() {
            Stage::HandingOver { pid, .. } => Err(Refusal::HandingOver(*pid)),
            Stage::Retired { pid, .. } => Err(Refusal::Retired(*pid)),
            Stage::Idle | Stage::Starting { .. } | Stage::Stopping => {
                self.holds.clone().try_acquire_owned().map(Holding).map_err(|_| Refusal::TooManyHeld)
            }
        }
    }

    /// Called while the stage is borrowed for a change.
    fn unless_held(&self, next: Stage) -> Result<Stage, Refusal> {
        if self.holds.available_permits() < MAX_HELD { Err(Refusal::Moving) } else { Ok(next) }
    }

    pub(super) fn start(&self) -> Result<Start, Refusal> {
        self.change(|stage| self.unless_held(stage.start()?))?;
        Ok(Start(self.clone()))
    }

    pub(super) fn grant(&self, pid: u32) -> Result<Lease, Refusal> {
        self.change(|stage| self.unless_held(stage.grant(pid)?))?;
        Ok(Lease { succession: self.clone(), pid })
    }

    fn change(&self, change: impl FnOnce(&Stage) -> Result<Stage, Refusal>) -> Result<(), Refusal> {
        let mut result = Ok(());
        self.stage.send_if_modified(|stage| match change(stage) {
            Ok(next) => {
                *stage = next;
                true
            }
            Err(refusal) => {
                result = Err(refusal);
                false
            }
        });
        result
    }
}

/// A held user. No hand-over begins until this is dropped.
#[derive(Debug)]
pub(super) struct Holding(#[expect(dead_code, reason = "held for its end")] OwnedSemaphorePermit);

/// The right to start a successor. Dropping it is the end of the attempt.
#[derive(Debug)]
pub(super) struct Start(Succession);

impl Start {
    /// The successor runs.
    pub(super) fn started(&self, pid: u32) {
        self.0.stage.send_if_modified(|stage| {
            let is_starting = *stage == Stage::Starting { pid: None };
            if is_starting {
                *stage = Stage::Starting { pid: Some(pid) };
            }
            is_starting
        });
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.0.stage.send_modify(|stage| *stage = stage.abandon());
    }
}

/// The right of one successor to the listening sockets. Dropping it takes the right back, unless it was completed.
#[derive(Debug)]
pub(super) struct Lease {
    succession: Succession,
    pid: u32,
}

impl Lease {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// The successor serves.
    pub(super) fn complete(&self, version: &str) -> Result<(), Refusal> {
        self.succession.change(|stage| stage.retire(self.pid, version))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.succession.stage.send_modify(|stage| *stage = stage.revoke(self.pid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_successor_at_a_time() {
        let succession = Succession::default();
        let lease = succession.grant(7).unwrap();
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        assert_eq!(succession.start().unwrap_err(), Refusal::Busy(7));
        assert!(!succession.keeps_name() && succession.reload_refusal().is_some());
        drop(lease);
        assert!(succession.keeps_name() && succession.reload_refusal().is_none());
        let lease = succession.grant(8).unwrap();
        lease.complete("1.0").unwrap();
        drop(lease);
        assert_eq!(succession.grant(9).unwrap_err(), Refusal::Retired(8));
        assert_eq!(succession.start().unwrap_err(), Refusal::Retired(8));
    }

    #[test]
    fn only_the_child_gets_the_sockets_while_it_starts() {
        let succession = Succession::default();
        let start = succession.start().unwrap();
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::BusyStarting);
        assert_eq!(succession.start().unwrap_err(), Refusal::BusyStarting);
        start.started(7);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        let lease = succession.grant(7).unwrap();
        // The child fails: its connection is gone first, then the child itself.
        drop(lease);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        drop(start);
        assert!(succession.grant(8).is_ok());
    }

    #[test]
    fn the_lease_of_a_child_that_was_given_up_ends_no_other_hand_over() {
        let succession = Succession::default();
        let start = succession.start().unwrap();
        start.started(7);
        let old = succession.grant(7).unwrap();
        // The child could not be ended, and its connection is still open.
        drop(start);
        let new = succession.grant(8).unwrap();
        assert_eq!(old.complete("1.0").unwrap_err(), Refusal::Busy(8));
        drop(old);
        assert_eq!(succession.grant(9).unwrap_err(), Refusal::Busy(8));
        new.complete("1.1").unwrap();
    }

    #[test]
    fn the_end_of_a_child_that_has_taken_over_changes_nothing() {
        let succession = Succession::default();
        let start = succession.start().unwrap();
        start.started(7);
        succession.grant(7).unwrap().complete("1.0").unwrap();
        drop(start);
        assert_eq!(*succession.watch().borrow(), Stage::Retired { pid: 7, version: "1.0".to_owned() });
    }

    #[test]
    fn moves_and_hand_overs_exclude_each_other() {
        let succession = Succession::default();
        let (first, second) = (succession.hold().unwrap(), succession.hold().unwrap());
        drop(first);
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::Moving);
        assert_eq!(succession.start().unwrap_err(), Refusal::Moving);
        drop(second);
        let start = succession.start().unwrap();
        start.started(7);
        let held =
            succession.hold().expect("a successor that still reads its configuration keeps no user from being moved");
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::Moving);
        drop(held);
        let lease = succession.grant(7).unwrap();
        assert_eq!(succession.hold().unwrap_err(), Refusal::HandingOver(7));
        drop(lease);
        let mut held: Vec<Holding> = (0..MAX_HELD).map(|_| succession.hold().unwrap()).collect();
        assert_eq!(succession.hold().unwrap_err(), Refusal::TooManyHeld);
        held.pop();
        assert!(succession.hold().is_ok());
        held.clear();
        succession.grant(7).unwrap().complete("1.0").unwrap();
        assert_eq!(succession.hold().unwrap_err(), Refusal::Retired(7));
        assert_eq!(succession.replaced(), Some(Refusal::Retired(7)));
    }

    #[test]
    fn a_stop_refuses_all_and_lasts() {
        let succession = Succession::default();
        let lease = succession.grant(7).unwrap();
        succession.stop();
        assert_eq!(lease.complete("1.0").unwrap_err(), Refusal::Stopping);
        drop(lease);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Stopping);
        assert_eq!(succession.start().unwrap_err(), Refusal::Stopping);
        assert!(succession.stopping().is_cancelled());
    }
}
