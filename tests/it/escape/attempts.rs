//! The attempts, and the action that they are made against.
//!
//! Long, since it is one table: who adds an attempt sees at once what there is already.

pub struct Attempt {
    pub name: &'static str,
    /// What stops it, by its key in `containment`; or one of those that are always there: `users`,
    /// `privileges` (no capabilities, no_new_privs, limits), `action directory`, `worker`.
    pub layer: &'static str,
    pub code: &'static str,
}

pub const fn attempt(layer: &'static str, name: &'static str, code: &'static str) -> Attempt {
    Attempt { name, layer, code }
}

/// lib.py: what the attempts use, and their judge.
pub const LIBRARY: &str = r#"
import ctypes, errno, fcntl, glob, mmap, os, resource, signal, socket, stat, struct, subprocess
import sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def c(function, *arguments):
    result = getattr(libc, function)(*[
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def read(path):
    with open(path, 'rb') as file:
        return file.read(4096)

def write(path, data='x'):
    with open(path, 'a') as file:
        file.write(data)

def daemon(code):
    "Runs code in a process that nobody waits for; only comes back in the first one."
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)
            code()
            while True:
                time.sleep(100)
        os._exit(0)
    os.wait()

def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as it:
        it.settimeout(2)
        it.connect(address)

def any_of(*attempts):
    "Succeeds if one of them does."
    for attempt in attempts:
        try:
            attempt()
            return
        except (OSError, AssertionError, ValueError):
            pass
    raise AssertionError('none')

def own():
    "Becomes root in a user namespace, with mounts and processes of its own."
    me = os.getuid()
    call(272, 0x10000000 | 0x20000 | 0x20000000)
    for path, text in (('setgroups', 'deny'), ('uid_map', '0 %d 1' % me), ('gid_map', '0 %d 1' % me)):
        with open('/proc/self/' + path, 'w') as file:
            file.write(text)
    if child := os.fork():
        # What the child says is said; its end is this one's.
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)

def stays():
    "What matters is what is left, not what happens."
    raise AssertionError('it ends here')

if __name__ == '__main__':
    try:
        exec(sys.argv[1])
        print('ESCAPED')
    except (OSError, AssertionError, ValueError) as stopped:
        print('stopped:', repr(stopped))
    except BaseException as mistake:
        print('BROKEN', repr(mistake))
"#;

/// Has what others would like to have, and waits for the file `stop`. Its command line has the mark,
/// {mark}.
pub const VICTIM: &str = r#"
write('secret', 'of the victim')
os.chmod('secret', 0o666)
for place in ('/tmp', '/var/tmp', '/dev/shm'):
    # The first two may be one.
    with open(place + '/victim', 'w') as file:
        file.write('of the victim')
    os.chmod(place + '/victim', 0o666)
abstract = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
abstract.bind('\0{mark}-victim')
abstract.listen()
loopback = socket.socket()
loopback.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    loopback.bind(('127.0.0.1', 52917))
    loopback.listen()
except OSError:
    pass
segment = libc.shmget(0x62622d01, 4096, 0o1666)
libc.semget(0x62622d02, 1, 0o1666)
libc.msgget(0x62622d03, 0o1666)
try:
    call(240, b'victim', os.O_CREAT | os.O_RDWR, 0o666, None)
    os.chmod('/dev/mqueue/victim', 0o666)
except OSError:
    pass
write('ready')
deadline = time.time() + 300
while not os.path.exists('stop'):
    assert time.time() < deadline
    time.sleep(0.02)
assert read('secret') == b'of the victim', read('secret')
assert read('/tmp/victim') == b'of the victim'
assert os.nice(0) == 0
os.unlink('stop')
sys.exit(0)
"#;

