//! What an action's first process does before it becomes the action's command.
//!
//! 1. It shares this daemon's memory and runs on a stack of its own while the thread that made it
//!    sleeps. So it allocates nothing, takes no lock, cannot panic, and makes system calls only, raw
//!    ones where glibc's wrappers would change all threads' credentials.
//! 2. The order is the argument: first what takes privileges (namespaces, mounts, the input root,
//!    which only a privileged process may reach if its gate is passed by nobody else), then the loss
//!    of every privilege, then what the action's own rights must decide (its working directory, its
//!    executable).
//! 3. Nothing of the daemon's gets through: no descriptor, signal disposition or mask, session,
//!    terminal, group, capability, keyring; and no privilege can be had again (no_new_privs).

use std::{
    ffi::{CStr, c_char, c_int, c_long, c_void},
    os::fd::RawFd,
    ptr,
};

use super::{init, quota::LIMITS};

/// What the process needs, as pointers that live until it has executed the command.
pub struct Launch {
    /// Null-terminated, as are the next two.
    pub arguments: *mut *const c_char,
    pub environment: *const *const c_char,
    pub executables: *const *const c_char,
    pub search: bool,
    pub working_directory: *const c_char,
    /// Below `base`.
    pub input_root: *const c_char,
    pub base: Base,
    pub standard: [RawFd; 3],
    pub user: u32,
    pub groups: *const libc::gid_t,
    pub group_count: usize,
    /// With their kinds (setns(2)).
    pub namespaces: *const (RawFd, c_int),
    pub namespace_count: usize,
    pub mounts: *const (RawFd, *const c_char),
    pub mount_count: usize,
    pub root: Root,
    /// Null for none.
    pub filter: *const libc::sock_fprog,
    /// What is executed in place of the command, which becomes the argument at this index; null for
    /// none.
    pub emulator: *const c_char,
    pub emulated: usize,
    /// The most that its user may have.
    pub processes: u64,
    pub inherited: Inherited,
    /// This daemon, as the process sees it.
    pub parent: libc::pid_t,
    pub report: *mut Report,
}

/// Where the input root's path starts.
#[derive(Clone, Copy)]
pub enum Base {
    /// A directory of the namespaces that are entered.
    Directory(RawFd),
    /// A path in them, when everything is mounted.
    Path(*const c_char),
}

/// What the process sees as `/`.
#[derive(Clone, Copy)]
pub enum Root {
    Room,
    /// What is mounted at `place`, with copies of these trees of the room at these places of it.
    Tree {
        place: *const c_char,
        copies: *const (*const c_char, *const c_char),
        copy_count: usize,
    },
}

/// What this daemon has and its child would keep; bit sets.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// Signal 1 is bit 0.
    pub ignored_signals: u64,
    pub bounding_capabilities: u64,
}

/// How far it came. `errno` is 0 as long as nothing failed.
#[derive(Clone, Copy, Default)]
pub struct Report {
    pub step: Step,
    pub errno: c_int,
    /// The one that was found.
    pub executable: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    #[default]
    Namespaces,
    Mounts,
    Root,
    Session,
    Descriptors,
    Limits,
    InputRoot,
    Credentials,
    Filter,
    WorkingDirectory,
    Search,
    Execute,
}

/// System calls that setting up a process takes, with the result as an error number.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // Each as wide as a register: what is narrower may bring garbage in its upper half.
        match libc::syscall(libc::$number $(, ($argument) as libc::c_long)*) {
            -1 => Err(*libc::__errno_location()),
            result => Ok(result),
        }
    };
}

/// # Safety
/// `argument` is a Launch whose pointers are valid. Runs in a process of its own.
pub unsafe extern "C" fn main(argument: *const c_void) -> ! {
    // SAFETY: as promised by the caller.
    unsafe {
        let launch = argument.cast::<Launch>();
        let report = (*launch).report;
        let errno = start(launch, report);
        ptr::write_volatile(&raw mut (*report).errno, errno);
        libc::_exit(127)
    }
}

/// Returns an error number, or not at all.
unsafe fn start(launch: *const Launch, report: *mut Report) -> c_int {
    // SAFETY: as promised by the caller of `main`.
    unsafe {
        let launch = &*launch;
        match prepare(launch, report) {
            Ok(()) => execute(launch, report),
            Err(errno) => errno,
        }
    }
}

