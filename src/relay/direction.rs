//! One direction of a relayed session: sends to one leg what the other receives.

use std::task::{Context, Poll, ready};

use prometheus::IntCounter;
use tokio::time::Instant;

use super::MAX_ROUND;
use super::leg::{Broken, Finish, Leg, Received};
use super::scratch::{self, Scratch};
use super::socket::Socket;
use crate::record_layer::{MAX_PLAINTEXT, Violation};

/// Bytes that a session may move before other sessions of the worker run: one long round, or several short ones.
const TURN: usize = 16 * MAX_PLAINTEXT;

/// Minimum number of bytes that a TLS record counts for in a turn, because decrypting many short records takes more time than
/// moving their data.
const RECORD_COST: usize = 4096;

/// A round of N records is allowed only after 8·N full records have been relayed, so that the backlog of a peer that stops
/// reading is at most 1/8 of what it accepted before.
const RELAYED_PER_ROUND: u64 = 8;

/// A shorter read is part of a dialogue, not of a transfer.
const MIN_TRANSFER: usize = 4096;

/// The state of one direction.
#[derive(Debug)]
pub(super) struct Direction {
    /// Bytes that were read before the relay began, sent first.
    buffered: Vec<u8>,
    state: State,
    /// Whether a write to the receiver failed. A failed read does not set this.
    pub(super) write_failed: bool,
    /// Whether the end of the sender's stream is withheld from the receiver until this is reset.
    pub(super) delays_end: bool,
    /// Bytes moved so far.
    pub(super) moved: u64,
    counter: IntCounter,
    /// Number of records that the next round may read. It grows while the receiver accepts everything, so that the backlog of a
    /// receiver that does not is small.
    round: u8,
    stall: Option<Stall>,
}

/// A period in which the receiver accepts nothing of the bytes that wait for it.
#[derive(Debug, Clone, Copy)]
struct Stall {
    since: Instant,
    /// [`Leg::flushed`] at the begin of the period.
    flushed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The sender may still send.
    Open,
    /// The sender has finished, and the receiver has not been notified yet.
    Ending,
    Done,
}

/// Whether the receiver has accepted everything that was sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiver {
    KeepsUp,
    Backlogged,
}

impl Direction {
    pub(super) fn new(buffered: Vec<u8>, counter: IntCounter) -> Self {
        let (state, write_failed, delays_end) = (State::Open, false, false);
        Self { buffered, state, write_failed, delays_end, moved: 0, counter, round: 1, stall: None }
    }

    /// The direction of a session that was parked after it had moved `moved` bytes.
    pub(super) fn unparked(moved: u64, counter: IntCounter) -> Self {
        Self { moved, ..Self::new(Vec::new(), counter) }
    }

