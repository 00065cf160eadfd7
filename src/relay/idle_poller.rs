//! Where silent sessions wait for a byte: one epoll over all of them, no task and no buffer for any.
//!
//! The runtime's own registration of a socket and a task cost more memory than all the rest of an idle session. So a
//! session that has been silent for a while leaves the runtime and comes in here, with its two sockets; the first byte
//! from either side, its time running out or the end of the process sends it out again. The sockets are watched by level and once, so
//! that what arrived on the way in is not missed. The room knows nothing of what waits in it: [`Waiting`] is all it asks.
//! Called by `session`; run by `server`.

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

/// Events taken with one call.
const EVENTS: usize = 256;
/// How exactly time limits are kept: they are half an hour and more. It is as short as this for another reason: the
/// runtime wakes itself, with two system calls, whenever a timer is set that is due before all others, and behind a
/// tick this near hardly any is.
const SWEEP: Duration = Duration::from_secs(1);
/// Free places that are kept without a thought.
const SPARE: usize = 256;

/// What can wait.
pub(crate) trait Waiting: Send + 'static {
    /// Both are watched.
    fn sockets(&self) -> [BorrowedFd<'_>; 2];
    /// Out again at this time, if not before.
    fn until(&self) -> Option<Instant>;
    /// Out again now. Asked when [`IdlePoller::waker`] is woken.
    fn is_called(&self) -> bool;
    /// Out again. Called on the runtime; must not block.
    fn leave(self);
}

/// See the module.
#[derive(Debug)]
pub(crate) struct IdlePoller<T> {
    epoll: AsyncFd<OwnedFd>,
    inside: Mutex<Inside<T>>,
    count: IntGauge,
    bell: Arc<Bell>,
    waker: Waker,
}

/// Rung when somebody inside is called; the room then asks everybody. One for all costs no session a byte.
#[derive(Debug, Default)]
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

#[derive(Debug)]
struct Inside<T> {
    sessions: Slab<Place<T>>,
    closed: bool,
}

#[derive(Debug)]
struct Place<T> {
    /// Beside the box, so that a sweep over a hundred thousand touches none of them.
    until: Option<Instant>,
    waiting: Box<T>,
}

impl<T: Waiting> IdlePoller<T> {
    /// Empty. `count` shows how many are inside.
    ///
    /// # Errors
    /// The system has no epoll instance to give.
    pub(crate) fn new(count: IntGauge) -> io::Result<Self> {
        #[expect(deprecated, reason = "its hole is types that may change their descriptor, and OwnedFd cannot")]
        let epoll = AsyncFd::with_interest(epoll::create(CreateFlags::CLOEXEC)?, Interest::READABLE)?;
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        Ok(Self { epoll, inside: Mutex::new(Inside { sessions: Slab::new(), closed: false }), count, bell, waker })
    }

    /// To be woken when somebody inside is called.
    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Takes a session in. It may leave again before this returns.
    ///
    /// # Errors
    /// The room is closed, or the system watches no more sockets (`fs.epoll.max_user_watches`): the session is given back.
    pub(crate) fn enter(&self, waiting: Box<T>) -> Result<(), Box<T>> {
        let mut inside = self.lock();
        if inside.closed {
            return Err(waiting);
        }
        let entry = inside.sessions.vacant_entry();
        let key = entry.key();
        if let Err(error) = self.watch(key, waiting.sockets()) {
            tracing::warn!(%error, "a silent session could not be put aside and keeps its task");
            return Err(waiting);
        }
        entry.insert(Place { until: waiting.until(), waiting });
        self.count.inc();
        Ok(())
    }