unsafe fn prepare(launch: &Launch, report: *mut Report) -> Result<(), c_int> {
    // SAFETY: system calls only, on memory that lives until they are done.
    unsafe {
        let at = |step| ptr::write_volatile(&raw mut (*report).step, step);

        at(Step::Namespaces);
        let mut index = 0;
        while index < launch.namespace_count {
            let (namespace, kind) = *launch.namespaces.add(index);
            call!(SYS_setns, namespace, kind)?;
            index += 1;
        }

        at(Step::Mounts);
        let mut index = 0;
        while index < launch.mount_count {
            let (tree, place) = *launch.mounts.add(index);
            call!(
                SYS_move_mount,
                tree,
                c"".as_ptr(),
                libc::AT_FDCWD,
                place,
                MOVE_MOUNT_F_EMPTY_PATH
            )?;
            index += 1;
        }

        at(Step::Root);
        if let Root::Tree {
            place,
            copies,
            copy_count,
        } = launch.root
        {
            let mut index = 0;
            while index < copy_count {
                let (from, to) = *copies.add(index);
                let tree = call!(
                    SYS_open_tree,
                    libc::AT_FDCWD,
                    from,
                    OPEN_TREE_CLONE | libc::O_CLOEXEC as c_long | AT_RECURSIVE
                )?;
                call!(
                    SYS_move_mount,
                    tree,
                    c"".as_ptr(),
                    libc::AT_FDCWD,
                    to,
                    MOVE_MOUNT_F_EMPTY_PATH
                )?;
                index += 1;
            }
            // The new root is put on top of the old one, which is then taken away from below it.
            call!(SYS_chdir, place)?;
            call!(SYS_pivot_root, c".".as_ptr(), c".".as_ptr())?;
            call!(SYS_umount2, c".".as_ptr(), libc::MNT_DETACH)?;
        }

        at(Step::Session);
        call!(SYS_setsid)?;
        // A new keyring that belongs to nobody else; kernels without keyrings have none to inherit.
        let _ = call!(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0);
        // Those that are handled become default when a program is executed; those that are ignored
        // stay so.
        let default = KernelSignalAction::default();
        let mut signal = 1;
        while signal <= LAST_SIGNAL {
            if launch.inherited.ignored_signals & (1 << (signal - 1)) != 0 {
                call!(
                    SYS_rt_sigaction,
                    signal,
                    &raw const default,
                    0,
                    SIGNAL_SET_SIZE
                )?;
            }
            signal += 1;
        }

        at(Step::Descriptors);
        let [stdin, stdout, stderr] = launch.standard;
        call!(SYS_dup3, stdin, 0, 0)?;
        call!(SYS_dup3, stdout, 1, 0)?;
        call!(SYS_dup3, stderr, 2, 0)?;
        call!(
            SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC as c_int
        )?;

        at(Step::Limits);
        call!(SYS_umask, 0o022)?;
        limit(libc::RLIMIT_CORE as c_int, 0, 0)?;
        limit(
            libc::RLIMIT_NPROC as c_int,
            launch.processes,
            launch.processes,
        )?;
        let mut index = 0;
        while index < LIMITS.len() {
            let (resource, most) = LIMITS[index];
            limit(resource, most, most)?;
            index += 1;
        }

        at(Step::InputRoot);
        // In the namespace's mounts: a directory that was opened outside would lead outside.
        let base = match launch.base {
            Base::Directory(directory) => directory,
            Base::Path(path) => call!(
                SYS_openat,
                libc::AT_FDCWD,
                path,
                libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC
            )? as RawFd,
        };
        let how = OpenHow {
            flags: (libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) as u64,
            mode: 0,
            resolve: libc::RESOLVE_BENEATH
                | libc::RESOLVE_NO_SYMLINKS
                | libc::RESOLVE_NO_MAGICLINKS,
        };
        let input_root = call!(
            SYS_openat2,
            base,
            launch.input_root,
            &raw const how,
            size_of::<OpenHow>()
        )?;
        call!(SYS_fchdir, input_root as RawFd)?;
        // Not before: the daemon may have more descriptors than that, and so has this copy of them.
        limit(libc::RLIMIT_NOFILE as c_int, OPEN_FILES.0, OPEN_FILES.1)?;

        at(Step::Credentials);
        // Refused without CAP_SETPCAP; then no_new_privs alone keeps files from giving any.
        let mut capability = 0;
        while capability < 64 {
            if launch.inherited.bounding_capabilities & (1 << capability) != 0
                && call!(SYS_prctl, libc::PR_CAPBSET_DROP, capability).is_err()
            {
                break;
            }
            capability += 1;
        }
        call!(SYS_setgroups, launch.group_count, launch.groups)?;
        let user = launch.user;
        call!(SYS_setresgid, user, user, user)?;
        call!(SYS_setresuid, user, user, user)?;
        // The change of user has emptied the others of its sets, not the inheritable one.
        give_up_privileges()?;
        // Dies with the thread that made it; after the change of user, which clears this.
        call!(SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL)?;
        if libc::getppid() != launch.parent {
            return Err(libc::ESRCH);
        }

        at(Step::Filter);
        if !launch.filter.is_null() {
            call!(
                SYS_prctl,
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                launch.filter
            )?;
        }

        at(Step::WorkingDirectory);
        call!(SYS_chdir, launch.working_directory)?;
        Ok(())
    }
}

