//! What the outputs of one action may come to, so that whatever a command leaves is collected within
//! bounds of size, number, time and memory.
//!
//! 1. Sizes are known before anything is read: a file that is too large costs nothing.
//! 2. Each inode counts, and is read, once, however many names it has.
//! 3. Past a bound there is a fault that names it, and nothing more is collected.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::{config::Size, text::shorten, worker::fault::Fault};

/// Files, directories and symbolic links of one action's outputs.
pub(super) const MAXIMUM_ENTRIES: u64 = 2_000_000;
/// Of all Directory messages of one action's outputs, which are in memory until their Tree is whole.
const MAXIMUM_DIRECTORIES_SIZE: u64 = 256 << 20;
/// Clients receive messages of 4 MiB unless they were told otherwise (gRPC's default). The lists of
/// outputs leave room for the rest of an ExecuteResponse, and for the Operation around it.
pub(super) const MAXIMUM_LISTS_SIZE: u64 = (4 << 20) - (256 << 10);

/// What one action's outputs may come to.
#[derive(Clone, Copy, Debug)]
pub struct OutputLimits {
    /// Of all files together; `outputs.maximum_size`.
    pub size: u64,
    /// Of one file, as the storage says.
    pub blob_size: u64,
    /// `outputs.timeout`, and when it is over.
    pub timeout: Duration,
    pub deadline: Instant,
}

/// What is left of the limits.
pub(super) struct Bounds<'a> {
    limits: OutputLimits,
    cancel: &'a CancellationToken,
    size: u64,
    entries: u64,
    directories: u64,
    lists: u64,
    exceeded: bool,
}

impl<'a> Bounds<'a> {
    pub(super) fn new(limits: OutputLimits, cancel: &'a CancellationToken) -> Self {
        Bounds {
            limits,
            cancel,
            size: 0,
            entries: 0,
            directories: 0,
            lists: 0,
            exceeded: false,
        }
    }

    /// Whether there is no point in going on.
    pub(super) fn are_exceeded(&self) -> bool {
        self.exceeded
    }

    fn exceed<T>(&mut self, fault: Fault) -> Result<T, Fault> {
        self.exceeded = true;
        Err(fault)
    }

    /// Whether there is time left.
    pub(super) fn check_time(&mut self) -> Result<(), Fault> {
        match self.time().check() {
            Ok(()) => Ok(()),
            Err(fault) => self.exceed(fault),
        }
    }

    /// For whoever reads a file piece by piece.
    pub(super) fn time(&self) -> ReadDeadline<'a> {
        ReadDeadline {
            cancel: self.cancel,
            timeout: self.limits.timeout,
            deadline: self.limits.deadline,
        }
    }

    /// A file that is to be read.
    pub(super) fn add_file(&mut self, size: u64, text: &str) -> Result<(), Fault> {
        if size > self.limits.blob_size {
            return Err(Fault::Invalid(format!(
                "output {:?} has {size} bytes, but the Content Addressable Storage takes no blob of more than {} bytes",
                shorten(text),
                self.limits.blob_size
            )));
        }
        let sum = self.size.saturating_add(size);
        if sum > self.limits.size {
            return Err(Fault::Invalid(format!(
                "the outputs have more than {}, {size} bytes of them in {:?}; outputs.maximum_size in bb_worker.toml is the limit",
                Size(self.limits.size),
                shorten(text)
            )));
        }
        self.size = sum;
        Ok(())
    }

    /// A file that was counted and not read.
    pub(super) fn give_back(&mut self, size: u64) {
        self.size = self.size.saturating_sub(size);
    }

    /// An entry of an output directory.
    pub(super) fn add_entry(&mut self) -> Result<(), Fault> {
        self.entries += 1;
        match self.entries > MAXIMUM_ENTRIES {
            false => Ok(()),
            true => self.exceed(Fault::Invalid(format!(
                "the outputs have more than {MAXIMUM_ENTRIES} files, directories and symbolic links"
            ))),
        }
    }

    /// A part of a Directory message.
    pub(super) fn add_to_directory(&mut self, size: usize) -> Result<(), Fault> {
        self.directories = self.directories.saturating_add(size as u64);
        match self.directories > MAXIMUM_DIRECTORIES_SIZE {
            false => Ok(()),
            true => self.exceed(Fault::Invalid(format!(
                "the output directories take messages of more than {}",
                Size(MAXIMUM_DIRECTORIES_SIZE)
            ))),
        }
    }

    /// An element of the lists of outputs in the result.
    pub(super) fn add_to_lists(&mut self, size: usize) -> Result<(), Fault> {
        // Its tag and length.
        self.lists = self.lists.saturating_add(size as u64 + 6);
        match self.lists > MAXIMUM_LISTS_SIZE {
            false => Ok(()),
            true => self.exceed(Fault::Invalid(format!(
                "the list of outputs takes more than {} bytes, so that clients could not receive the result; \
                 declare fewer outputs, such as one directory instead of the files in it",
                MAXIMUM_LISTS_SIZE
            ))),
        }
    }
}

