//! Memory that bytes pass through, one piece for each worker thread: sessions own none while they are idle.

use std::cell::RefCell;
use std::io::IoSliceMut;
use std::ops::Range;

use super::pipe::Pipe;
use crate::record_layer::{Layout, MAX_PLAINTEXT, MAX_RECORD};

/// Full records that one round moves at most: a MiB of plaintext. A session whose peer stops taking them keeps up to as much
/// (`direction` says who gets that far). Twice as many records a round are an eighth less CPU a byte, up to here: the peers
/// are woken less often.
pub(super) const ROUND: usize = 64;
/// One of either buffer. Pages that no transfer has touched cost nothing.
const SIZE: usize = ROUND * MAX_RECORD;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        inbound: vec![0; SIZE].into_boxed_slice(),
        outbound: vec![0; SIZE].into_boxed_slice(),
        opened: Vec::new(),
        pipe: None,
    });
}

/// A worker's memory.
pub(super) struct Scratch {
    /// What a TLS peer sent: records, opened where they lie.
    pub(super) inbound: Box<[u8]>,
    /// What goes to a peer: plaintext with the room that records need around it.
    pub(super) outbound: Box<[u8]>,
    /// Where in `inbound` plaintext lies.
    pub(super) opened: Vec<Range<usize>>,
    /// For bulk between plain sockets; made when first needed, empty between two calls.
    pub(super) pipe: Option<Pipe>,
}

/// Lends the thread's memory.
pub(super) fn with<R>(use_it: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(use_it)
}

/// Distance from one slot of `outbound` to the next.
pub(super) fn stride(layout: Layout) -> usize {
    layout.prefix + MAX_PLAINTEXT + layout.suffix
}

impl Scratch {
    /// The plaintext of the first slot.
    pub(super) fn first_slot(&mut self, layout: Layout) -> &mut [u8] {
        &mut self.outbound[layout.prefix..][..MAX_PLAINTEXT]
    }

    /// The plaintexts of the slots behind the first, for one vectored read.
    pub(super) fn further_slots(&mut self, layout: Layout) -> [IoSliceMut<'_>; ROUND - 1] {
        let stride = stride(layout);
        let mut slots = self.outbound[stride..].chunks_exact_mut(stride);
        std::array::from_fn(|_| match slots.next() {
            Some(slot) => IoSliceMut::new(&mut slot[layout.prefix..layout.prefix + MAX_PLAINTEXT]),
            None => IoSliceMut::new(&mut []),
        })
    }

    /// Copies what was opened to the slots, without gaps. Returns how much it is.
    pub(super) fn gather(&mut self, layout: Layout) -> usize {
        let stride = stride(layout);
        let mut total = 0;
        for range in &self.opened {
            let mut piece = &self.inbound[range.clone()];
            while !piece.is_empty() {
                let (slot, at) = (total / MAX_PLAINTEXT, total % MAX_PLAINTEXT);
                let length = piece.len().min(MAX_PLAINTEXT - at);
                let place = slot * stride + layout.prefix + at;
                self.outbound[place..place + length].copy_from_slice(&piece[..length]);
                piece = &piece[length..];
                total += length;
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_has_room_for_a_round() {
        let layouts = [(0, 0), (5, 17), (5, 16), (13, 16)].map(|(prefix, suffix)| Layout { prefix, suffix });
        for layout in layouts {
            with(|scratch| {
                assert_eq!(scratch.first_slot(layout).len(), MAX_PLAINTEXT);
                assert!(scratch.further_slots(layout).iter().all(|slot| slot.len() == MAX_PLAINTEXT), "{layout:?}");
            });
        }
    }

    #[test]
    fn pieces_are_gathered_without_gaps() {
        let layout = Layout { prefix: 5, suffix: 17 };
        with(|scratch| {
            for (at, byte) in scratch.inbound.iter_mut().enumerate() {
                *byte = (at % 251) as u8;
            }
            scratch.opened = vec![10..20, 100..40_000, 50_000..50_001];
            let expected: Vec<u8> =
                scratch.opened.iter().flat_map(|range| scratch.inbound[range.clone()].to_vec()).collect();
            let total = scratch.gather(layout);
            assert_eq!(total, expected.len());
            let got: Vec<u8> = scratch
                .outbound
                .chunks(stride(layout))
                .flat_map(|slot| slot.iter().skip(5).take(MAX_PLAINTEXT).copied().collect::<Vec<_>>())
                .take(total)
                .collect();
            assert!(got == expected);
        });
    }
}