pub const ATTEMPTS: &[Attempt] = &[
    // Other slots.
    attempt(
        "action directory",
        "read another slot's file",
        "read('{victim}/root/secret')",
    ),
    attempt(
        "action directory",
        "write another slot's file",
        "write('{victim}/root/secret')",
    ),
    attempt(
        "action directory",
        "list another slot's root",
        "os.listdir('{victim}/root')",
    ),
    attempt(
        "action directory",
        "list the slots",
        "os.listdir('{build}')",
    ),
    attempt(
        "action directory",
        "read another slot's output",
        "read('{victim}/stdout')",
    ),
    attempt(
        "action directory",
        "go up and down to another slot",
        "read('../../{slot}/root/secret')",
    ),
    attempt(
        "action directory",
        "stop another slot's action by its file",
        "write('{victim}/root/stop')",
    ),
    attempt(
        "action directory",
        "rename one's input root",
        "os.rename('../root', '../other')",
    ),
    attempt(
        "action directory",
        "replace one's standard output",
        "os.unlink('../stdout')",
    ),
    attempt(
        "action directory",
        "lock one's action directory",
        "fcntl.flock(os.open('..', os.O_RDONLY), fcntl.LOCK_EX)",
    ),
    attempt(
        "action directory",
        "leave something in one's action directory",
        "write('../x')",
    ),
    attempt(
        "mounts",
        "see that there are other slots",
        "os.stat('{victim}')",
    ),
    attempt(
        "mounts",
        "read another action's file in /tmp",
        "read('/tmp/victim')",
    ),
    attempt(
        "mounts",
        "read another action's file in /var/tmp",
        "read('/var/tmp/victim')",
    ),
    attempt(
        "mounts",
        "read another action's shared memory",
        "read('/dev/shm/victim')",
    ),
    // Other processes.
    attempt(
        "processes",
        "see another action's process",
        "os.stat('/proc/{pid}')",
    ),
    attempt(
        "processes",
        "read another action's command",
        "assert b'{mark}' in read('/proc/{pid}/cmdline')",
    ),
    attempt("processes", "see the worker", "os.stat('/proc/{worker}')"),
    attempt(
        "processes",
        "read the runner's command",
        "assert b'bb_runner' in read('/proc/{runner}/cmdline')",
    ),
    attempt(
        "processes",
        "see who runs what",
        "assert len({os.stat(p).st_uid for p in glob.glob('/proc/[0-9]*')}) > 2",
    ),
    attempt(
        "users",
        "read another action's environment",
        "read('/proc/{pid}/environ')",
    ),
    attempt(
        "users",
        "read another action's memory",
        "read('/proc/{pid}/mem')",
    ),
    attempt(
        "users",
        "list another action's descriptors",
        "os.listdir('/proc/{pid}/fd')",
    ),
    attempt(
        "users",
        "go through another action's root",
        "read('/proc/{pid}/root/tmp/victim')",
    ),
    attempt(
        "users",
        "go through another action's directory",
        "read('/proc/{pid}/cwd/secret')",
    ),
    attempt(
        "users",
        "read the daemon's environment",
        "read('/proc/{runner}/environ')",
    ),
    attempt(
        "users",
        "go through the first process's root",
        "os.listdir('/proc/1/root')",
    ),
    attempt(
        "users",
        "read the first process's environment",
        "read('/proc/1/environ')",
    ),
    attempt(
        "users",
        "stop another action",
        "os.kill({pid}, signal.SIGSTOP)",
    ),
    attempt(
        "users",
        "kill another action",
        "os.kill({pid}, signal.SIGKILL)",
    ),
    attempt("users", "signal the worker", "os.kill({worker}, 0)"),
    attempt(
        "users",
        "kill the first process",
        "os.kill(1, signal.SIGKILL)",
    ),
    attempt("users", "signal everybody", "os.kill(-1, signal.SIGCONT)"),
    attempt(
        "users",
        "trace another action",
        "c('ptrace', 16, {pid}, 0, 0)",
    ),
    attempt(
        "users",
        "trace the first process",
        "c('ptrace', 16, 1, 0, 0)",
    ),
    attempt(
        "users",
        "steal a descriptor",
        "call(438, call(434, {pid}, 0), 0, 0)",
    ),
    attempt(
        "users",
        "copy another action's memory",
        "b = ctypes.create_string_buffer(8); v = struct.pack('QQ', ctypes.addressof(b), 8); w = struct.pack('QQ', 0x400000, 8); call(310, {pid}, v, 1, w, 1, 0)",
    ),
    attempt(
        "users",
        "slow another action down",
        "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    ),
    attempt(
        "users",
        "limit another action",
        "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (3, 3))",
    ),
    attempt(
        "users",
        "move another action to one processor",
        "os.sched_setaffinity({pid}, {0})",
    ),
    // Daemons.
    attempt(
        "hidden",
        "list the farm",
        "os.listdir('{root}/worker'); assert 'cache' in os.listdir('{root}/worker')",
    ),
    attempt(
        "hidden",
        "read the runner's configuration",
        "read('{root}/bb_runner.toml')",
    ),
    attempt(
        "hidden",
        "read the worker's configuration",
        "read('{root}/bb_worker.toml')",
    ),
    attempt(
        "hidden",
        "read the daemons' logs",
        "read('{root}/bb_worker.log')",
    ),
    attempt(
        "hidden",
        "read the daemons' programs",
        "read('{root}/bin/bb_runner')",
    ),
    attempt(
        "hidden",
        "find the runner's socket",
        "os.stat('{root}/runner.sock')",
    ),
    attempt(
        "users",
        "call the runner",
        "connect(socket.AF_UNIX, '{root}/runner.sock')",
    ),
    attempt(
        "users",
        "list the cache",
        "os.listdir('{root}/worker/cache')",
    ),
    attempt(
        "users",
        "write to the cache",
        "write('{root}/worker/cache/x')",
    ),
    attempt("users", "list the store", "os.listdir('{root}/storage')"),
    attempt("users", "write to the store", "write('{root}/storage/x')"),
    attempt("users", "read the worker's secret", "read('{secret}')"),
    // Files of the host.
    attempt("users", "read /etc/shadow", "read('/etc/shadow')"),
    attempt("users", "add a user", "write('/etc/passwd')"),
    attempt(
        "users",
        "replace a program",
        "os.rename('/usr/bin/env', '/usr/bin/env2')",
    ),
    attempt("users", "list root's home", "os.listdir('/root')"),
    attempt("mounts", "read the host's /tmp", "read('/tmp/{mark}')"),
    attempt(
        "mounts",
        "write to the host's /var/tmp",
        "assert os.path.exists('/var/tmp/{mark}'); write('/var/tmp/{mark}')",
    ),
    attempt(
        "mounts",
        "read the host's shared memory",
        "read('/dev/shm/{mark}')",
    ),
    attempt(
        "mounts",
        "write where every user of the host may",
        "write('{open}/x')",
    ),
    attempt(
        "users",
        "write to a kernel setting",
        "any_of(lambda: write('/proc/sys/kernel/core_pattern'), lambda: write('/sys/kernel/mm/ksm/run'), lambda: write('/proc/sys/vm/drop_caches'))",
    ),
    attempt(
        "users",
        "press a key of the kernel's",
        "write('/proc/sysrq-trigger', 'h')",
    ),
    attempt(
        "users",
        "read the kernel's memory",
        "any_of(lambda: read('/proc/kcore'), lambda: read('/proc/kmsg'))",
    ),
    // Outputs.
    attempt(
        "worker",
        "an output that is a link to a secret",
        "os.symlink('{secret}', 'out'); stays()",
    ),
    attempt(
        "worker",
        "an output that is a link to /etc/shadow",
        "os.symlink('/etc/shadow', 'out'); stays()",
    ),
    attempt(
        "worker",
        "an output below a link",
        "os.symlink('{root}/worker', 'dir'); stays()",
    ),
    attempt(
        "worker",
        "an output below a link upwards",
        "os.symlink('../../../worker', 'dir'); stays()",
    ),
    attempt(
        "processes",
        "an output that turns into a link and back",
        r#"
def turn():
    write('file', 'x')
    os.symlink('{secret}', 'link')
    while True:
        call(316, -100, b'file', -100, b'link', 2)
        try:
            os.link('link', 'new', follow_symlinks=False)
            os.rename('new', 'out')
        except OSError:
            pass
daemon(turn)
time.sleep(0.05)
stays()"#,
    ),
    attempt(
        "worker",
        "an output that is a pipe",
        "os.mkfifo('out'); stays()",
    ),
    attempt(
        "worker",
        "an output that is a socket",
        "socket.socket(socket.AF_UNIX).bind('out'); stays()",
    ),
    attempt(
        "worker",
        "an output that is the input root",
        "os.symlink('.', 'dir'); os.symlink('/', 'out'); stays()",
    ),
    attempt(
        "users",
        "write to an input file",
        "os.chmod('lib.py', 0o777)",
    ),
    attempt("users", "write to a cached file", "write('lib.py')"),
    attempt(
        "users",
        "write through a hard link to a cached file",
        "os.link('lib.py', 'mine'); os.chmod('mine', 0o777); write('mine')",
    ),
    attempt(
        "users",
        "own a cached file",
        "os.chown('lib.py', os.getuid(), -1)",
    ),
    // Privileges.
    attempt("privileges", "become root", "os.setuid(0)"),
    attempt(
        "privileges",
        "become another action's user",
        "os.setresuid(os.getuid() + 1, -1, -1)",
    ),
    attempt("privileges", "join root's group", "os.setgroups([0])"),
    attempt(
        "privileges",
        "give a file away",
        "write('f'); os.chown('f', 0, 0)",
    ),
    attempt(
        "privileges",
        "give a file a capability",
        "write('f'); os.setxattr('f', 'security.capability', struct.pack('<IIIII', 0x2000001, 0xffffffff, 0, 0, 0))",
    ),
    attempt(
        "privileges",
        "make a file that nobody can remove",
        "write('f'); fcntl.ioctl(os.open('f', os.O_RDONLY), 0x40086602, struct.pack('l', 0x10))",
    ),
    attempt(
        "privileges",
        "use a set-user-ID program",
        "p = subprocess.run(['/usr/bin/mount', '-t', 'tmpfs', 'x', '/mnt'], capture_output=True); assert p.returncode == 0",
    ),
    attempt(
        "privileges",
        "run su",
        "p = subprocess.run(['/usr/bin/su', '-c', 'id -u'], input=b'\\n', capture_output=True); assert p.stdout.strip() == b'0'",
    ),
    attempt(
        "privileges",
        "make a disk",
        "os.mknod('disk', stat.S_IFBLK | 0o666, os.makedev(8, 0))",
    ),
    attempt(
        "privileges",
        "make a zero device",
        "os.mknod('zero', stat.S_IFCHR | 0o666, os.makedev(1, 5))",
    ),
    attempt(
        "privileges",
        "leave the root by chroot",
        "os.chroot('/tmp')",
    ),
    attempt(
        "privileges",
        "have more processes",
        "resource.setrlimit(resource.RLIMIT_NPROC, (-1, -1))",
    ),
    attempt(
        "privileges",
        "dump core",
        "resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))",
    ),
    attempt("privileges", "have priority", "os.nice(-5)"),
    attempt(
        "privileges",
        "run in real time",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ),
    attempt(
        "privileges",
        "never be killed for memory",
        "write('/proc/self/oom_score_adj', '-1000')",
    ),
    attempt(
        "privileges",
        "open a raw socket",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    ),
    attempt(
        "privileges",
        "open a packet socket",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    ),
    attempt("privileges", "use the processor's ports", "call(172, 3)"),
    attempt(
        "privileges",
        "find the daemon's descriptors",
        "assert set(map(int, os.listdir('/proc/self/fd'))) - {0, 1, 2, 3}",
    ),
    attempt(
        "privileges",
        "keep a terminal",
        "os.open('/dev/tty', os.O_RDWR)",
    ),
    attempt(
        "privileges",
        "type on the daemon's terminal",
        "fcntl.ioctl(0, 0x5412, b'x')",
    ),
    attempt(
        "privileges",
        "enter the first process's mounts",
        "os.open('/proc/1/ns/mnt', os.O_RDONLY)",
    ),
    attempt(
        "privileges",
        "mount",
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    ),
    attempt(
        "privileges",
        "unmount",
        "assert libc.umount2(b'/tmp', 2) == 0",
    ),
    attempt("privileges", "leave the mounts", "call(272, 0x20000)"),
    attempt(
        "privileges",
        "open a file by its number",
        "call(304, os.open('/', os.O_RDONLY), struct.pack('IiQ', 8, 1, 2), 0)",
    ),
    attempt(
        "privileges",
        "set the clock",
        "time.clock_settime(time.CLOCK_REALTIME, 0)",
    ),
    attempt("privileges", "rename the host", "socket.sethostname('x')"),
    attempt(
        "privileges",
        "load a module",
        "call(313, os.open('/dev/null', os.O_RDONLY), b'', 0)",
    ),
    attempt("privileges", "load a kernel", "call(246, 0, 0, 0, 0)"),
    attempt(
        "privileges",
        "restart the host",
        "call(169, 0xfee1dead, 672274793, 0, 0)",
    ),
    attempt("privileges", "swap on a file", "call(167, b'lib.py', 0)"),
    attempt(
        "privileges",
        "account for processes",
        "call(163, b'lib.py')",
    ),
    attempt(
        "cgroups",
        "make a control group",
        "any_of(*[lambda d=d: os.mkdir(d + '/left-{mark}') for d in glob.glob('/sys/fs/cgroup/**/', recursive=True)[:200]]) if os.path.isdir('/sys/fs/cgroup') else stays()",
    ),
    attempt(
        "cgroups",
        "leave one's control group",
        "any_of(*[lambda f=f: write(f, '0') for f in glob.glob('/sys/fs/cgroup/**/cgroup.procs', recursive=True)[:200]])",
    ),
    // System calls.
    attempt("seccomp", "have a user namespace", "call(272, 0x10000000)"),
    attempt(
        "seccomp",
        "be root in a namespace of one's own",
        "p = subprocess.run(['/usr/bin/unshare', '-Urm', 'id', '-u'], capture_output=True); assert p.stdout == b'0\\n'",
    ),
    attempt(
        "seccomp",
        "mount in a namespace of one's own",
        "call(272, 0x10020000); call(165, b'x', b'/tmp', b'tmpfs', 0, None)",
    ),
    attempt("seccomp", "have a keyring", "call(250, 0, -4, 1)"),
    attempt(
        "seccomp",
        "leave a key",
        "call(248, b'user', b'left-{mark}', b'x', 1, -4)",
    ),
    attempt(
        "seccomp",
        "load a program into the kernel",
        "call(321, 0, struct.pack('IIII', 2, 4, 4, 1) + bytes(100), 116)",
    ),
    attempt("seccomp", "handle page faults", "call(323, 1)"),
    attempt(
        "seccomp",
        "use a ring of system calls",
        "call(425, 1, ctypes.create_string_buffer(120))",
    ),
    attempt(
        "seccomp",
        "talk to the virtual machine's host",
        "socket.socket(40, socket.SOCK_STREAM)",
    ),
    attempt(
        "seccomp",
        "use the kernel's cryptography",
        "socket.socket(38, socket.SOCK_SEQPACKET)",
    ),
    attempt(
        "privileges",
        "count the processor's events",
        "call(298, struct.pack('II', 1, 112) + bytes(104), 0, -1, -1, 0)",
    ),
    // IPC.
    attempt(
        "ipc",
        "attach another action's segment",
        "c('shmget', 0x62622d01, 4096, 0)",
    ),
    attempt(
        "ipc",
        "use another action's semaphore",
        "c('semget', 0x62622d02, 1, 0)",
    ),
    attempt(
        "ipc",
        "read another action's queue",
        "c('msgget', 0x62622d03, 0)",
    ),
    attempt(
        "ipc",
        "read another action's message queue",
        "call(240, b'victim', os.O_RDONLY, 0, None)",
    ),
    // Network.
    attempt(
        "network",
        "connect to a server on the host",
        "connect(socket.AF_INET, ('127.0.0.1', {port}))",
    ),
    attempt(
        "network",
        "connect to the scheduler",
        "connect(socket.AF_INET, ('127.0.0.1', {clients}))",
    ),
    attempt(
        "network",
        "connect to another action's server",
        "connect(socket.AF_INET, ('127.0.0.1', 52917))",
    ),
    attempt(
        "network",
        "connect to an abstract socket of the host",
        "connect(socket.AF_UNIX, '\\0{mark}-host')",
    ),
    attempt(
        "network",
        "pass descriptors to another action",
        "connect(socket.AF_UNIX, '\\0{mark}-victim')",
    ),
    attempt(
        "network",
        "find the host's interfaces",
        "assert [n for _, n in socket.if_nameindex() if n != 'lo']",
    ),
    attempt(
        "network",
        "send something out",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 53)); s.send(b'x')",
    ),
    attempt(
        "network",
        "see who is connected",
        "assert len(open('/proc/net/tcp').readlines()) > 1",
    ),
    attempt(
        "hostname",
        "learn the host's name",
        "assert socket.gethostname() != 'localhost'",
    ),
    // Devices.
    attempt(
        "devices",
        "find devices of the host",
        "assert set(os.listdir('/dev')) - {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'fd', 'stdin', 'stdout', 'stderr', 'ptmx', 'pts', 'shm', 'mqueue', 'console', 'core'}",
    ),
    attempt(
        "users",
        "open a disk or the memory",
        "any_of(*[lambda d=d: os.open(d, os.O_RDONLY) for d in glob.glob('/dev/[shvx]d*') + ['/dev/mem', '/dev/kmsg', '/dev/port', '/dev/loop-control']])",
    ),
    // Staying.
    attempt(
        "processes",
        "leave a daemon",
        "daemon(lambda: None); stays()",
    ),
    attempt(
        "processes",
        "leave a stopped process",
        "daemon(lambda: os.kill(os.getpid(), signal.SIGSTOP)); stays()",
    ),
    attempt(
        "processes",
        "leave a traced process",
        "daemon(lambda: (c('ptrace', 0, 0, 0, 0), os.kill(os.getpid(), signal.SIGSTOP))); stays()",
    ),
    attempt(
        "processes",
        "leave a process that breeds",
        r#"
def breed():
    end = time.time() + 60
    while time.time() < end:
        if len(os.listdir('/proc')) < 400:
            os.fork()
        time.sleep(0.02)
daemon(breed)
time.sleep(0.2)
stays()"#,
    ),
    attempt(
        "processes",
        "leave two hundred processes",
        "[daemon(lambda: None) for _ in range(100)]; stays()",
    ),
    attempt(
        "processes",
        "leave a process under another name",
        "daemon(lambda: os.execv('/bin/sleep', ['[kworker]', '1000'])); stays()",
    ),
    attempt(
        "processes",
        "leave zombies",
        "[os.fork() or os._exit(0) for _ in range(50)]; stays()",
    ),
    attempt(
        "mounts",
        "leave files in /tmp",
        "write('/tmp/left-{mark}'); stays()",
    ),
    attempt(
        "mounts",
        "leave files in /var/tmp",
        "write('/var/tmp/left-{mark}'); stays()",
    ),
    attempt(
        "mounts",
        "leave shared memory",
        "write('/dev/shm/left-{mark}', 'x' * 1000000); stays()",
    ),
    attempt(
        "ipc",
        "leave a segment",
        "c('shmget', 0x62622d11, 1 << 20, 0o1666); stays()",
    ),
    attempt(
        "ipc",
        "leave a semaphore and a queue",
        "c('semget', 0x62622d12, 1, 0o1666); c('msgget', 0x62622d13, 0o1666); stays()",
    ),
    attempt(
        "worker",
        "leave a directory that nobody may enter",
        "os.makedirs('a/b'); write('a/b/c'); os.chmod('a/b', 0); os.chmod('a', 0); stays()",
    ),
    attempt(
        "worker",
        "leave a path of 10,000 levels",
        r#"
for _ in range(10000):
    os.mkdir('d')
    os.chdir('d')
write('f')
stays()"#,
    ),
    attempt(
        "worker",
        "leave many files",
        "os.mkdir('many'); [write('many/%d' % i) for i in range(3000)]; stays()",
    ),
    attempt(
        "worker",
        "leave odd names",
        "[write(bytes([b]) + b'\\xff\\n') for b in range(1, 256) if b != 47]; stays()",
    ),
    attempt(
        "privileges",
        "fill the disk by standard output",
        "[os.write(1, b'x' * (1 << 20)) for _ in range(8)]; stays()",
    ),
    attempt(
        "worker",
        "close the standard streams",
        "os.close(0); os.close(2); stays()",
    ),
];
