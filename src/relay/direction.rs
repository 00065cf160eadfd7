//! One way of a relayed session: what one leg receives, the other sends.

use std::task::{Context, Poll, ready};

use prometheus::IntCounter;
use tokio::time::Instant;

use super::leg::{Broken, Leg, Received, Socket};
use super::scratch::{self, ROUND, Scratch};
use crate::record_layer::{MAX_PLAINTEXT, Violation};

/// Moved before other sessions of the worker get their turn: one long round, or several short ones.
const TURN: usize = 16 * MAX_PLAINTEXT;

/// A TLS record counts for a turn like this many bytes at least: opening short ones costs more than moving their data.
const RECORD_COST: usize = 4096;

/// A session has moved so many times as much before a round is that long: what a peer that stops reading leaves here is a
/// small part of what it took.
const PROVEN: u64 = 8;

/// Less than this is conversation, not transfer.
const LINE: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Direction {
    /// Goes first: read before the relay began.
    opening: Vec<u8>,
    state: State,
    /// Writing failed, not reading.
    pub(super) write_failed: bool,
    /// The receiver is not told of the sender's end until this is taken away.
    pub(super) keeps_end: bool,
    pub(super) moved: u64,
    counter: IntCounter,
    /// Records a round: grows while the receiver takes all of them, so that one who does not keeps little here.
    round: u8,
    /// Since when the receiver has taken nothing of what waits for it, and how far it was then.
    stalled: Option<(Instant, u64)>,
}

/// How many records the next round may read. `length` came with the last, `waits`: the receiver did not take all of it,
/// `moved`: so much in all.
fn next_round(round: u8, length: usize, waits: bool, moved: u64) -> u8 {
    let longer = (round * 2).min(ROUND as u8);
    match length {
        _ if waits => (round / 2).max(1),
        ..LINE => 1,
        _ if length * 4 < usize::from(round) * MAX_PLAINTEXT * 3 => round,
        _ if moved < u64::from(longer) * MAX_PLAINTEXT as u64 * PROVEN => round,
        _ => longer,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The sender may still send.
    Open,
    /// The sender has finished; the receiver is yet to be told.
    Ending,
    Done,
}

impl Direction {
    pub(super) fn new(opening: Vec<u8>, counter: IntCounter) -> Self {
        let (state, write_failed, keeps_end) = (State::Open, false, false);
        Self { opening, state, write_failed, keeps_end, moved: 0, counter, round: 1, stalled: None }
    }

    /// As after a rest.
    pub(super) fn resumed(moved: u64, counter: IntCounter) -> Self {
        Self { moved, ..Self::new(Vec::new(), counter) }
    }

    /// The receiver is not told of the end by itself.
    pub(super) fn keeping_end(self) -> Self {
        Self { keeps_end: true, ..self }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether the sender has finished, all it said has gone out, and the receiver is not told yet.
    pub(super) fn is_kept(&self) -> bool {
        self.state == State::Ending && self.keeps_end
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Since when the receiver has taken nothing, while something waits for it.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.stalled.map(|(since, _)| since)
    }

    /// Moves what there is. Ready when the direction is done. `last`: the other direction is.
    ///
    /// # Errors
    /// The sender broke the rules of TLS.
    pub(super) fn poll<S: Socket>(
        &mut self,
        context: &mut Context<'_>,
        from: &mut Leg<S>,
        to: &mut Leg<S>,
        last: bool,
    ) -> Poll<Result<(), Violation>> {
        if self.is_done() {
            return Poll::Ready(Ok(()));
        }
        let result = scratch::with(|scratch| self.poll_move(context, from, to, last, scratch));
        self.watch(to);
        match ready!(result) {
            Ok(()) => {}
            Err(Broken::Tls(violation)) => return Poll::Ready(Err(violation)),
            Err(Broken::Socket(error)) => {
                tracing::debug!(%error, "a relayed write failed");
                self.write_failed = true;
                to.discard_unsent();
            }
        }
        self.state = State::Done;
        Poll::Ready(Ok(()))
    }

    /// Ready when the direction is done; a socket's error is the receiver's.
    fn poll_move<S: Socket>(
        &mut self,
        context: &mut Context<'_>,
        from: &mut Leg<S>,
        to: &mut Leg<S>,
        last: bool,
        scratch: &mut Scratch,
    ) -> Poll<Result<(), Broken>> {
        if !self.opening.is_empty() {
            let opening = std::mem::take(&mut self.opening);
            self.count(opening.len());
            to.poll_send_bytes(context, scratch, &opening)?;
        }
        let mut moved = 0;
        while moved < TURN {
            ready!(to.poll_flush(context))?;
            if self.is_kept() {
                return Poll::Pending;
            }
            if self.state == State::Ending {
                return to.poll_finish(context, last).map_err(Broken::from);
            }
            match from.poll_receive(context, scratch, to.layout(), self.round.into()) {
                Poll::Pending => return Poll::Pending,
                // A broken connection and a TLS stream cut off without close_notify end like a closed one: whether
                // mail was lost is for the protocol above to notice, and it does (literals carry their length).
                Poll::Ready(Err(Broken::Socket(error))) => {
                    tracing::debug!(%error, "a relayed read failed");
                    self.state = State::Ending;
                }
                Poll::Ready(Err(violation)) => return Poll::Ready(Err(violation)),
                Poll::Ready(Ok(Received::End)) => self.state = State::Ending,
                Poll::Ready(Ok(received)) => {
                    let (Received::InSlots(length) | Received::Opened(length) | Received::InPipe(length)) = received
                    else {
                        continue;
                    };
                    self.count(length);
                    moved += length.max(from.take_records_opened() * RECORD_COST);
                    to.poll_send(context, scratch, received)?;
                    self.round = next_round(self.round, length, to.has_unsent(), self.moved);
                }
            }
        }
        // There may be more: after the others.
        context.waker().wake_by_ref();
        Poll::Pending
    }

    fn count(&mut self, length: usize) {
        self.moved += length as u64;
        self.counter.inc_by(length as u64);
    }

    /// Notes whether the receiver gets on.
    fn watch<S: Socket>(&mut self, to: &Leg<S>) {
        self.stalled = match self.stalled {
            _ if !to.has_unsent() => None,
            Some((since, flushed)) if flushed == to.flushed() => Some((since, flushed)),
            _ => Some((Instant::now(), to.flushed())),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_grow_with_what_a_receiver_has_taken() {
        let full = |round: u8| usize::from(round) * MAX_PLAINTEXT;
        let (mut round, mut moved) = (1, 0);
        while u64::from(round) < ROUND as u64 {
            moved += full(round) as u64;
            round = next_round(round, full(round), false, moved);
            assert!(full(round) as u64 <= moved / PROVEN || round == 1, "{round} after {moved}");
        }
        assert!(moved < 12 * MIB, "{moved}");
        assert_eq!(next_round(round, full(round), false, moved), ROUND as u8, "no longer than that");
        assert_eq!(next_round(round, full(round) / 2, false, moved), round, "as long as there is much");
        assert_eq!(next_round(round, LINE - 1, false, moved), 1, "a line");
        assert_eq!(next_round(round, full(round), true, moved), round / 2, "a slow receiver");
        assert_eq!(next_round(1, full(1), true, moved), 1);
    }
}
