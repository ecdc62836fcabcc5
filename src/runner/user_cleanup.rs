//! What is left of an action's user, found by its number: processes, files in directories that all may
//! write to, System V IPC objects and POSIX message queues.
//!
//! Processes are looked for after every action, whatever layers of containment there are.

#![expect(unsafe_code, reason = "it forks a process that acts as a user")]

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use rustix::{
    fs::{AtFlags, Dir, FileType, statat, unlinkat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
    process::{Gid, Uid, getpriority_user},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use super::sys;
use crate::removal;

/// Whether a process or zombie of this user exists; costs less than a microsecond if not.
fn has_processes(id: u32) -> bool {
    getpriority_user(Uid::from_raw(id)) != Err(rustix::io::Errno::SRCH)
}

/// Kills every process of a user, until none is left but zombies, which whoever is their parent reaps.
/// False when some were left after this long.
pub(super) fn kill_processes(id: u32, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
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

/// Kills all processes of that user at one time, so that none can fork away: kill(-1) as that user.
fn kill_all(id: u32) {
    as_user(id, || {
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    });
}

/// Does something in a process of that user, and waits for it. It may only make system calls that are
/// async-signal-safe.
///
/// That process is a copy of this one, not one that shares its memory: processes of the same user may
/// be allowed to trace it.
fn as_user(id: u32, act: impl FnOnce()) {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    // SAFETY: all that is called makes system calls only; those that change credentials are raw ones,
    // where glibc's wrappers would talk to threads that the copy does not have.
    unsafe {
        sys::fork_and_wait(|| {
            let is_user = set_thread_groups(&[])
                .and_then(|()| set_thread_res_gid(group, group, group))
                .and_then(|()| set_thread_res_uid(user, user, user));
            if is_user.is_ok() {
                act();
            }
        });
    }
}

/// Reaps zombies of this user that are our own children: orphans come to us when this daemon is the
/// init process of a container.
fn reap_orphans(id: u32) {
    if std::process::id() != 1 {
        return;
    }
    for process in processes_of(id) {
        // Those that are not our children are left alone; the action's command process was reaped
        // before.
        let _ = waitpid(Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
    }
}

/// Whether a process of this user is more than a zombie.
fn any_alive(id: u32) -> bool {
    processes_of(id).any(|process| process.is_alive)
}

/// A process as people are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RunningProcess {
    /// At most 15 bytes, which it chose itself.
    pub name: String,
    /// As proc_pid_status(5) has it, such as `S (sleeping)`.
    pub state: String,
}

/// Describes the processes whose real user is `id`, but for zombies.
pub(super) fn list_processes(id: u32) -> Vec<RunningProcess> {
    processes_of(id)
        .filter(|process| process.is_alive)
        .map(|process| process.description)
        .collect()
}

/// A process, as proc_pid_status(5) tells of it.
struct UserProcess {
    pid: i32,
    /// Whether it is more than a zombie. One whose first thread has ended is called a zombie, too, while other
    /// threads of it run (pthread_exit(3)).
    is_alive: bool,
    description: RunningProcess,
}

/// Processes whose real user is `id`.
fn processes_of(id: u32) -> impl Iterator<Item = UserProcess> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(move |entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read(entry.path().join("status")).ok()?;
            // The name may be any bytes.
            let status = String::from_utf8_lossy(&status);
            let field = |name: &str| {
                let value = status.lines().find_map(|line| line.strip_prefix(name))?;
                Some(value.trim())
            };
            let uid: u32 = field("Uid:")?.split('\t').next()?.parse().ok()?;
            if uid != id {
                return None;
            }
            let state = field("State:")?;
            let is_zombie = state.starts_with(['Z', 'X']);
            let has_others = field("Threads:").is_some_and(|count| !matches!(count, "0" | "1"));
            Some(UserProcess {
                pid,
                is_alive: !is_zombie || has_others,
                description: RunningProcess {
                    name: field("Name:")?.to_owned(),
                    state: state.to_owned(),
                },
            })
        })
}

/// Removes what a user left in directories that all may write to, when actions have no such
/// directories of their own.
pub(super) fn remove_files(id: u32, directories: &[PathBuf]) {
    for path in directories {
        let Ok(directory) = fs::File::open(path) else {
            continue;
        };
        let Ok(entries) = Dir::read_from(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            // The directory is sticky: only its owner could put something else in this place, and no
            // process of that owner is left.
            let Ok(stat) = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if stat.st_uid != id {
                continue;
            }
            let removed = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => removal::remove(directory.as_fd(), name),
                _ => unlinkat(&directory, name, AtFlags::empty()).map_err(io::Error::from),
            };
            if let Err(error) = removed {
                let path = path.join(OsStr::from_bytes(name.to_bytes()));
                tracing::warn!(path = %path.display(), %error, "could not remove what an action left");
            }
        }
    }
}

/// Removes the System V IPC objects that a user made, when actions have no IPC namespaces of their own.
pub(super) fn remove_system_v_ipc(id: u32) {
    let (segments, semaphores, queues) =
        (made_by(id, "shm"), made_by(id, "sem"), made_by(id, "msg"));
    if segments.is_empty() && semaphores.is_empty() && queues.is_empty() {
        return;
    }
    // Only their creator may, or whoever could have made a namespace in the first place.
    as_user(id, || sys::remove_ipc(&segments, &semaphores, &queues));
}

/// Removes the POSIX message queues that a user made (mq_overview(7)), when actions have no IPC namespaces of
/// their own. They are files of a file system that need not be mounted anywhere.
pub(super) fn remove_message_queues(id: u32) {
    match message_queues() {
        Ok(queues) => {
            let directory = format!("/proc/self/fd/{}", queues.as_raw_fd());
            remove_files(id, &[PathBuf::from(directory)]);
        }
        // Where mounting is forbidden; a kernel without such queues has none to remove.
        Err(_) => remove_files(id, &[PathBuf::from("/dev/mqueue")]),
    }
}

/// The file system of this IPC namespace's message queues, mounted nowhere.
fn message_queues() -> Result<OwnedFd, rustix::io::Errno> {
    let queues = fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&queues)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&queues, FsMountFlags::FSMOUNT_CLOEXEC, flags)
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

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt, process::Command};

    use super::*;

    #[test]
    fn a_process_is_found_whatever_bytes_its_name_has() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(OsStr::from_bytes(b"a\xff\xfe"));
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut child = Command::new(program).arg("60").spawn().unwrap();
        let own = nix::unistd::getuid().as_raw();
        let pid = child.id() as i32;
        let name = "a\u{fffd}\u{fffd}";
        // It has its name a moment after it was made.
        let deadline = Instant::now() + Duration::from_secs(10);
        let is_found = loop {
            let found = processes_of(own).find(|process| process.pid == pid);
            let is_named =
                found.is_some_and(|found| found.is_alive && found.description.name == name);
            if is_named || Instant::now() > deadline {
                break is_named;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_found);
    }

    #[test]
    fn message_queues_of_one_user_are_removed_and_no_others() {
        let queues = message_queues().unwrap();
        let directory = PathBuf::from(format!("/proc/self/fd/{}", queues.as_raw_fd()));
        let id = 900_000_000 + std::process::id();
        let made = [id, id + 1].map(|user| {
            let path = directory.join(format!("bb-test-{user}"));
            fs::write(&path, "").unwrap();
            std::os::unix::fs::chown(&path, Some(user), Some(user)).unwrap();
            path
        });
        remove_message_queues(id);
        assert_eq!(made.each_ref().map(|path| path.exists()), [false, true]);
        remove_message_queues(id + 1);
        assert!(!made[1].exists());
    }
}
