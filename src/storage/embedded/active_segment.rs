//! The segment that contents are appended to, who writes to it, and who asks for the next one.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    super::Error,
    segment::{AppendPosition, NewContent, Segment},
};

/// The segment that contents are appended to.
pub(super) struct ActiveSegment {
    pub segment: Arc<Segment>,
    pub end: AppendPosition,
}

/// A segment that somebody writes to.
pub(super) struct SegmentWrite(pub Arc<Segment>);

impl SegmentWrite {
    pub(super) fn begin(segment: &Arc<Segment>) -> Self {
        segment.begin_writing();
        SegmentWrite(segment.clone())
    }
}

impl Drop for SegmentWrite {
    fn drop(&mut self) {
        self.0.end_writing();
    }
}

impl ActiveSegment {
    pub(super) fn fits(&self, size: u64) -> bool {
        self.end.offset + size <= self.segment.capacity()
            && self.end.slot < self.segment.slot_count()
    }

    /// Reserves room for as many contents as fit. `None` when the first does not.
    pub(super) fn take(
        &mut self,
        contents: &[NewContent],
    ) -> Option<(SegmentWrite, AppendPosition, usize, u64)> {
        let at = self.end;
        let mut count = 0;
        for new in contents {
            let size = new.content.len() as u64;
            if !self.fits(size) {
                break;
            }
            self.end = AppendPosition {
                offset: self.end.offset + size,
                slot: self.end.slot + 1,
            };
            count += 1;
        }
        if count == 0 {
            return None;
        }
        let writing = SegmentWrite::begin(&self.segment);
        Some((writing, at, count, self.end.offset - at.offset))
    }
}

/// The right to ask for the space of a new segment. One at a time has it; those who waited for him while he was
/// refused are refused as he was, since asking takes its time.
#[derive(Default)]
pub(super) struct SegmentRequest {
    last_refusal: Mutex<Option<Error>>,
    refusals: AtomicU64,
}

pub(super) struct SegmentRequestGuard<'a> {
    last_refusal: MutexGuard<'a, Option<Error>>,
    refusals: &'a AtomicU64,
}

impl SegmentRequest {
    /// How often somebody was refused.
    pub(super) fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Acquire)
    }

    pub(super) fn lock(&self) -> SegmentRequestGuard<'_> {
        SegmentRequestGuard {
            last_refusal: self.last_refusal.lock(),
            refusals: &self.refusals,
        }
    }
}

impl SegmentRequestGuard<'_> {
    /// What somebody was refused with after there had been so many refusals.
    pub(super) fn refused_since(&self, refusals: u64) -> Option<Error> {
        match self.refusals.load(Ordering::Acquire) == refusals {
            true => None,
            false => self.last_refusal.clone(),
        }
    }

    pub(super) fn refuse(mut self, error: Error) {
        *self.last_refusal = Some(error);
        self.refusals.fetch_add(1, Ordering::Release);
    }
}
