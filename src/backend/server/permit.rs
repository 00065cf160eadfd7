//! What one login occupies at a server, and the session that follows from it.
//!
//! A login obtains a [`ServerPermit`] before it connects. With complete credentials it counts against `max_sessions`;
//! while it waits for the client's next SASL response it does not, so that unauthenticated clients cannot fill a server.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::sasl_exchanges::SaslExchange;
use super::{Server, ServerState};
use crate::backend::capacity::{Capacity, HasCapacity, Permit};
use crate::backend::disconnect_spreader::SpreadDisconnect;
use crate::backend::health::Trial;
use crate::metrics::GaugeGuard;

/// What a login occupies at a server.
#[derive(Debug)]
pub struct ServerPermit {
    state: Arc<ServerState>,
    trial: Option<TrialGuard>,
    claim: Claim,
}

/// What a login is counted as.
#[derive(Debug)]
enum Claim {
    /// A session, which counts against `max_sessions`.
    Session(Permit<ServerState>),
    /// A SASL exchange that waits for its client.
    Exchange(SaslExchange),
}

/// Whether a login's credentials are complete when it asks for a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum PermitKind {
    /// They are: the login counts as a session.
    Session,
    /// The client has to respond to a challenge first.
    Exchange,
}

impl HasCapacity for ServerState {
    fn capacity(&self) -> &Capacity<Self> {
        &self.capacity
    }
}

impl ServerPermit {
    /// A permit of this kind, unless the server has `max_sessions` already.
    pub(in crate::backend) fn try_take(server: &Server, kind: PermitKind) -> Option<Self> {
        let limit = server.settings.max_sessions;
        match kind {
            PermitKind::Session => Permit::try_take(&server.state, limit).map(|permit| Self::session(server, permit)),
            PermitKind::Exchange => {
                let is_free = limit.is_none_or(|limit| server.state.capacity.taken() < limit);
                is_free.then(|| Self::exchange(server))
            }
        }
    }

    /// A login that was granted `permit`, which is the server's.
    pub(in crate::backend) fn session(server: &Server, permit: Permit<ServerState>) -> Self {
        Self { state: server.state.clone(), trial: None, claim: Claim::Session(permit) }
    }

    /// A login that begins with a SASL exchange.
    pub(in crate::backend) fn exchange(server: &Server) -> Self {
        Self { state: server.state.clone(), trial: None, claim: Claim::Exchange(server.enter_exchange()) }
    }

    /// Stops counting against `max_sessions` while the client is asked for the rest of its credentials.
    pub fn begin_exchange(&mut self, server: &Server) {
        if self.is_session() {
            self.claim = Claim::Exchange(server.enter_exchange());
        }
    }

    /// Counts as a session from now on, with the permit of `session`, which is at the same server.
    pub(in crate::backend) fn end_exchange(&mut self, session: Self) {
        debug_assert!(!self.is_session(), "two permits for one login");
        self.claim = session.claim;
    }

    /// Waits until newer exchanges have displaced this one; forever if it counts as a session.
    pub async fn displaced(&self) {
        match &self.claim {
            Claim::Exchange(exchange) => exchange.displaced().await,
            Claim::Session(_) => pending().await,
        }
    }

    /// Whether it counts against `max_sessions`.
    pub(in crate::backend) fn is_session(&self) -> bool {
        matches!(self.claim, Claim::Session(_))
    }

    /// Makes this login the one that tries out a failing server, until it ends.
    pub(super) fn with_trial(mut self, trial: Trial) -> Self {
        self.trial = Some(TrialGuard { state: self.state.clone(), trial });
        self
    }

    /// The server has accepted the login.
    pub fn established(self) -> SessionPermit {
        let Self { state, trial, claim } = self;
        drop(trial);
        let permit = match claim {
            Claim::Session(permit) => permit,
            // Callers end the exchange first. If one did not, the session must be counted all the same.
            Claim::Exchange(_) => Permit::take_over_limit(&state),
        };
        state.metrics.session_opened();
        state.disconnects().session_opened();
        SessionPermit(Some(permit))
    }
}

