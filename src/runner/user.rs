//! The Unix users that actions run as, one for each action that is running.
//!
//! 1. No two running actions have the same user.
//! 2. A user is given back only when no process of it lives; one whose processes could not be
//!    killed is retired.
//! 3. The user that was given back last is given out last, so that whatever may stick to a number
//!    is as old as possible.

use std::{
    collections::VecDeque,
    fs,
    ops::Range,
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::runner;

#[derive(Debug)]
pub struct Users {
    free: Mutex<VecDeque<u32>>,
    /// One for each in `free`.
    permits: Arc<Semaphore>,
    range: Range<u32>,
    retired: AtomicU32,
}

/// A user (and group, of the same number) that is one action's own.
#[derive(Debug)]
pub struct User {
    id: u32,
    users: Arc<Users>,
    // Dropped after `drop` has put the number back.
    permit: Option<OwnedSemaphorePermit>,
}

/// The administrator must act, or the worker ask for less at once.
#[derive(Debug, thiserror::Error)]
#[error(
    "all {0} users are in use; give users.count of bb_runner.toml at least the sum of all workers' concurrency"
)]
pub struct AllInUse(u32);

impl Users {
    pub fn new(config: &runner::Users) -> Arc<Self> {
        let range = config.range();
        Arc::new(Users {
            permits: Arc::new(Semaphore::new(range.len())),
            free: Mutex::new(range.clone().collect()),
            range,
            retired: AtomicU32::new(0),
        })
    }

    /// Waits for a user that nobody has.
    pub async fn take(self: &Arc<Self>, patience: Duration) -> Result<User, AllInUse> {
        let permit = tokio::time::timeout(patience, self.permits.clone().acquire_owned()).await;
        let all_in_use = || AllInUse(self.range.len() as u32);
        let Ok(Ok(permit)) = permit else {
            return Err(all_in_use());
        };
        let id = self.free.lock().pop_front().ok_or_else(all_in_use)?;
        Ok(User {
            id,
            users: self.clone(),
            permit: Some(permit),
        })
    }

    /// Users that an action has now.
    pub fn in_use(&self) -> usize {
        (self.usable() as usize).saturating_sub(self.permits.available_permits())
    }

    /// Users that were not retired.
    fn usable(&self) -> u32 {
        self.range.len() as u32 - self.retired.load(Ordering::Relaxed)
    }

    pub fn all_retired(&self) -> bool {
        self.usable() == 0
    }

    /// Waits until every user was given back, so that no action runs.
    pub async fn all_back(&self, patience: Duration) -> bool {
        let all = self.usable();
        tokio::time::timeout(patience, self.permits.acquire_many(all))
            .await
            .is_ok_and(|permits| permits.is_ok())
    }
}

impl User {
    /// Both uid and gid.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Never to be given out again by this runner.
    pub fn retire(mut self) {
        if let Some(permit) = self.permit.take() {
            permit.forget();
            self.users.retired.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.users.free.lock().push_back(self.id);
        }
    }
}

/// Whether a process or zombie of this user exists; costs less than a microsecond if not.
pub fn has_processes(id: u32) -> bool {
    // SAFETY: takes and returns numbers only. -1 is also a priority, hence errno.
    let (priority, errno) = unsafe {
        *libc::__errno_location() = 0;
        let priority = libc::getpriority(libc::PRIO_USER, id);
        (priority, *libc::__errno_location())
    };
    !(priority == -1 && errno == libc::ESRCH)
}

/// Kills every process of a user, until none is left but zombies, which the init process reaps.
///
/// False when some were left after `patience`.
pub fn sweep(id: u32, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    while has_processes(id) {
        reap_orphans(id);
        if !any_alive(id) {
            return true;
        }
        kill_all(id);
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    true
}

/// kill(-1) as that user: all of its processes at one time, so that none can fork away.
fn kill_all(id: u32) {
    as_user(id, || {
        // SAFETY: takes numbers.
        unsafe { libc::kill(-1, libc::SIGKILL) };
    });
}

/// Does something in a process of that user, and waits for it. It may only make system calls that are
/// async-signal-safe, as the process comes from one with several threads.
fn as_user(id: u32, act: impl FnOnce()) {
    // A copy of this process, not one that shares its memory: processes of the same user may be
    // allowed to trace it.
    //
    // SAFETY: the child makes nothing but system calls that are async-signal-safe, raw ones where
    // glibc's wrappers would talk to threads that it does not have, and leaves by _exit.
    unsafe {
        match libc::fork() {
            0 => {
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
                if libc::syscall(libc::SYS_setgroups, 0, 0) == 0
                    && libc::syscall(libc::SYS_setresgid, id, id, id) == 0
                    && libc::syscall(libc::SYS_setresuid, id, id, id) == 0
                {
                    act();
                }
                libc::_exit(0);
            }
            child if child > 0 => {
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            _ => {}
        }
    }
}

/// Reaps zombies of this user that are our own children: orphans come to us when this daemon is the
/// init process of a container.
fn reap_orphans(id: u32) {
    if std::process::id() != 1 {
        return;
    }
    for (pid, _) in processes_of(id) {
        // SAFETY: takes numbers; for those that are not our children it does nothing. The first
        // process of the action was reaped before.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

fn any_alive(id: u32) -> bool {
    processes_of(id).any(|(_, alive)| alive)
}

/// Process numbers whose real user is `id`, and whether they are more than zombies.
fn processes_of(id: u32) -> impl Iterator<Item = (i32, bool)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(move |entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name))?;
                line.split_ascii_whitespace().next()
            };
            let uid: u32 = field("Uid:")?.parse().ok()?;
            (uid == id).then_some((pid, !matches!(field("State:"), Some("Z" | "X"))))
        })
}