/// The first process of a room, see `init`: mounts /proc and its control group, gives up what it can,
/// becomes its program.
///
/// # Safety
/// `argument` is an `init::Launch` that is valid. Runs in a process of its own.
pub unsafe extern "C" fn first(argument: *const c_void) -> ! {
    // SAFETY: as promised by the caller.
    unsafe {
        let launch = argument.cast::<init::Launch>().cast_mut();
        let errno = become_first(launch).unwrap_or_else(|errno| errno);
        ptr::write_volatile(&raw mut (*launch).errno, errno);
        libc::_exit(127)
    }
}

unsafe fn become_first(launch: *mut init::Launch) -> Result<c_int, c_int> {
    // SAFETY: system calls only, on memory that lives until they are done.
    unsafe {
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let proc = c"proc".as_ptr();
        call!(SYS_mount, proc, c"/proc".as_ptr(), proc, flags, 0)?;
        let own = |path: &CStr| {
            let flags = libc::O_RDONLY | libc::O_CLOEXEC;
            call!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags)
        };
        let processes = own(c"/proc/self/ns/pid")?;
        ptr::write_volatile(&raw mut (*launch).processes, processes as RawFd);
        if (*launch).has_cgroup {
            // It is in its group already, which becomes the root.
            call!(SYS_unshare, libc::CLONE_NEWCGROUP)?;
            let cgroup = own(c"/proc/self/ns/cgroup")?;
            ptr::write_volatile(&raw mut (*launch).cgroup, cgroup as RawFd);
            // Where this is not to be had, what is there stays empty.
            let kind = c"cgroup2".as_ptr();
            let place = c"/sys/fs/cgroup".as_ptr();
            let flags = flags | libc::MS_RDONLY;
            let _ = call!(SYS_mount, kind, place, kind, flags, 0);
        }
        // From here on the descriptors are its own.
        call!(SYS_unshare, libc::CLONE_FILES)?;
        call!(SYS_setsid)?;
        // So that the kernel reaps orphans by itself; survives the execution of the program.
        let mut ignored = KernelSignalAction::default();
        ignored.0[0] = libc::SIG_IGN as u64;
        call!(
            SYS_rt_sigaction,
            libc::SIGCHLD,
            &raw const ignored,
            0,
            SIGNAL_SET_SIZE
        )?;
        let program = call!(SYS_fcntl, (*launch).program, libc::F_DUPFD_CLOEXEC, 10)?;
        if (*launch).life != FIRST_LIFE {
            call!(SYS_dup3, (*launch).life, FIRST_LIFE, 0)?;
        }
        call!(
            SYS_close_range,
            0,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC as c_int
        )?;
        call!(SYS_fcntl, FIRST_LIFE, libc::F_SETFD, 0)?;
        // Root would have its capabilities again with its next program; where this is refused,
        // no_new_privs keeps them away alone.
        let _ = call!(SYS_prctl, libc::PR_SET_SECUREBITS, SECURE_NO_ROOT, 0, 0, 0);
        give_up_privileges()?;
        let arguments = [c"bb-init".as_ptr(), ptr::null()];
        let nothing: [*const c_char; 1] = [ptr::null()];
        call!(
            SYS_execveat,
            program,
            c"".as_ptr(),
            arguments.as_ptr(),
            nothing.as_ptr(),
            libc::AT_EMPTY_PATH
        )?;
        Ok(libc::EINVAL)
    }
}