/// A login that tries out a failing server. If it ends without a result, the next login may try.
#[derive(Debug)]
struct TrialGuard {
    state: Arc<ServerState>,
    trial: Trial,
}

impl Drop for TrialGuard {
    fn drop(&mut self) {
        self.state.end_trial(self.trial);
    }
}

/// An established session on a server. One pointer, because every idle session holds one.
#[derive(Debug)]
pub struct SessionPermit(Option<Permit<ServerState>>);

/// What happens to the client of a session that the server has closed.
#[derive(Debug)]
pub struct DelayedDisconnect {
    /// Time for which the client stays connected.
    pub delay: Duration,
    /// Number of sessions that the server had, if it has just closed half of them. Set for one session only.
    pub half_of: Option<u32>,
    /// Counts the client in the metrics until it is disconnected.
    pub gauge: GaugeGuard,
}

impl SessionPermit {
    /// The server has closed the session without being asked, which frees the permit at once. Returns whether and how long
    /// its client stays connected, at most `max_delay`.
    pub fn closed_by_server(&mut self, max_delay: Duration) -> Option<DelayedDisconnect> {
        let state = self.0.take()?;
        let SpreadDisconnect { delay, half_of } =
            state.disconnects().session_cut_off(Instant::now().into_std(), max_delay);
        let disconnect =
            (!delay.is_zero()).then(|| DelayedDisconnect { delay, half_of, gauge: state.metrics.disconnect_pending() });
        state.metrics.session_closed();
        disconnect
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        if let Some(state) = self.0.take() {
            state.disconnects().session_ended();
            state.metrics.session_closed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::capacity::{LimitedOwner, QueueLength};
    use crate::deadline::Deadline;

    fn take(server: &Server) -> Option<ServerPermit> {
        ServerPermit::try_take(server, PermitKind::Session)
    }

    #[test]
    fn session_closed_by_its_server_frees_its_permit_once() {
        let server = Server::for_tests("a", Some(2));
        let mut sessions = [(); 2].map(|()| take(&server).unwrap().established());
        let max_delay = Duration::from_secs(30);
        assert!(sessions[0].closed_by_server(max_delay).is_none(), "a single one");
        let disconnect = sessions[1].closed_by_server(max_delay).unwrap();
        assert_eq!((disconnect.delay, disconnect.half_of), (Duration::from_millis(100), None));
        assert_eq!(server.sessions(), 0);
        drop((sessions, disconnect));
        assert_eq!((server.sessions(), server.metrics().sessions()), (0, 0));
        assert!(take(&server).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn exchange_does_not_count_against_max_sessions() {
        let (server, queue) = (Server::for_tests("a", Some(1)), QueueLength::default());
        let mut exchanges: Vec<ServerPermit> = (0..20).map(|_| ServerPermit::exchange(&server)).collect();
        assert!(futures_util::poll!(Box::pin(exchanges[18].displaced())).is_ready(), "a newer one displaces it");
        assert!(futures_util::poll!(Box::pin(exchanges[19].displaced())).is_pending());
        assert_eq!(server.sessions(), 0);
        let mut first = take(&server).unwrap();
        let owners = [LimitedOwner { owner: server.state.clone(), limit: Some(1) }];
        let deadline = Deadline::after(Duration::from_secs(60));
        let mut waiting = Box::pin(queue.enter(9).unwrap().wait(&owners, deadline));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        // While its client is asked, the permit is the next login's.
        first.begin_exchange(&server);
        first.begin_exchange(&server);
        let second = ServerPermit::session(&server, waiting.await.unwrap());
        assert_eq!(server.sessions(), 1);
        drop(first);
        assert_eq!(server.sessions(), 1, "it had no permit to return");
        let mut complete = exchanges.pop().unwrap();
        complete.end_exchange(second);
        assert_eq!(server.sessions(), 1);
        drop(exchanges);
        assert!(futures_util::poll!(Box::pin(complete.displaced())).is_pending());
        drop(complete.established());
        assert_eq!(server.sessions(), 0);
    }

    #[test]
    fn session_permit_is_a_pointer() {
        assert_eq!(size_of::<SessionPermit>(), size_of::<usize>());
    }
}
