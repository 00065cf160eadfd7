//! A bounded queue between the threads that log and the one thread that writes to standard error.
//!
//! A reader that does not read the log must not stop logins: a line that does not fit into the queue is dropped and counted.
//! Lines keep their order, and a line is written whole. When the reader goes on, one line reports how many were dropped.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Maximum size of the lines that wait. The lines that are being written are at most as many again.
const QUEUE_BYTES: usize = 1 << 20;
/// Lines are written together up to this size, which a pipe takes at once or not at all (PIPE_BUF). Lines of two processes that
/// share a pipe, as during an upgrade, therefore do not mix.
const ATOMIC_WRITE: usize = 4096;
/// A buffer that has grown beyond this size is given back after use.
const KEPT_CAPACITY: usize = 64 << 10;

/// The queue. The handle is shared; each call of [`io::Write::write`] on it is one line.
pub(crate) struct LogQueue {
    state: Mutex<State>,
    /// Notified when there is something to write.
    filled: Condvar,
    /// Notified when everything is written.
    emptied: Condvar,
    /// Set when the metrics exist; lines that were dropped before are counted then.
    counter: OnceLock<IntCounter>,
}

/// Lines in the order in which they were logged.
#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    is_writing: bool,
    /// Number of lines dropped since the last report.
    unreported: u64,
    /// Number of lines dropped that the counter does not include.
    uncounted: u64,
}

impl State {
    /// Adds a line if it fits. After a line was dropped, so are all others until the queue has been taken, so that the report
    /// stands at the place of the gap.
    fn push(&mut self, line: &[u8]) -> bool {
        let fits = self.unreported == 0 && self.waiting.len() + line.len() <= QUEUE_BYTES;
        if fits {
            self.waiting.extend_from_slice(line);
        }
        fits
    }

    fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.unreported > 0
    }
}

impl LogQueue {
    /// Starts the thread that writes what is logged to `output`; `report` logs the number of dropped lines.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub(crate) fn start(output: impl AsFd + Send + 'static, report: fn(u64)) -> io::Result<Arc<Self>> {
        let queue = Arc::new(Self {
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            counter: OnceLock::new(),
        });
        let writer = queue.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || writer.write_forever(&output, report))?;
        Ok(queue)
    }

    /// Counts dropped lines in `counter`, those dropped so far included. A second call changes nothing.
    pub(crate) fn count_in(&self, counter: IntCounter) {
        let mut state = self.lock();
        if self.counter.set(counter).is_ok() {
            let earlier = std::mem::take(&mut state.uncounted);
            self.count(&mut state, earlier);
        }
    }

    /// Waits until everything logged so far is written, but not longer than `limit`.
    pub(crate) fn flush(&self, limit: Duration) {
        let due = Instant::now() + limit;
        let mut state = self.lock();
        while state.is_writing || state.has_work() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.emptied.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        let had_work = state.has_work();
        if !state.push(line) {
            state.unreported += 1;
            self.count(&mut state, 1);
        }
        drop(state);
        if !had_work {
            self.filled.notify_one();
        }
    }

    fn count(&self, state: &mut State, lines: u64) {
        match self.counter.get() {
            Some(counter) => counter.inc_by(lines),
            None => state.uncounted += lines,
        }
    }

    fn write_forever(&self, output: &impl AsFd, report: fn(u64)) {
        let mut lines = Vec::new();
        let mut unreported = 0;
        let mut is_writable = true;
        loop {
            unreported += self.take(&mut lines);
            // The queue was just emptied, so the report fits. While writing fails it would fail too, and be reported in turn.
            if is_writable && unreported > 0 {
                report(std::mem::take(&mut unreported));
            }
            let failed = atomic_parts(&lines).filter(|part| write_all(output, part).is_err()).map(count_lines).sum();
            is_writable = failed == 0;
            unreported += failed;
            let mut state = self.lock();
            self.count(&mut state, failed);
            state.is_writing = false;
            if !state.has_work() {
                self.emptied.notify_all();
            }
        }
    }

    /// Waits for lines and exchanges `lines` for them. Returns the number of lines that were dropped after them.
    fn take(&self, lines: &mut Vec<u8>) -> u64 {
        lines.clear();
        lines.shrink_to(KEPT_CAPACITY);
        let mut state = self.lock();
        while !state.has_work() {
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.waiting, lines);
        state.is_writing = true;
        std::mem::take(&mut state.unreported)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No operation under the lock can panic between two changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LogQueue {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("LogQueue").finish_non_exhaustive()
    }
}

