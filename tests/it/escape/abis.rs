//! Ways around the filter of system calls: every call that it refuses, made in every way that a
//! program has (64 bits, int 0x80, the numbers of x32, calls that carry others), and what root in a
//! user namespace of an action's own could do with them.
//!
//! The numbers are written down here once more, so that the filter's own table is not its judge.

use super::attempts::{Attempt, attempt};

/// abi.py: names, numbers of 64-bit and 32-bit programs, and the ways.
pub const LIBRARY: &str = r#"
import ctypes, errno, mmap, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

CALLS = {
    'add_key': (248, 286), 'request_key': (249, 287), 'keyctl': (250, 288), 'bpf': (321, 357),
    'userfaultfd': (323, 374), 'perf_event_open': (298, 336), 'mount': (165, 21),
    'umount2': (166, 52), 'umount': (None, 22), 'pivot_root': (155, 217), 'chroot': (161, 61),
    'open_tree': (428, 428), 'move_mount': (429, 429), 'fsopen': (430, 430), 'fsconfig': (431, 431),
    'fsmount': (432, 432), 'fspick': (433, 433), 'mount_setattr': (442, 442),
    'open_tree_attr': (467, 467), 'statmount': (457, 457), 'listmount': (458, 458),
    'setns': (308, 346), 'clone3': (435, 435), 'quotactl': (179, 131), 'quotactl_fd': (443, 443),
    'swapon': (167, 87), 'swapoff': (168, 115), 'open_by_handle_at': (304, 342),
    'fanotify_init': (300, 338), 'init_module': (175, 128), 'finit_module': (313, 350),
    'delete_module': (176, 129), 'kexec_load': (246, 283), 'kexec_file_load': (320, None),
    'reboot': (169, 88), 'syslog': (103, 103), 'acct': (163, 51),
    'lsm_get_self_attr': (459, 459), 'lsm_set_self_attr': (460, 460), 'lsm_list_modules': (461, 461),
    'iopl': (172, 110), 'ioperm': (173, 101), 'uselib': (134, 86), 'settimeofday': (164, 79),
    'clock_settime': (227, 264), 'clock_settime64': (None, 404), 'clock_adjtime': (305, 343),
    'clock_adjtime64': (None, 405), 'adjtimex': (159, 124), 'stime': (None, 25),
    'io_uring_setup': (425, 425), 'io_uring_enter': (426, 426), 'io_uring_register': (427, 427),
    'io_setup': (206, 245), 'listns': (470, 470), 'the newest': (600, 600),
}
FAMILIES = {'vsock': 40, 'alg': 38, 'tipc': 30, 'rds': 21, 'caif': 37, 'bluetooth': 31,
            'qipcrtr': 42, 'kcm': 41, 'smc': 43, 'ax25': 3, 'x25': 9, 'can': 29, 'phonet': 35}
KINDS = (1, 2, 3, 5)
# What the filter says; anything else is the kernel's answer.
REFUSED = (errno.EPERM, errno.ENOSYS)

page = libc.mmap(None, 4096, 7, 0x62, -1, 0)  # private, anonymous, below 4 GiB
code = bytes.fromhex('53' '89f8' '89f3' '89d1' '31d2' '31f6' 'cd80' '5b' 'c3')
ctypes.memmove(page, code, len(code))
by_interrupt = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint)(page)

def native(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, (*arguments, 0, 0, 0)))
    return -ctypes.get_errno() if result < 0 else result

def i386(number, a=0, b=0):
    return by_interrupt(number, a, b)

def x32(number, *arguments):
    return native(number | 0x40000000, *arguments)

def socketcall(call, family, kind):
    ctypes.memmove(page + 1024, struct.pack('IIII', family, kind, 0, page + 2048), 16)
    return i386(102, call, page + 1024)

def passed(results):
    through = {name: result for name, result in results if -result not in REFUSED}
    assert through, 'all were refused'
    print('passed:', through)
"#;

