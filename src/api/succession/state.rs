//! The state of a replacement in the predecessor. At most one successor can take over at a time.
//!
//! [`Phase`] is the state machine, a pure value; [`Succession`] shares it between the tasks of the process. A phase that belongs
//! to one successor ends when its guard ([`Launch`], [`HandoverGrant`]) is dropped, so a failed attempt leaves the process
//! ready for the next one.
//!
//! Holds of users and handovers exclude each other, because a successor does not know the holds of its predecessor: no sockets
//! are granted during a hold ([`HoldPermit`]), and no hold begins after the grant.

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// Maximum number of holds at a time.
pub(in crate::api) const MAX_HOLDS: usize = 500;

/// The phase of a replacement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// This process serves, and there is no successor.
    Idle,
    /// This process is about to start a successor.
    Launching,
    /// This process has started a successor, which has not requested the listening sockets yet.
    Launched { pid: u32 },
    /// A successor has been granted the listening sockets.
    HandingOver { pid: u32, origin: Origin },
    /// The successor serves, and this process finishes its sessions.
    Retired { pid: u32, version: String },
    /// This process is stopping.
    Stopping,
}

/// The starter of a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// This process, for `vestibule upgrade`.
    Launched,
    /// An operator, with `vestibule run --replace`.
    Operator,
}

/// The reason why a replacement cannot begin or continue.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(in crate::api) enum Refusal {
    #[error("another successor (pid {0}) is taking over: try again when it has succeeded or failed")]
    Busy(u32),
    #[error("another successor is being started: try again when it has succeeded or failed")]
    BusyLaunching,
    #[error("a successor (pid {0}) is taking over: try again when it has succeeded or failed")]
    HandingOver(u32),
    #[error("a user is being moved: try again when that is done")]
    HoldInProgress,
    #[error("{MAX_HOLDS} users are being moved: try again later")]
    TooManyHolds,
    #[error("this process has been replaced: send the command to its successor (pid {0})")]
    Retired(u32),
    #[error("this process is stopping")]
    Stopping,
}

impl Phase {
    fn launch(&self) -> Result<Self, Refusal> {
        match self {
            Self::Idle => Ok(Self::Launching),
            other => Err(other.refusal()),
        }
    }

    /// Grants the listening sockets to the successor with this process id.
    fn grant(&self, pid: u32) -> Result<Self, Refusal> {
        match self {
            Self::Idle => Ok(Self::HandingOver { pid, origin: Origin::Operator }),
            Self::Launched { pid: launched } if *launched == pid => {
                Ok(Self::HandingOver { pid, origin: Origin::Launched })
            }
            other => Err(other.refusal()),
        }
    }

    /// Revokes the grant of a successor that has failed. A successor that this process launched may still be running.
    fn revoke(&self, successor: u32) -> Self {
        match self {
            Self::HandingOver { pid, origin: Origin::Launched } if *pid == successor => Self::Launched { pid: *pid },
            Self::HandingOver { pid, origin: Origin::Operator } if *pid == successor => Self::Idle,
            other => other.clone(),
        }
    }

    /// Ends the attempt of the successor that this process launched, because it has ended or could not be started.
    fn abandon(&self) -> Self {
        match self {
            Self::Launching | Self::Launched { .. } | Self::HandingOver { origin: Origin::Launched, .. } => Self::Idle,
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

    /// The refusal of a request that this phase does not allow.
    fn refusal(&self) -> Refusal {
        match self {
            Self::Idle | Self::Launching => Refusal::BusyLaunching,
            Self::Launched { pid } | Self::HandingOver { pid, .. } => Refusal::Busy(*pid),
            Self::Retired { pid, .. } => Refusal::Retired(*pid),
            Self::Stopping => Refusal::Stopping,
        }
    }
}

/// The phase of this process, shared between its tasks.
#[derive(Debug, Clone)]
pub(crate) struct Succession {
    phase: Arc<watch::Sender<Phase>>,
    stopping: CancellationToken,
    /// One permit for each hold that may still begin.
    holds: Arc<Semaphore>,
}

impl Default for Succession {
    fn default() -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Idle)),
            stopping: CancellationToken::new(),
            holds: Arc::new(Semaphore::new(MAX_HOLDS)),
        }
    }
}