/// Removes what a user left in directories that all may write to, when actions have no such
/// directories of their own.
pub fn sweep_files(id: u32, directories: &[std::path::PathBuf]) {
    for directory in directories {
        let Ok(entries) = fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten() {
            // The directory is sticky: only its owner could put something else in this place, and no
            // process of that owner is left.
            let Ok(metadata) = fs::symlink_metadata(entry.path()) else {
                continue;
            };
            if metadata.uid() == id {
                let removed = if metadata.is_dir() {
                    fs::remove_dir_all(entry.path())
                } else {
                    fs::remove_file(entry.path())
                };
                if let Err(error) = removed {
                    tracing::warn!(path = %entry.path().display(), %error, "could not remove what an action left");
                }
            }
        }
    }
}

/// Removes the System V IPC objects that a user made, when actions have no IPC namespaces of their own.
pub fn sweep_ipc(id: u32) {
    let (segments, semaphores, queues) =
        (made_by(id, "shm"), made_by(id, "sem"), made_by(id, "msg"));
    if segments.is_empty() && semaphores.is_empty() && queues.is_empty() {
        return;
    }
    // Only their creator may, or whoever could have made a namespace in the first place.
    as_user(id, || {
        // SAFETY: take numbers; IPC_RMID uses no buffer.
        unsafe {
            for &object in &segments {
                libc::shmctl(object, libc::IPC_RMID, std::ptr::null_mut());
            }
            for &object in &semaphores {
                libc::semctl(object, 0, libc::IPC_RMID);
            }
            for &object in &queues {
                libc::msgctl(object, libc::IPC_RMID, std::ptr::null_mut());
            }
        }
    });
}

/// The numbers of the objects of one kind that a user made (sysvipc(7)).
fn made_by(id: u32, kind: &str) -> Vec<i32> {
    let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
    let column = |line: &str, index| line.split_whitespace().nth(index).map(str::to_owned);
    let mut lines = table.lines();
    let header = lines.next().unwrap_or_default();
    let Some(creator) = header.split_whitespace().position(|name| name == "cuid") else {
        return Vec::new();
    };
    lines
        .filter(|line| column(line, creator).and_then(|text| text.parse().ok()) == Some(id))
        .filter_map(|line| column(line, 1)?.parse().ok())
        .collect()
}

/// Entries of /etc/passwd and /etc/group in the range that are not there for actions, and ranges of
/// /etc/subuid and /etc/subgid that overlap it.
pub fn collisions(range: &Range<u32>) -> Vec<String> {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let mut found = Vec::new();
    for (file, kind) in [("/etc/passwd", "user"), ("/etc/group", "group")] {
        found.extend(accounts_in(range, &read(file), kind));
    }
    for file in ["/etc/subuid", "/etc/subgid"] {
        found.extend(delegated_in(range, &read(file), file));
    }
    found
}

/// Of passwd(5) or group(5).
fn accounts_in(range: &Range<u32>, text: &str, kind: &str) -> Vec<String> {
    let account = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse::<u32>().ok()?;
        (range.contains(&id) && !name.starts_with("bb-action"))
            .then(|| format!("{kind} {name} ({id})"))
    };
    text.lines().filter_map(account).collect()
}

/// Of subuid(5).
fn delegated_in(range: &Range<u32>, text: &str, file: &str) -> Vec<String> {
    let delegated = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let first = fields.next()?.parse::<u64>().ok()?;
        let end = first.saturating_add(fields.next()?.parse().ok()?);
        (first < u64::from(range.end) && u64::from(range.start) < end)
            .then(|| format!("{file} gives {name} the numbers {first} to {}", end - 1))
    };
    text.lines().filter_map(delegated).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    fn users(count: u32) -> Arc<Users> {
        Users::new(&runner::Users {
            first: 70_000,
            count,
        })
    }

    #[test]
    fn numbers_that_others_have_are_told() {
        let accounts = "root:x:0:0::/:/bin/sh\nbb-action-58000:x:58000:\nann:x:58001:\n:::\nx\n";
        let range = 58_000..58_256;
        assert_eq!(accounts_in(&range, accounts, "user"), ["user ann (58001)"]);
        let delegated =
            "a:100000:65536\nb:58255:1\nc:58256:10\nd:57000:1000\ne:1:4294967295\nf:x:1\n";
        assert_eq!(
            delegated_in(&range, delegated, "/etc/subuid"),
            [
                "/etc/subuid gives b the numbers 58255 to 58255",
                "/etc/subuid gives e the numbers 1 to 4294967295"
            ]
        );
    }

    #[tokio::test]
    async fn each_user_is_one_actions_own_and_the_last_given_back_is_the_last_given_out() {
        let users = users(3);
        let (a, b) = (
            users.take(SHORT).await.unwrap(),
            users.take(SHORT).await.unwrap(),
        );
        assert_eq!((a.id(), b.id()), (70_000, 70_001));
        drop(a);
        let (c, d) = (
            users.take(SHORT).await.unwrap(),
            users.take(SHORT).await.unwrap(),
        );
        assert_eq!((c.id(), d.id()), (70_002, 70_000));
        let error = users.take(SHORT).await.unwrap_err();
        assert!(error.to_string().contains("users.count"), "{error}");
        assert!(!users.all_back(SHORT).await);
        drop((b, c, d));
        assert!(users.all_back(SHORT).await);
    }

    #[tokio::test]
    async fn a_retired_user_never_comes_back() {
        let users = users(1);
        users.take(SHORT).await.unwrap().retire();
        users.take(SHORT).await.unwrap_err();
    }
}