/// They import abi.py.
pub const WAYS: &[Attempt] = &[
    attempt(
        "seccomp",
        "make a refused call",
        "from abi import *; passed((name, native(it[0])) for name, it in CALLS.items() if it[0])",
    ),
    attempt(
        "seccomp",
        "make a refused call as a 32-bit program",
        "from abi import *; assert i386(20) == os.getpid(); passed((name, i386(it[1])) for name, it in CALLS.items() if it[1])",
    ),
    attempt(
        "seccomp",
        "make a refused call by its x32 number",
        "from abi import *; passed((name, x32(it[0])) for name, it in CALLS.items() if it[0])",
    ),
    attempt(
        "seccomp",
        "make a user namespace as a 32-bit program",
        "from abi import *; passed([('unshare', i386(310, 0x10000000)), ('clone', i386(120, 0x10000011))])",
    ),
    attempt(
        "seccomp",
        "make a user namespace by an x32 number",
        "from abi import *; passed([('unshare', x32(272, 0x10000000)), ('clone', x32(56, 0x10000011))])",
    ),
    attempt(
        "seccomp",
        "open a socket of another family",
        "from abi import *; passed((name, native(41, family, kind, 0)) for name, family in FAMILIES.items() for kind in KINDS)",
    ),
    attempt(
        "seccomp",
        "open a pair of sockets of another family",
        "from abi import *; passed((name, native(53, family, kind, 0)) for name, family in FAMILIES.items() for kind in KINDS)",
    ),
    attempt(
        "seccomp",
        "open a socket of another family as a 32-bit program",
        "from abi import *; passed((name, i386(number, family, kind)) for name, family in FAMILIES.items() for kind in KINDS for number in (359, 360))",
    ),
    attempt(
        "seccomp",
        "open a socket of another family by socketcall",
        "from abi import *; passed((name, socketcall(call, family, kind)) for name, family in FAMILIES.items() for kind in KINDS for call in (1, 8))",
    ),
    attempt(
        "seccomp",
        "open a socket of another family by an x32 number",
        "from abi import *; passed((name, x32(number, family, kind, 0)) for name, family in FAMILIES.items() for kind in KINDS for number in (41, 53))",
    ),
];

/// Those that are for user namespaces, and no escape where these are allowed.
pub const OF_USER_NAMESPACES: [&str; 6] = [
    "have a user namespace",
    "be root in a namespace of one's own",
    "mount in a namespace of one's own",
    "make a refused call",
    "make a refused call as a 32-bit program",
    "make a user namespace as a 32-bit program",
];

/// By root in a user namespace, with mounts and processes of its own, where these are allowed.
pub const AS_ROOT_OF_A_NAMESPACE: &[Attempt] = &[
    attempt(
        "mounts",
        "uncover the daemons' directories",
        "own(); [libc.umount2(p, 2) for p in (b'{root}', b'/run', b'/tmp') for _ in range(3)]; read('{root}/bb_runner.toml')",
    ),
    attempt(
        "mounts",
        "see what is below another mount of the host",
        "own(); os.mkdir('below'); assert libc.mount(b'/', b'below', None, 4096, None) == 0; read('below{root}/bb_runner.toml')",
    ),
    attempt(
        "mounts",
        "make the host's files writable",
        "own(); assert libc.mount(None, b'/', None, 32 | 4096, None) == 0; write('{open}/x')",
    ),
    attempt(
        "action directory",
        "find other slots below one's own",
        "own(); libc.umount2(b'{build}', 2); os.listdir('{build}/{slot}')",
    ),
    attempt(
        "users",
        "write to a cached file as root of a namespace",
        "own(); write('lib.py')",
    ),
    attempt(
        "users",
        "own a cached file as root of a namespace",
        "own(); os.chown('lib.py', 0, 0)",
    ),
    attempt(
        "users",
        "read /etc/shadow as root of a namespace",
        "own(); read('/etc/shadow')",
    ),
    attempt(
        "users",
        "become another action's user in a namespace",
        "own(); os.setresuid(1, 1, 1)",
    ),
    attempt(
        "users",
        "map another action's user",
        "call(272, 0x10000000); me = os.getuid(); write('/proc/self/uid_map', '0 %d 2\\n' % me)",
    ),
    attempt(
        "users",
        "make a disk in a namespace",
        "own(); assert libc.mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0; os.mknod('/mnt/disk', stat.S_IFBLK | 0o666, os.makedev(8, 0))",
    ),
    attempt(
        "network",
        "raise an interface of the sandbox's",
        "own(); s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0))",
    ),
    attempt(
        "users",
        "rename the sandbox",
        "own(); socket.sethostname('x')",
    ),
    attempt(
        "users",
        "write to a kernel setting as root of a namespace",
        "own(); any_of(lambda: write('/proc/sys/kernel/core_pattern'), lambda: write('/proc/sys/vm/drop_caches'), lambda: write('/proc/sysrq-trigger', 'h'))",
    ),
    attempt(
        "processes",
        "leave a process in a namespace of processes",
        "own(); daemon(lambda: None); stays()",
    ),
    attempt(
        "seccomp",
        "use a ring of system calls as root of a namespace",
        "own(); call(425, 1, ctypes.create_string_buffer(120))",
    ),
    attempt(
        "seccomp",
        "load a program into the kernel as root of a namespace",
        "own(); call(321, 0, struct.pack('IIII', 2, 4, 4, 1) + bytes(100), 116)",
    ),
    attempt(
        "seccomp",
        "have a keyring as root of a namespace",
        "own(); call(250, 0, -4, 1)",
    ),
    attempt(
        "seccomp",
        "watch files as root of a namespace",
        "own(); call(300, 0, 0)",
    ),
    attempt(
        "seccomp",
        "open a file by its number as root of a namespace",
        "own(); call(304, os.open('/', os.O_RDONLY), struct.pack('IiQ', 8, 1, 2), 0)",
    ),
];
