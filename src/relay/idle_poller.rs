//! Watches the sockets of parked sessions with one epoll, without a task or a buffer for each session.
//!
//! The registration of a socket with the runtime and a task took more memory than everything else in an idle session. A session
//! that has been silent for a while therefore leaves the runtime and is parked here with its two sockets. The first byte from
//! either side, its deadline, its cancellation or the end of the process unparks it. The sockets are watched level-triggered and
//! one-shot, so that bytes that arrived before are not missed. The poller does not know what a parked session is: it needs only
//! [`Parked`].

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::time::Duration;

use prometheus::IntGauge;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use slab::Slab;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Maximum number of events from one call.
const MAX_EVENTS: usize = 256;
/// Interval of the search for deadlines that have passed. Deadlines are half an hour or more, and would not need this precision.
/// But the runtime wakes itself, with two system calls, when a timer is set that is due before all others, which this interval
/// makes rare.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Free slots that are never given back.
const SPARE: usize = 256;

/// A session that can be parked.
pub(crate) trait Parked: Send + 'static {
    /// The two sockets to watch.
    fn sockets(&self) -> [BorrowedFd<'_>; 2];
    /// When the session must be unparked if nothing happens before.
    fn deadline(&self) -> Option<Instant>;
    /// Whether the session must be unparked at once. It is checked after a call of [`IdlePoller::waker`].
    fn is_cancelled(&self) -> bool;
    /// Continues the session. It is called on the runtime and must not block.
    fn unpark(self);
}

/// The parked sessions of one worker.
#[derive(Debug)]
pub(crate) struct IdlePoller<T> {
    epoll: AsyncFd<OwnedFd>,
    slots: Mutex<Slots<T>>,
    gauge: IntGauge,
    cancellations: Arc<Cancellations>,
    waker: Waker,
}

/// Notified when a parked session is cancelled; then all are checked. One for all takes no memory in a session.
#[derive(Debug, Default)]
struct Cancellations(Notify);

