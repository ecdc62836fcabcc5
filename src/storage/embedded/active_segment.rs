//! The segment that contents are appended to, and who writes to it.

use std::sync::Arc;

use super::segment::{AppendPosition, NewContent, Segment};

/// The segment that contents are appended to.
pub(super) struct ActiveSegment {
    pub segment: Arc<Segment>,
    pub end: AppendPosition,
}

/// A segment that somebody writes to.
pub(super) struct SegmentWrite(pub Arc<Segment>);

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
        self.segment.begin_writing();
        let writing = SegmentWrite(self.segment.clone());
        Some((writing, at, count, self.end.offset - at.offset))
    }
}