    /// Withholds the end of the sender's stream from the receiver until `delays_end` is reset.
    pub(super) fn delaying_end(self) -> Self {
        Self { delays_end: true, ..self }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether only the end of the sender's stream is left, and is withheld.
    pub(super) fn is_end_delayed(&self) -> bool {
        self.state == State::Ending && self.delays_end
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// How the other direction ends its stream: this direction uses the same sockets.
    pub(super) fn finish_of_other(&self) -> Finish {
        if self.is_done() { Finish::WithClose } else { Finish::HalfClose }
    }

    /// The time since when the receiver has accepted nothing although bytes wait for it.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.stall.map(|stall| stall.since)
    }

    /// Moves the bytes that are available. Ready when the direction is done; then the receiver's stream is ended as `finish`
    /// says.
    ///
    /// # Errors
    /// The sender violated the TLS protocol.
    pub(super) fn poll<S: Socket>(
        &mut self,
        context: &mut Context<'_>,
        from: &mut Leg<S>,
        to: &mut Leg<S>,
        finish: Finish,
    ) -> Poll<Result<(), Violation>> {
        if self.is_done() {
            return Poll::Ready(Ok(()));
        }
        let result = scratch::with(|scratch| self.poll_move(context, from, to, finish, scratch));
        self.update_stall(to);
        match ready!(result) {
            Ok(()) => {}
            Err(Broken::Tls(violation)) => return Poll::Ready(Err(violation)),
            Err(Broken::Socket(error)) => {
                tracing::debug!(%error, "relay: write failed");
                self.write_failed = true;
                to.discard_unsent();
            }
        }
        self.state = State::Done;
        Poll::Ready(Ok(()))
    }

    /// Ready when the direction is done. An error of a socket is the receiver's.
    fn poll_move<S: Socket>(
        &mut self,
        context: &mut Context<'_>,
        from: &mut Leg<S>,
        to: &mut Leg<S>,
        finish: Finish,
        scratch: &mut Scratch,
    ) -> Poll<Result<(), Broken>> {
        if !self.buffered.is_empty() {
            let buffered = std::mem::take(&mut self.buffered);
            self.count(buffered.len());
            to.poll_send_bytes(context, scratch, &buffered)?;
        }
        let mut moved = 0;
        while moved < TURN {
            ready!(to.poll_flush(context))?;
            if self.is_end_delayed() {
                return Poll::Pending;
            }
            if self.state == State::Ending {
                return to.poll_finish(context, finish).map_err(Broken::from);
            }
            match from.poll_receive(context, scratch, to.layout(), self.round.into()) {
                Poll::Pending => return Poll::Pending,
                // A broken connection and a TLS stream without close_notify are treated like a closed one. Whether mail was
                // lost is detected by IMAP, whose literals state their length.
                Poll::Ready(Err(Broken::Socket(error))) => {
                    tracing::debug!(%error, "relay: read failed");
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
                    let receiver = if to.has_unsent() { Receiver::Backlogged } else { Receiver::KeepsUp };
                    self.round = next_round(self.round, length, receiver, self.moved);
                }
            }
        }
        // There may be more to move, after other sessions have had their turn.
        context.waker().wake_by_ref();
        Poll::Pending
    }

    fn count(&mut self, length: usize) {
        self.moved += length as u64;
        self.counter.inc_by(length as u64);
    }

    fn update_stall<S: Socket>(&mut self, to: &Leg<S>) {
        let flushed = to.flushed();
        self.stall = match self.stall {
            _ if !to.has_unsent() => None,
            Some(stall) if stall.flushed == flushed => Some(stall),
            _ => Some(Stall { since: Instant::now(), flushed }),
        };
    }
}

/// Number of records that the next round may read, after a round of `round` records read `length` bytes; `moved` bytes have been
/// moved in total.
fn next_round(round: u8, length: usize, receiver: Receiver, moved: u64) -> u8 {
    let longer = (round * 2).min(MAX_ROUND as u8);
    match length {
        _ if receiver == Receiver::Backlogged => (round / 2).max(1),
        ..MIN_TRANSFER => 1,
        _ if length * 4 < usize::from(round) * MAX_PLAINTEXT * 3 => round,
        _ if moved < u64::from(longer) * MAX_PLAINTEXT as u64 * RELAYED_PER_ROUND => round,
        _ => longer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_grow_with_what_a_receiver_has_accepted() {
        let full = |round: u8| usize::from(round) * MAX_PLAINTEXT;
        let (mut round, mut moved) = (1, 0);
        while u64::from(round) < MAX_ROUND as u64 {
            moved += full(round) as u64;
            round = next_round(round, full(round), Receiver::KeepsUp, moved);
            assert!(full(round) as u64 <= moved / RELAYED_PER_ROUND || round == 1, "{round} after {moved}");
        }
        assert!(moved < 12 * MIB, "{moved}");
        let after = |length: usize, receiver| next_round(round, length, receiver, moved);
        assert_eq!(after(full(round), Receiver::KeepsUp), MAX_ROUND as u8, "the maximum");
        assert_eq!(after(full(round) / 2, Receiver::KeepsUp), round, "half a round does not change it");
        assert_eq!(after(MIN_TRANSFER - 1, Receiver::KeepsUp), 1, "a dialogue");
        assert_eq!(after(full(round), Receiver::Backlogged), round / 2, "a slow receiver");
        assert_eq!(next_round(1, full(1), Receiver::Backlogged, moved), 1, "the minimum");
    }
}