unsafe fn execute(launch: &Launch, report: *mut Report) -> c_int {
    // SAFETY: as in `prepare`; the arrays are null-terminated.
    unsafe {
        let mut index = 0;
        if launch.search {
            ptr::write_volatile(&raw mut (*report).step, Step::Search);
            loop {
                let candidate = *launch.executables.add(index);
                if candidate.is_null() {
                    return libc::ENOENT;
                }
                if is_executable(candidate) {
                    break;
                }
                index += 1;
            }
        }
        ptr::write_volatile(&raw mut (*report).step, Step::Execute);
        ptr::write_volatile(&raw mut (*report).executable, Some(index));
        let none = 0u64;
        let unblocked = call!(
            SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            0,
            SIGNAL_SET_SIZE
        );
        if let Err(errno) = unblocked {
            return errno;
        }
        let mut executable = *launch.executables.add(index);
        if !launch.emulator.is_null() {
            *launch.arguments.add(launch.emulated) = executable;
            executable = launch.emulator;
        }
        let mut attempts = 0;
        loop {
            let Err(errno) = call!(SYS_execve, executable, launch.arguments, launch.environment)
            else {
                return libc::EINVAL;
            };
            // Somebody who wrote this file has forked a moment ago, and will close it.
            if errno != libc::ETXTBSY || attempts == 20 {
                return errno;
            }
            attempts += 1;
            let pause = libc::timespec {
                tv_sec: 0,
                tv_nsec: 1_000_000,
            };
            let _ = call!(SYS_nanosleep, &raw const pause, 0);
        }
    }
}

/// Empties the sets of capabilities, for good.
unsafe fn give_up_privileges() -> Result<(), c_int> {
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let none = [[0u32; 3]; 2];
    // SAFETY: header and sets live during the call, and the version says how large they are.
    unsafe {
        call!(SYS_capset, &raw const header, &raw const none)?;
        call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?;
    }
    Ok(())
}

/// A regular file that this user may execute.
unsafe fn is_executable(path: *const c_char) -> bool {
    // SAFETY: the path is a string, and the place lives during the call.
    unsafe {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        libc::stat(path, stat.as_mut_ptr()) == 0
            && stat.assume_init().st_mode & libc::S_IFMT == libc::S_IFREG
            // Real and effective user are the same by now.
            && call!(SYS_faccessat, libc::AT_FDCWD, path, libc::X_OK).is_ok()
    }
}

/// Sets both limits, but raises none.
unsafe fn limit(resource: c_int, soft: u64, hard: u64) -> Result<(), c_int> {
    // SAFETY: the places live during the calls.
    unsafe {
        let mut now = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        call!(
            SYS_prlimit64,
            0,
            resource,
            ptr::null::<libc::rlimit>(),
            &raw mut now
        )?;
        now.rlim_max = if hard < now.rlim_max {
            hard
        } else {
            now.rlim_max
        };
        now.rlim_cur = if soft < now.rlim_max {
            soft
        } else {
            now.rlim_max
        };
        call!(
            SYS_prlimit64,
            0,
            resource,
            &raw const now,
            ptr::null_mut::<libc::rlimit>()
        )?;
        Ok(())
    }
}

/// What systemd gives to services and sessions (systemd-system.conf(5), DefaultLimitNOFILE=):
/// programs that use select(2) rely on the first.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

// The kernel's own words, where libc has none.
const MOVE_MOUNT_F_EMPTY_PATH: c_int = 0x4;
const OPEN_TREE_CLONE: c_long = 1;
const AT_RECURSIVE: c_long = 0x8000;
/// capabilities(7): a program gives root no capabilities; what is set is locked.
const SECURE_NO_ROOT: c_int = 0b11;
/// Where `init::CODE` reads.
const FIRST_LIFE: c_int = 3;
const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const LAST_SIGNAL: c_int = 64;
const SIGNAL_SET_SIZE: usize = 8;

/// struct sigaction as rt_sigaction(2) takes it: all zeros are SIG_DFL, on every architecture.
#[repr(C)]
#[derive(Default)]
struct KernelSignalAction([u64; 4]);

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}
