//! Buffers that relayed bytes pass through, one set for each worker thread, so that an idle session owns none.

use std::cell::RefCell;
use std::io::IoSliceMut;
use std::ops::Range;

use super::MAX_ROUND;
use super::pipe::Pipe;
use crate::record_layer::{Layout, MAX_PLAINTEXT, MAX_RECORD};

/// Size of each buffer. Pages that no transfer has touched take no memory.
const SIZE: usize = MAX_ROUND * MAX_RECORD;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        inbound: vec![0; SIZE].into_boxed_slice(),
        outbound: vec![0; SIZE].into_boxed_slice(),
        opened: Vec::new(),
        pipe: None,
    });
}

/// The buffers of one worker.
pub(super) struct Scratch {
    /// TLS records from a peer, decrypted in place.
    pub(super) inbound: Box<[u8]>,
    /// Plaintext for a peer, in slots that leave space for the header and the tag of a record.
    pub(super) outbound: Box<[u8]>,
    /// Ranges of plaintext in `inbound`.
    pub(super) opened: Vec<Range<usize>>,
    /// The pipe for large transfers between plain sockets: created on first use, empty between two calls.
    pub(super) pipe: Option<Pipe>,
}

/// Calls `use_scratch` with the buffers of this thread.
pub(super) fn with<R>(use_scratch: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(use_scratch)
}

/// Distance from one slot of `outbound` to the next.
pub(super) fn stride(layout: Layout) -> usize {
    layout.prefix + MAX_PLAINTEXT + layout.suffix
}

impl Scratch {
    /// Space for the plaintext of the first slot.
    pub(super) fn first_slot(&mut self, layout: Layout) -> &mut [u8] {
        &mut self.outbound[layout.prefix..][..MAX_PLAINTEXT]
    }

    /// Space for the plaintext of all slots after the first, for one vectored read.
    pub(super) fn further_slots(&mut self, layout: Layout) -> [IoSliceMut<'_>; MAX_ROUND - 1] {
        let stride = stride(layout);
        let mut slots = self.outbound[stride..].chunks_exact_mut(stride);
        std::array::from_fn(|_| match slots.next() {
            Some(slot) => IoSliceMut::new(&mut slot[layout.prefix..layout.prefix + MAX_PLAINTEXT]),
            None => IoSliceMut::new(&mut []),
        })
    }

    /// Copies the decrypted plaintext to the slots without gaps. Returns its length.
    pub(super) fn gather(&mut self, layout: Layout) -> usize {
        let stride = stride(layout);
        let mut total = 0;
        for range in &self.opened {
            let mut piece = &self.inbound[range.clone()];
            while !piece.is_empty() {
                let (slot, offset) = (total / MAX_PLAINTEXT, total % MAX_PLAINTEXT);
                let length = piece.len().min(MAX_PLAINTEXT - offset);
                let start = slot * stride + layout.prefix + offset;
                self.outbound[start..start + length].copy_from_slice(&piece[..length]);
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
    fn buffers_hold_a_full_round_in_every_layout() {
        let layouts = [(0, 0), (5, 17), (5, 16), (13, 16)].map(|(prefix, suffix)| Layout { prefix, suffix });
        for layout in layouts {
            with(|scratch| {
                assert_eq!(scratch.first_slot(layout).len(), MAX_PLAINTEXT);
                assert!(scratch.further_slots(layout).iter().all(|slot| slot.len() == MAX_PLAINTEXT), "{layout:?}");
            });
        }
    }

    #[test]
    fn gather_leaves_no_gaps() {
        let layout = Layout { prefix: 5, suffix: 17 };
        with(|scratch| {
            for (index, byte) in scratch.inbound.iter_mut().enumerate() {
                *byte = (index % 251) as u8;
            }
            scratch.opened = vec![10..20, 100..40_000, 50_000..50_001];
            let expected: Vec<u8> =
                scratch.opened.iter().flat_map(|range| scratch.inbound[range.clone()].to_vec()).collect();
            let total = scratch.gather(layout);
            assert_eq!(total, expected.len());
            let gathered: Vec<u8> = scratch
                .outbound
                .chunks(stride(layout))
                .flat_map(|slot| slot.iter().skip(5).take(MAX_PLAINTEXT).copied().collect::<Vec<_>>())
                .take(total)
                .collect();
            assert!(gathered == expected, "gathered bytes differ");
        });
    }
}