/// Until when files are read.
#[derive(Clone, Copy)]
pub(super) struct ReadDeadline<'a> {
    cancel: &'a CancellationToken,
    timeout: Duration,
    deadline: Instant,
}

impl ReadDeadline<'_> {
    pub(super) fn check(&self) -> Result<(), Fault> {
        if self.cancel.is_cancelled() {
            return Err(Fault::Cancelled);
        }
        match Instant::now() > self.deadline {
            false => Ok(()),
            true => Err(late(self.timeout)),
        }
    }
}

/// Outputs that took too long. Whether they are many or the host is slow is not known, so that it
/// may work elsewhere, and says nothing of this host.
pub fn late(timeout: Duration) -> Fault {
    Fault::Contended(format!(
        "the outputs could not be collected within {}; outputs.timeout in bb_worker.toml is the limit",
        humantime::format_duration(timeout)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> OutputLimits {
        OutputLimits {
            size: 100,
            blob_size: 60,
            timeout: Duration::from_secs(60),
            deadline: Instant::now() + Duration::from_secs(60),
        }
    }

    #[test]
    fn a_file_that_is_too_large_takes_nothing_from_those_that_are_not() {
        let cancel = CancellationToken::new();
        let mut bounds = Bounds::new(limits(), &cancel);
        for too_large in [61, 1 << 42, u64::MAX] {
            let refused = bounds.add_file(too_large, "f").unwrap_err();
            assert!(refused.to_string().contains("60 bytes"), "{refused}");
        }
        bounds.add_file(60, "f").unwrap();
        let refused = bounds.add_file(41, "f").unwrap_err().to_string();
        assert!(refused.contains("outputs.maximum_size"), "{refused}");
        bounds.add_file(40, "f").unwrap();
        assert!(!bounds.are_exceeded());
    }

    #[test]
    fn past_a_bound_of_number_or_time_nothing_more_is_collected() {
        let cancel = CancellationToken::new();
        let mut bounds = Bounds::new(limits(), &cancel);
        let most = MAXIMUM_LISTS_SIZE as usize - 6;
        bounds.add_to_lists(most).unwrap();
        assert!(!bounds.are_exceeded());
        assert!(bounds.add_to_lists(0).is_err());
        assert!(bounds.are_exceeded());
        let mut bounds = Bounds::new(limits(), &cancel);
        for _ in 0..MAXIMUM_ENTRIES {
            bounds.add_entry().unwrap();
        }
        assert!(bounds.add_entry().is_err());
        assert!(bounds.are_exceeded());
        let over = OutputLimits {
            deadline: Instant::now() - Duration::from_secs(1),
            ..limits()
        };
        let mut bounds = Bounds::new(over, &cancel);
        assert!(matches!(bounds.check_time(), Err(Fault::Contended(_))));
        assert!(bounds.are_exceeded());
        cancel.cancel();
        assert_eq!(bounds.check_time(), Err(Fault::Cancelled));
    }
}