    /// Lets sessions out when it is time. Returns when `closing` is done and all are out; none comes in after that.
    pub(crate) async fn run(&self, closing: impl Future<Output = ()>) {
        let mut closing = pin!(closing);
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = self.epoll.readable() => match ready {
                    Ok(mut ready) => if self.serve() {
                        ready.clear_ready();
                    },
                    Err(error) => {
                        tracing::error!(%error, "silent sessions cannot be watched any more and are all let out");
                        break;
                    }
                },
                _ = sweep.tick() => self.sweep(),
                () = self.bell.0.notified() => self.let_out_called(),
                () = &mut closing => break,
            }
            // A storm of events leaves room for others.
            tokio::task::yield_now().await;
        }
        self.close();
    }

    /// Lets out whom the events name, one batch. Whether there were none.
    fn serve(&self) -> bool {
        let mut buffer = [const { MaybeUninit::uninit() }; EVENTS];
        let events: &[Event] = match epoll::wait(&self.epoll, &mut buffer, Some(&Timespec::default())) {
            Ok((events, _)) => events,
            Err(error) => {
                tracing::debug!(%error, "no events");
                return true;
            }
        };
        for event in events {
            // Of a session's two sockets the other may have been faster: then its place is empty, or another's, who
            // goes out for nothing and comes back.
            self.let_out(event.data.u64() as usize);
        }
        events.is_empty()
    }

    fn sweep(&self) {
        let now = Instant::now();
        let due: Vec<usize> = {
            let mut inside = self.lock();
            if inside.sessions.len() * 4 + SPARE < inside.sessions.capacity() {
                // After a peak; as far as the last place in use.
                inside.sessions.shrink_to_fit();
            }
            let due = |(key, place): (usize, &Place<T>)| place.until.is_some_and(|until| until <= now).then_some(key);
            inside.sessions.iter().filter_map(due).collect()
        };
        for key in due {
            self.let_out(key);
        }
    }

    fn let_out_called(&self) {
        let called: Vec<usize> = {
            let inside = self.lock();
            inside.sessions.iter().filter_map(|(key, place)| place.waiting.is_called().then_some(key)).collect()
        };
        for key in called {
            self.let_out(key);
        }
    }

    fn close(&self) {
        let left = {
            let mut inside = self.lock();
            inside.closed = true;
            std::mem::take(&mut inside.sessions)
        };
        for (_, place) in left {
            self.release(place);
        }
    }

    fn let_out(&self, key: usize) {
        let place = self.lock().sessions.try_remove(key);
        if let Some(place) = place {
            self.release(place);
        }
    }

    fn release(&self, place: Place<T>) {
        self.count.dec();
        for socket in place.waiting.sockets() {
            // A socket that is not watched is what is wanted.
            let _ = epoll::delete(&self.epoll, socket);
        }
        place.waiting.leave();
    }

    /// Watches both or none.
    fn watch(&self, key: usize, [first, second]: [BorrowedFd<'_>; 2]) -> io::Result<()> {
        let data = EventData::new_u64(key as u64);
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        epoll::add(&self.epoll, first, data, flags)?;
        epoll::add(&self.epoll, second, data, flags).inspect_err(|_| {
            let _ = epoll::delete(&self.epoll, first);
        })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inside<T>> {
        // Nothing in here panics halfway through a change.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use std::os::fd::AsFd;

    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
    use tokio_util::sync::CancellationToken;

    use super::*;

    struct Pair {
        name: &'static str,
        sockets: [UnixStream; 2],
        until: Option<Instant>,
        called: Arc<AtomicBool>,
        left: UnboundedSender<&'static str>,
    }

    impl Waiting for Pair {
        fn sockets(&self) -> [BorrowedFd<'_>; 2] {
            [self.sockets[0].as_fd(), self.sockets[1].as_fd()]
        }

        fn until(&self) -> Option<Instant> {
            self.until
        }

        fn is_called(&self) -> bool {
            self.called.load(Ordering::SeqCst)
        }

        fn leave(self) {
            self.left.send(self.name).unwrap();
        }
    }

    struct Scene {
        room: Arc<IdlePoller<Pair>>,
        count: IntGauge,
        closing: CancellationToken,
        left: UnboundedReceiver<&'static str>,
        leave: UnboundedSender<&'static str>,
    }

    fn scene() -> Scene {
        let count = IntGauge::new("waiting", "waiting").unwrap();
        let room = Arc::new(IdlePoller::new(count.clone()).unwrap());
        let (leave, left) = unbounded_channel();
        let closing = CancellationToken::new();
        let (running, token) = (room.clone(), closing.clone());
        tokio::spawn(async move { running.run(token.cancelled()).await });
        Scene { room, count, closing, left, leave }
    }

    impl Scene {
        /// A session's other ends.
        fn pair(&self, name: &'static str, until: Option<Instant>) -> (Box<Pair>, [UnixStream; 2]) {
            let (first, far_first) = UnixStream::pair().unwrap();
            let (second, far_second) = UnixStream::pair().unwrap();
            let (sockets, called, left) = ([first, second], Arc::default(), self.leave.clone());
            let pair = Pair { name, sockets, until, called, left };
            (Box::new(pair), [far_first, far_second])
        }
    }

    #[tokio::test]
    async fn a_byte_from_either_side_or_an_end_lets_one_out_and_no_other() {
        let mut scene = scene();
        let (first, mut far_first) = scene.pair("first", None);
        let (second, mut far_second) = scene.pair("second", None);
        let (third, far_third) = scene.pair("third", None);
        let (silent, _far_silent) = scene.pair("silent", None);
        for pair in [first, second, third, silent] {
            assert!(scene.room.enter(pair).is_ok());
        }
        assert_eq!(scene.count.get(), 4);
        far_first[0].write_all(b"x").unwrap();
        assert_eq!(scene.left.recv().await, Some("first"));
        far_second[1].write_all(b"x").unwrap();
        assert_eq!(scene.left.recv().await, Some("second"));
        drop(far_third);
        assert_eq!(scene.left.recv().await, Some("third"));
        assert_eq!(scene.count.get(), 1);
        assert!(scene.left.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_arrived_before_is_not_missed() {
        let mut scene = scene();
        let (pair, mut far) = scene.pair("early", None);
        far[0].write_all(b"x").unwrap();
        far[1].write_all(b"x").unwrap();
        assert!(scene.room.enter(pair).is_ok());
        assert_eq!(scene.left.recv().await, Some("early"));
    }

    #[tokio::test(start_paused = true)]
    async fn time_lets_one_out() {
        let mut scene = scene();
        let began = Instant::now();
        let (pair, _far) = scene.pair("timed", Some(began + Duration::from_secs(1800)));
        assert!(scene.room.enter(pair).is_ok());
        assert_eq!(scene.left.recv().await, Some("timed"));
        assert!((1800..=1820).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn who_is_called_goes_out() {
        let mut scene = scene();
        let (pair, _far) = scene.pair("called", None);
        let (silent, _far_silent) = scene.pair("silent", None);
        let called = pair.called.clone();
        assert!(scene.room.enter(pair).is_ok() && scene.room.enter(silent).is_ok());
        called.store(true, Ordering::SeqCst);
        scene.room.waker().wake_by_ref();
        assert_eq!(scene.left.recv().await, Some("called"));
        assert_eq!(scene.count.get(), 1);
    }

    #[tokio::test]
    async fn a_closing_room_lets_all_out_and_none_in() {
        let mut scene = scene();
        let (pair, _far) = scene.pair("inside", None);
        let (late, _far_late) = scene.pair("late", None);
        assert!(scene.room.enter(pair).is_ok());
        scene.closing.cancel();
        assert_eq!(scene.left.recv().await, Some("inside"));
        assert_eq!(scene.room.enter(late).err().map(|late| late.name), Some("late"));
        assert_eq!(scene.count.get(), 0);
    }
}
