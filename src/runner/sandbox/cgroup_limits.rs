//! Limits of control groups: what is written where for each, and which cannot be enforced here.

use std::{fs, io, path::Path};

use crate::config::runner::Limits;

/// Microseconds in which no more than the share of processor time can be used (cpu.max).
const PERIOD: u64 = 100_000;

/// What is written to which file of a group, for which limit.
#[derive(Clone, Debug)]
pub(super) struct CgroupSetting {
    pub file: &'static str,
    value: String,
    key: &'static str,
}

/// A configured limit that is not enforced here.
#[derive(Clone, Debug)]
pub(super) struct UnenforcedLimit {
    pub key: &'static str,
    pub reason: String,
}

/// What is written to the files of each group for `limits`.
pub(super) fn settings(limits: &Limits) -> Vec<CgroupSetting> {
    let mut settings = Vec::new();
    let mut set = |key, file, value| settings.push(CgroupSetting { file, value, key });
    set("limits.processes", "pids.max", limits.processes.to_string());
    if limits.memory.get() > 0 {
        let key = "limits.memory";
        set(key, "memory.max", limits.memory.get().to_string());
        set(key, "memory.swap.max", "0".to_owned());
        // All or nothing: what is left of an action without some of its processes is no result.
        set(key, "memory.oom.group", "1".to_owned());
    }
    if limits.processors > 0.0 {
        let quota = (limits.processors * PERIOD as f64) as u64;
        set("limits.processors", "cpu.max", format!("{quota} {PERIOD}"));
    }
    settings
}

impl CgroupSetting {
    /// The controller that the file is of.
    pub(super) fn controller(&self) -> &'static str {
        self.file.split('.').next().unwrap_or(self.file)
    }

    /// Writes it to a group.
    pub(super) fn apply(&self, group: &Path) -> io::Result<()> {
        // Not made where there is none: a file system of another kind would take it.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(group.join(self.file))?;
        io::Write::write_all(&mut file, self.value.as_bytes())
    }

    /// Why the limit is not enforced, after this error; `None` if nobody needs to know.
    pub(super) fn unenforced(&self, error: io::Error) -> Option<UnenforcedLimit> {
        let is_missing = error.kind() == io::ErrorKind::NotFound;
        let reason = match (self.file, is_missing) {
            // Then processes are limited for each user (setrlimit(2)).
            ("pids.max", true) => return None,
            // A kernel that does not count swap; there may be none.
            ("memory.swap.max", true) if !has_swap() => return None,
            ("memory.swap.max", true) => {
                "the kernel does not count swap, of which this host has some; boot it with \
                 swapaccount=1, or switch swap off"
                    .to_owned()
            }
            (file, true) => format!(
                "there is no {file}: the controller {} is not delegated to this daemon",
                self.controller()
            ),
            (file, false) => format!("{:?} could not be written to {file}: {error}", self.value),
        };
        Some(UnenforcedLimit {
            key: self.key,
            reason,
        })
    }
}

fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|table| table.lines().count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_the_kernel_does_not_take_is_told_with_its_file_and_reason() {
        let group = tempfile::tempdir().unwrap();
        // Refuses what is written.
        std::os::unix::fs::symlink("/dev/full", group.path().join("pids.max")).unwrap();
        fs::write(group.path().join("cpu.max"), "").unwrap();
        let limits = Limits {
            memory: crate::config::Size::mib(64),
            processors: 0.5,
            processes: 100,
            ..Limits::default()
        };
        let unenforced: Vec<UnenforcedLimit> = settings(&limits)
            .into_iter()
            .filter_map(|setting| setting.unenforced(setting.apply(group.path()).err()?))
            .collect();
        let reason_of = |key| {
            unenforced
                .iter()
                .find(|it| it.key == key)
                .map(|it| &*it.reason)
        };
        let reason = reason_of("limits.processes").unwrap();
        assert!(
            reason.contains("\"100\" could not be written to pids.max"),
            "{reason}"
        );
        let reason = reason_of("limits.memory").unwrap();
        assert!(
            reason.contains("controller memory is not delegated"),
            "{reason}"
        );
        assert_eq!(reason_of("limits.processors"), None);
        assert_eq!(
            fs::read_to_string(group.path().join("cpu.max")).unwrap(),
            "50000 100000"
        );
        // Without the controller, users' own limits do.
        fs::remove_file(group.path().join("pids.max")).unwrap();
        let first = settings(&limits).swap_remove(0);
        assert!(
            first
                .unenforced(first.apply(group.path()).unwrap_err())
                .is_none()
        );
    }
}