impl io::Write for &LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Parts of `lines` that end at the end of a line and are at most [`ATOMIC_WRITE`] bytes, except for longer single lines.
fn atomic_parts(mut lines: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let end_in = |bytes: &[u8]| bytes.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        let first_line = |bytes: &[u8]| bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let end = match lines {
            [] => return None,
            short if short.len() <= ATOMIC_WRITE => short.len(),
            long => end_in(&long[..ATOMIC_WRITE]).or_else(|| first_line(long)).unwrap_or(long.len()),
        };
        let (part, rest) = lines.split_at(end);
        lines = rest;
        Some(part)
    })
}

fn count_lines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Writes everything, and waits for a reader whether or not the descriptor is non-blocking, which another process may have made it.
fn write_all(output: &impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(output, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(output, PollFlags::OUT)], None)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn ignore(_: u64) {}

    fn pipe() -> (File, std::os::fd::OwnedFd) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        (File::from(reader), writer)
    }

    #[test]
    fn a_reader_that_does_not_read_costs_lines_and_no_time() {
        let (reader, writer) = pipe();
        let queue = LogQueue::start(writer, ignore).unwrap();
        let line = |number: u32| format!("{number:07} {}\n", "x".repeat(91));
        let logged = 50_000;
        for number in 0..logged {
            (&*queue).write_all(line(number).as_bytes()).unwrap();
        }
        queue.flush(Duration::from_millis(1));
        let counter = IntCounter::new("dropped", "Dropped.").unwrap();
        queue.count_in(counter.clone());
        let dropped = counter.get();
        // 5 MB were logged; the two buffers and the pipe hold a bit more than 2 MiB.
        let bound = (2 * QUEUE_BYTES + (1 << 17)) as u64 / 100;
        assert!(dropped >= u64::from(logged) - bound, "{dropped} lines were dropped");

        // Once it is read, everything that was kept arrives, whole and in order.
        let kept = u64::from(logged) - dropped;
        let mut lines = BufReader::new(reader).lines();
        let mut last = None;
        for _ in 0..kept {
            let text = lines.next().unwrap().unwrap();
            let number: u32 = text[..7].parse().unwrap();
            assert_eq!(format!("{text}\n"), line(number));
            assert!(last < Some(number), "{number} came after {last:?}");
            last = Some(number);
        }
        queue.flush(PATIENCE);
        (&*queue).write_all(line(logged).as_bytes()).unwrap();
        assert_eq!(lines.next().unwrap().unwrap() + "\n", line(logged), "and it goes on");
        assert_eq!(counter.get(), dropped);
    }

    #[test]
    fn after_a_dropped_line_nothing_is_queued_until_the_report() {
        let mut state = State::default();
        assert!(state.push(&vec![b'a'; QUEUE_BYTES - 1]) && state.push(b"b"));
        assert!(!state.push(b"c"));
        state.unreported = 1;
        state.waiting.clear();
        assert!(!state.push(b"d"), "it would stand before the report");
        state.unreported = 0;
        assert!(state.push(b"e"));
    }

    #[test]
    fn a_flush_waits_for_the_output_and_not_longer_than_its_limit() {
        let (mut reader, writer) = pipe();
        let queue = LogQueue::start(writer, ignore).unwrap();
        (&*queue).write_all(&vec![b'x'; QUEUE_BYTES]).unwrap();
        let began = Instant::now();
        queue.flush(Duration::from_millis(50));
        assert!((Duration::from_millis(50)..PATIENCE).contains(&began.elapsed()));
        let read = thread::spawn(move || {
            let mut bytes = vec![0; QUEUE_BYTES];
            reader.read_exact(&mut bytes).map(|()| reader)
        });
        queue.flush(PATIENCE);
        let state = queue.lock();
        assert!(!state.is_writing && !state.has_work());
        drop(state);
        read.join().unwrap().unwrap();
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let queue = LogQueue::start(full, ignore).unwrap();
        let counter = IntCounter::new("dropped", "Dropped.").unwrap();
        queue.count_in(counter.clone());
        for _ in 0..3 {
            (&*queue).write_all(b"line\n").unwrap();
        }
        queue.flush(PATIENCE);
        assert_eq!(counter.get(), 3);
    }

    #[test]
    fn parts_end_with_a_line() {
        let (short, long) = ("s".repeat(999) + "\n", "l".repeat(5000) + "\n");
        let text = [short.repeat(6), long.clone(), short.clone()].concat();
        let parts: Vec<&[u8]> = atomic_parts(text.as_bytes()).collect();
        let expected = [short.repeat(4), short.repeat(2), long, short];
        assert_eq!(parts, expected.iter().map(String::as_bytes).collect::<Vec<_>>());
        assert_eq!(atomic_parts(&[b'x'; 5000]).count(), 1, "a long text without an end is one part");
        assert_eq!(atomic_parts(b"").count(), 0);
    }
}