impl Wake for Cancellations {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

#[derive(Debug)]
struct Slots<T> {
    sessions: Slab<Slot<T>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Slot<T> {
    /// Copied from the session, so that a sweep over 100,000 sessions reads the memory of none.
    deadline: Option<Instant>,
    session: Box<T>,
}

impl<T: Parked> IdlePoller<T> {
    /// A poller without sessions. `gauge` shows their number.
    ///
    /// # Errors
    /// The system could not create an epoll instance.
    pub(crate) fn new(gauge: IntGauge) -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "it is unsound only for types that may change their descriptor, which OwnedFd does not"
        )]
        let epoll = AsyncFd::with_interest(epoll::create(CreateFlags::CLOEXEC)?, Interest::READABLE)?;
        let cancellations = Arc::new(Cancellations::default());
        let waker = Waker::from(cancellations.clone());
        let slots = Mutex::new(Slots { sessions: Slab::new(), is_closed: false });
        Ok(Self { epoll, slots, gauge, cancellations, waker })
    }

    /// The waker to call when a parked session has been cancelled.
    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Parks a session. It may be unparked before this returns.
    ///
    /// # Errors
    /// The poller is closed, or the system watches no more sockets (`fs.epoll.max_user_watches`): the session is returned.
    pub(crate) fn park(&self, session: Box<T>) -> Result<(), Box<T>> {
        let mut slots = self.lock();
        if slots.is_closed {
            return Err(session);
        }
        let slot = slots.sessions.vacant_entry();
        if let Err(error) = self.watch(slot.key(), session.sockets()) {
            tracing::warn!(%error, "silent session could not be parked and keeps its task");
            return Err(session);
        }
        slot.insert(Slot { deadline: session.deadline(), session });
        self.gauge.inc();
        Ok(())
    }

    /// Unparks sessions when bytes arrive, at their deadlines, and when they are cancelled. When `closing` is ready, unparks all
    /// sessions and returns; after that no session can be parked.
    pub(crate) async fn run(&self, closing: impl Future<Output = ()>) {
        let mut closing = pin!(closing);
        let mut sweep = interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = self.epoll.readable() => match ready {
                    Ok(mut ready) => if self.unpark_readable() == 0 {
                        ready.clear_ready();
                    },
                    Err(error) => {
                        tracing::error!(%error, "silent sessions cannot be watched any more; all of them are unparked");
                        break;
                    }
                },
                _ = sweep.tick() => self.unpark_due(),
                () = self.cancellations.0.notified() => self.unpark_cancelled(),
                () = &mut closing => break,
            }
            // Other tasks run also while there are many events.
            tokio::task::yield_now().await;
        }
        self.close();
    }

    /// Unparks the sessions of one batch of events. Returns the number of events.
    fn unpark_readable(&self) -> usize {
        let mut buffer = [const { MaybeUninit::uninit() }; MAX_EVENTS];
        let events: &[Event] = match epoll::wait(&self.epoll, &mut buffer, Some(&Timespec::default())) {
            Ok((events, _)) => events,
            Err(error) => {
                tracing::debug!(%error, "epoll_wait failed");
                return 0;
            }
        };
        for event in events {
            // The other socket of the session may have reported first. Then the slot is free, or has another session, which is
            // unparked without need and will be parked again.
            self.unpark(event.data.u64() as usize);
        }
        events.len()
    }

    fn unpark_due(&self) {
        let now = Instant::now();
        let due: Vec<usize> = {
            let mut slots = self.lock();
            if slots.sessions.len() * 4 + SPARE < slots.sessions.capacity() {
                // Gives memory back after a peak, up to the last slot in use.
                slots.sessions.shrink_to_fit();
            }
            let is_due = |slot: &Slot<T>| slot.deadline.is_some_and(|deadline| deadline <= now);
            slots.sessions.iter().filter_map(|(key, slot)| is_due(slot).then_some(key)).collect()
        };
        for key in due {
            self.unpark(key);
        }
    }

    fn unpark_cancelled(&self) {
        let cancelled: Vec<usize> = {
            let slots = self.lock();
            slots.sessions.iter().filter_map(|(key, slot)| slot.session.is_cancelled().then_some(key)).collect()
        };
        for key in cancelled {
            self.unpark(key);
        }
    }

    fn close(&self) {
        let sessions = {
            let mut slots = self.lock();
            slots.is_closed = true;
            std::mem::take(&mut slots.sessions)
        };
        for (_, slot) in sessions {
            self.release(*slot.session);
        }
    }

    fn unpark(&self, key: usize) {
        let slot = self.lock().sessions.try_remove(key);
        if let Some(slot) = slot {
            self.release(*slot.session);
        }
    }

    fn release(&self, session: T) {
        self.gauge.dec();
        for socket in session.sockets() {
            // An error means that the socket is not watched, which is the aim.
            let _ = epoll::delete(&self.epoll, socket);
        }
        session.unpark();
    }

    /// Watches both sockets, or none if that fails.
    fn watch(&self, key: usize, [first, second]: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        let data = EventData::new_u64(key as u64);
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        epoll::add(&self.epoll, first, data, flags)?;
        epoll::add(&self.epoll, second, data, flags).inspect_err(|_| {
            let _ = epoll::delete(&self.epoll, first);
        })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Slots<T>> {
        // No code that holds the lock panics halfway through a change.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
    use tokio_util::sync::CancellationToken;

    use super::*;

    struct TestSession {
        name: &'static str,
        sockets: [UnixStream; 2],
        deadline: Option<Instant>,
        cancelled: Arc<AtomicBool>,
        unparked: UnboundedSender<&'static str>,
    }

    impl Parked for TestSession {
        fn sockets(&self) -> [BorrowedFd<'_>; 2] {
            [self.sockets[0].as_fd(), self.sockets[1].as_fd()]
        }

        fn deadline(&self) -> Option<Instant> {
            self.deadline
        }

        fn is_cancelled(&self) -> bool {
            self.cancelled.load(Ordering::SeqCst)
        }

        fn unpark(self) {
            self.unparked.send(self.name).unwrap();
        }
    }

    struct Scene {
        poller: Arc<IdlePoller<TestSession>>,
        gauge: IntGauge,
        closing: CancellationToken,
        unparked: UnboundedReceiver<&'static str>,
        sender: UnboundedSender<&'static str>,
    }

    fn scene() -> Scene {
        let gauge = IntGauge::new("parked", "parked").unwrap();
        let poller = Arc::new(IdlePoller::new(gauge.clone()).unwrap());
        let (sender, unparked) = unbounded_channel();
        let closing = CancellationToken::new();
        let (running, token) = (poller.clone(), closing.clone());
        tokio::spawn(async move { running.run(token.cancelled()).await });
        Scene { poller, gauge, closing, unparked, sender }
    }

    impl Scene {
        /// A session, and the peers of its sockets.
        fn session(&self, name: &'static str, deadline: Option<Instant>) -> (Box<TestSession>, [UnixStream; 2]) {
            let (first, first_peer) = UnixStream::pair().unwrap();
            let (second, second_peer) = UnixStream::pair().unwrap();
            let (sockets, cancelled, unparked) = ([first, second], Arc::default(), self.sender.clone());
            let session = TestSession { name, sockets, deadline, cancelled, unparked };
            (Box::new(session), [first_peer, second_peer])
        }
    }

    #[tokio::test]
    async fn poller_unparks_one_session_for_a_byte_or_an_end_from_either_side() {
        let mut scene = scene();
        let (first, mut first_peers) = scene.session("first", None);
        let (second, mut second_peers) = scene.session("second", None);
        let (third, third_peers) = scene.session("third", None);
        let (silent, _silent_peers) = scene.session("silent", None);
        for session in [first, second, third, silent] {
            assert!(scene.poller.park(session).is_ok());
        }
        assert_eq!(scene.gauge.get(), 4);
        first_peers[0].write_all(b"x").unwrap();
        assert_eq!(scene.unparked.recv().await, Some("first"));
        second_peers[1].write_all(b"x").unwrap();
        assert_eq!(scene.unparked.recv().await, Some("second"));
        drop(third_peers);
        assert_eq!(scene.unparked.recv().await, Some("third"));
        assert_eq!(scene.gauge.get(), 1);
        assert!(scene.unparked.try_recv().is_err());
    }

    #[tokio::test]
    async fn poller_sees_bytes_that_arrived_before_parking() {
        let mut scene = scene();
        let (session, mut peers) = scene.session("early", None);
        peers[0].write_all(b"x").unwrap();
        peers[1].write_all(b"x").unwrap();
        assert!(scene.poller.park(session).is_ok());
        assert_eq!(scene.unparked.recv().await, Some("early"));
    }

    #[tokio::test(start_paused = true)]
    async fn poller_unparks_at_the_deadline() {
        let mut scene = scene();
        let began = Instant::now();
        let (session, _peers) = scene.session("due", Some(began + Duration::from_secs(1800)));
        assert!(scene.poller.park(session).is_ok());
        assert_eq!(scene.unparked.recv().await, Some("due"));
        assert!((1800..=1820).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn poller_unparks_a_cancelled_session() {
        let mut scene = scene();
        let (session, _peers) = scene.session("cancelled", None);
        let (silent, _silent_peers) = scene.session("silent", None);
        let cancelled = session.cancelled.clone();
        assert!(scene.poller.park(session).is_ok() && scene.poller.park(silent).is_ok());
        cancelled.store(true, Ordering::SeqCst);
        scene.poller.waker().wake_by_ref();
        assert_eq!(scene.unparked.recv().await, Some("cancelled"));
        assert_eq!(scene.gauge.get(), 1);
    }

    #[tokio::test]
    async fn closing_poller_unparks_all_sessions_and_parks_no_more() {
        let mut scene = scene();
        let (session, _peers) = scene.session("parked", None);
        let (late, _late_peers) = scene.session("late", None);
        assert!(scene.poller.park(session).is_ok());
        scene.closing.cancel();
        assert_eq!(scene.unparked.recv().await, Some("parked"));
        assert_eq!(scene.poller.park(late).err().map(|late| late.name), Some("late"));
        assert_eq!(scene.gauge.get(), 0);
    }
}