impl Succession {
    /// Marks the process as stopping: no replacement can begin or be completed from now on.
    pub(crate) fn stop(&self) {
        self.phase.send_replace(Phase::Stopping);
        self.stopping.cancel();
    }

    /// Returns the reason why the configuration cannot be reloaded, if there is one: a successor has copies of the sockets of the
    /// present configuration.
    pub(crate) fn reload_refusal(&self) -> Option<String> {
        match &*self.phase.borrow() {
            Phase::HandingOver { pid, .. } => {
                Some(format!("a successor (pid {pid}) is taking over: reload again when it has succeeded or failed"))
            }
            Phase::Retired { pid, .. } => Some(Refusal::Retired(*pid).to_string()),
            Phase::Idle | Phase::Launching | Phase::Launched { .. } | Phase::Stopping => None,
        }
    }

    pub(super) fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Whether the path of the control socket belongs to this process.
    pub(in crate::api) fn owns_control_path(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Idle | Phase::Launching | Phase::Launched { .. })
    }

    /// Waits until the process id of a successor that is being launched is known.
    pub(in crate::api) async fn launched(&self) {
        let mut phases = self.subscribe();
        // `self` has the sender, so it is not dropped meanwhile.
        let _ = phases.wait_for(|phase| *phase != Phase::Launching).await;
    }

    /// Returns a refusal if operators' commands must go to the successor.
    pub(in crate::api) fn retired(&self) -> Option<Refusal> {
        match &*self.phase.borrow() {
            Phase::Retired { pid, .. } => Some(Refusal::Retired(*pid)),
            _ => None,
        }
    }

    /// Reserves a hold of a user.
    pub(in crate::api) fn hold(&self) -> Result<HoldPermit, Refusal> {
        // The phase cannot change while it is borrowed, so no handover begins before the permit is taken.
        match &*self.phase.borrow() {
            Phase::HandingOver { pid, .. } => Err(Refusal::HandingOver(*pid)),
            Phase::Retired { pid, .. } => Err(Refusal::Retired(*pid)),
            Phase::Idle | Phase::Launching | Phase::Launched { .. } | Phase::Stopping => {
                self.holds.clone().try_acquire_owned().map(HoldPermit).map_err(|_| Refusal::TooManyHolds)
            }
        }
    }

    /// Must be called during a change of the phase, so that no hold begins meanwhile.
    fn without_holds(&self, next: Phase) -> Result<Phase, Refusal> {
        if self.holds.available_permits() < MAX_HOLDS { Err(Refusal::HoldInProgress) } else { Ok(next) }
    }

    pub(super) fn launch(&self) -> Result<Launch, Refusal> {
        self.change(|phase| self.without_holds(phase.launch()?))?;
        Ok(Launch(self.clone()))
    }

    pub(in crate::api) fn grant(&self, pid: u32) -> Result<HandoverGrant, Refusal> {
        self.change(|phase| self.without_holds(phase.grant(pid)?))?;
        Ok(HandoverGrant { succession: self.clone(), pid })
    }

    fn change(&self, change: impl FnOnce(&Phase) -> Result<Phase, Refusal>) -> Result<(), Refusal> {
        let mut result = Ok(());
        self.phase.send_if_modified(|phase| match change(phase) {
            Ok(next) => {
                *phase = next;
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

/// The right to hold a user. No handover begins until it is dropped.
#[derive(Debug)]
pub(in crate::api) struct HoldPermit(#[expect(dead_code, reason = "held for its Drop")] OwnedSemaphorePermit);

/// The right to launch a successor. Dropping it ends the attempt.
#[derive(Debug)]
pub(super) struct Launch(Succession);

impl Launch {
    /// Records the process id of the successor.
    pub(super) fn set_pid(&self, pid: u32) {
        self.0.phase.send_if_modified(|phase| {
            let is_launching = *phase == Phase::Launching;
            if is_launching {
                *phase = Phase::Launched { pid };
            }
            is_launching
        });
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        self.0.phase.send_modify(|phase| *phase = phase.abandon());
    }
}

/// The right of one successor to the listening sockets. Dropping it revokes the right, unless the handover was completed.
#[derive(Debug)]
pub(in crate::api) struct HandoverGrant {
    succession: Succession,
    pid: u32,
}

impl HandoverGrant {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Completes the handover, because the successor serves.
    pub(super) fn complete(&self, version: &str) -> Result<(), Refusal> {
        self.succession.change(|phase| phase.retire(self.pid, version))
    }
}

impl Drop for HandoverGrant {
    fn drop(&mut self) {
        self.succession.phase.send_modify(|phase| *phase = phase.revoke(self.pid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_successor_takes_over_at_a_time() {
        let succession = Succession::default();
        let grant = succession.grant(7).unwrap();
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        assert_eq!(succession.launch().unwrap_err(), Refusal::Busy(7));
        assert!(!succession.owns_control_path() && succession.reload_refusal().is_some());
        drop(grant);
        assert!(succession.owns_control_path() && succession.reload_refusal().is_none());
        let grant = succession.grant(8).unwrap();
        grant.complete("1.0").unwrap();
        drop(grant);
        assert_eq!(succession.grant(9).unwrap_err(), Refusal::Retired(8));
        assert_eq!(succession.launch().unwrap_err(), Refusal::Retired(8));
    }

    #[test]
    fn only_the_launched_successor_is_granted_the_sockets() {
        let succession = Succession::default();
        let launch = succession.launch().unwrap();
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::BusyLaunching);
        assert_eq!(succession.launch().unwrap_err(), Refusal::BusyLaunching);
        launch.set_pid(7);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        let grant = succession.grant(7).unwrap();
        // The successor fails: its connection is closed before the process ends.
        drop(grant);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Busy(7));
        drop(launch);
        assert!(succession.grant(8).is_ok());
    }

    #[test]
    fn grant_of_an_abandoned_successor_does_not_end_another_hand_over() {
        let succession = Succession::default();
        let launch = succession.launch().unwrap();
        launch.set_pid(7);
        let old = succession.grant(7).unwrap();
        // The successor could not be terminated, and its connection is still open.
        drop(launch);
        let new = succession.grant(8).unwrap();
        assert_eq!(old.complete("1.0").unwrap_err(), Refusal::Busy(8));
        drop(old);
        assert_eq!(succession.grant(9).unwrap_err(), Refusal::Busy(8));
        new.complete("1.1").unwrap();
    }

    #[test]
    fn end_of_a_launched_successor_after_its_takeover_changes_nothing() {
        let succession = Succession::default();
        let launch = succession.launch().unwrap();
        launch.set_pid(7);
        succession.grant(7).unwrap().complete("1.0").unwrap();
        drop(launch);
        assert_eq!(*succession.subscribe().borrow(), Phase::Retired { pid: 7, version: "1.0".to_owned() });
    }

    #[test]
    fn holds_and_hand_overs_exclude_each_other() {
        let succession = Succession::default();
        let (first, second) = (succession.hold().unwrap(), succession.hold().unwrap());
        drop(first);
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::HoldInProgress);
        assert_eq!(succession.launch().unwrap_err(), Refusal::HoldInProgress);
        drop(second);
        let launch = succession.launch().unwrap();
        launch.set_pid(7);
        let holds = succession.hold().expect("a hold is possible while a successor reads its configuration");
        assert_eq!(succession.grant(7).unwrap_err(), Refusal::HoldInProgress);
        drop(holds);
        let grant = succession.grant(7).unwrap();
        assert_eq!(succession.hold().unwrap_err(), Refusal::HandingOver(7));
        drop(grant);
        let mut holds: Vec<HoldPermit> = (0..MAX_HOLDS).map(|_| succession.hold().unwrap()).collect();
        assert_eq!(succession.hold().unwrap_err(), Refusal::TooManyHolds);
        holds.pop();
        assert!(succession.hold().is_ok());
        holds.clear();
        succession.grant(7).unwrap().complete("1.0").unwrap();
        assert_eq!(succession.hold().unwrap_err(), Refusal::Retired(7));
        assert_eq!(succession.retired(), Some(Refusal::Retired(7)));
    }

    #[test]
    fn stop_refuses_all_requests_for_good() {
        let succession = Succession::default();
        let grant = succession.grant(7).unwrap();
        succession.stop();
        assert_eq!(grant.complete("1.0").unwrap_err(), Refusal::Stopping);
        drop(grant);
        assert_eq!(succession.grant(8).unwrap_err(), Refusal::Stopping);
        assert_eq!(succession.launch().unwrap_err(), Refusal::Stopping);
        assert!(succession.stopping().is_cancelled());
    }
}
