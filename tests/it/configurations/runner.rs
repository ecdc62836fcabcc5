//! Configurations of bb_runner.

use super::expect::{
    Expect::{Good, Refused, Waits, Warned},
    Row,
};

pub const RUNNER: &[Row] = &[
    ("", Good),
    ("root = \"input\"", Good),
    ("clean_temporary_directories = [\"{dir}/clean\"]", Good),
    ("run_command_cleaner = [\"true\"]", Good),
    ("emulator = [\"/usr/bin/env\"]", Good),
    ("writable_directories = [\"{dir}/clean\"]", Good),
    ("limits.memory = \"0B\"\nlimits.processors = 2", Good),
    ("socket_mode = \"0600\"", Good),
    ("additional_groups = [\"0\"]", Good),
    ("lisen = \"unix:/x\"", Refused("did you mean listen?")),
    (
        "listen = \"127.0.0.1:1\"",
        Refused("callers are known by their Unix user"),
    ),
    (
        "listen = \"unix:{dir}/none/x.sock\"",
        Refused("create the directory"),
    ),
    ("socket_mode = 660", Refused("socket_mode")),
    ("socket_mode = \"0999\"", Refused("is no file mode")),
    (
        "socket_mode = \"0600\"\nallowed_users = [\"1\"]",
        Warned("cannot connect"),
    ),
    (
        "socket_group = \"no-such-group\"",
        Refused("there is no group"),
    ),
    (
        "additional_groups = [\"no-such-group\"]",
        Refused("there is no group"),
    ),
    (
        "allowed_users = [\"no-such-user\"]",
        Waits("there is no user"),
    ),
    (
        "allowed_users = \"bb-worker\"",
        Refused("write a list in brackets"),
    ),
    (
        "build_directory = \"build\"",
        Refused("write an absolute path"),
    ),
    (
        "build_directory = \"/home\"",
        Refused("choose a directory of its own"),
    ),
    ("build_directory = \"{dir}/none\"", Waits("could not find")),
    (
        "build_directory = \"{dir}/closed/build\"",
        Waits("chmod o+x"),
    ),
    ("users.first = 0", Refused("belong to the system")),
    ("users.count = 0", Refused("at least one user")),
    ("users.count = 501", Refused("at most 500")),
    ("users = { first = 65530, count = 8 }", Refused("nobody")),
    (
        "users = { first = 61200, count = 8 }",
        Refused("DynamicUser"),
    ),
    ("users.first = 5000000000", Refused("to 4294967295")),
    (
        "root = \"/no/such/root\"",
        Refused("unpack a root file system"),
    ),
    (
        "root = \"{dir}/clean\"",
        Refused("must have a directory proc"),
    ),
    ("root = \"image\"", Refused("is no root")),
    (
        "root = \"input\"\ncontainment.mounts = \"off\"",
        Refused("takes containment.mounts"),
    ),
    (
        "emulator = [\"/no/such/emulator\"]",
        Warned("could not be found"),
    ),
    ("emulator = [\"qemu\"]", Warned("whole path")),
    ("emulator = [\"{dir}/file\"]", Warned("chmod +x")),
    ("emulator = [\"\"]", Refused("write a program first")),
    (
        "run_command_cleaner = [\"/no/such/cleaner\"]",
        Warned("could not be found"),
    ),
    (
        "run_command_cleaner = [\"no-such-cleaner\"]",
        Warned("there is no such program"),
    ),
    (
        "writable_directories = [\"/no/such/directory\"]",
        Warned("create it, or leave it out"),
    ),
    (
        "writable_directories = [\"x\"]",
        Refused("write an absolute path"),
    ),
    ("writable_directories = [\"/\"]", Refused("/ is everything")),
    (
        "clean_temporary_directories = [\"/home\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"/\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"/var/lib\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"{dir}\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"{dir}/link\"]",
        Refused("leads to /etc"),
    ),
    (
        "clean_temporary_directories = [\"{dir}/none\"]",
        Warned("create it, or leave it out"),
    ),
    (
        "readiness_checking_pathnames = [\"/no/such\"]",
        Waits("could not find /no/such"),
    ),
    (
        "containment.mounts = \"on\"",
        Refused("write \"auto\", \"require\" or \"off\""),
    ),
    (
        "containment.network = \"off\"",
        Refused("write \"auto\", \"none\" or \"host\""),
    ),
    (
        "containment.hidden_paths = [\"/usr\"]",
        Refused("no command runs without /usr"),
    ),
    ("limits.processes = 3", Refused("at least 16")),
    ("limits.processes = 5000000", Refused("at most 4194304")),
    (
        "limits.processors = -1.0",
        Refused("write a number such as 2.0"),
    ),
    (
        "limits.processors = nan",
        Refused("write a number such as 2.0"),
    ),
    ("limits.memory = \"1MiB\"", Refused("less than 16MiB")),
    (
        "limits.log_size = \"100000TiB\"",
        Warned("more than the whole disk"),
    ),
    (
        "set_tmpdir_environment_variable = 1",
        Refused("write true or false"),
    ),
    (
        "termination_grace = \"60s\"\nshutdown.drain_timeout = \"60s\"",
        Warned("TimeoutStopSec="),
    ),
];
