//! The runner, as a worker meets it: on a Unix socket, with real processes, users and mounts.
//!
//! These tests make users of numbers that nobody else has, and so need root.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::{Endpoint, ListenAddress, runner::Config, runner::Mode, runner::Users},
    daemon::{self, Failure, Life},
    proto::{
        resourceusage::PosixResourceUsage,
        runner::{CheckReadinessRequest, RunRequest, RunResponse, runner_client::RunnerClient},
        unpack,
    },
    runner,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tonic::{Code, Status, transport::Channel};

const WORKER: u32 = 900;

/// Users that no other test has, in this process or in another one that runs now.
fn fresh_users() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    1_000_000 + std::process::id() % 50_000 * 40_000 + number * 1000
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: running commands as other users takes root");
    }
    root
}

/// A runner, its build directory, and a worker's habits.
struct Farm {
    directory: TempDir,
    first: u32,
    life: Life,
    running: JoinHandle<Result<(), Failure>>,
    client: RunnerClient<Channel>,
    slots: AtomicU32,
}

impl Farm {
    async fn start() -> Self {
        Farm::start_in("/tmp", |_| {}).await
    }

    async fn start_in(parent: &str, change: impl FnOnce(&mut Config)) -> Self {
        let directory = tempfile::tempdir_in(parent).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let first = fresh_users();
        let mut config = configuration(directory.path(), first);
        fs::create_dir(&config.build_directory).unwrap();
        change(&mut config);
        let life = Life::new();
        let running = tokio::spawn(runner::run(config, life.clone()));
        let client = connect(directory.path()).await;
        Farm {
            directory,
            first,
            life,
            running,
            client,
            slots: AtomicU32::new(0),
        }
    }

    fn build(&self) -> PathBuf {
        self.directory.path().join("build")
    }

    fn slot(&self) -> Slot {
        let number = self.slots.fetch_add(1, Ordering::Relaxed);
        Slot::make(&self.build(), number, self.first + WORKER)
    }

    async fn run(&self, slot: &Slot, arguments: &[&str]) -> Result<Ended, Status> {
        self.send(slot.request(arguments), slot).await
    }

    async fn sh(&self, script: &str) -> Ended {
        let slot = self.slot();
        self.run(&slot, &["/bin/sh", "-c", script]).await.unwrap()
    }

    async fn send(&self, request: RunRequest, slot: &Slot) -> Result<Ended, Status> {
        let response = self.client.clone().run(request).await?.into_inner();
        Ok(Ended::new(&response, slot))
    }

    fn processes(&self) -> Vec<i32> {
        processes(self.first..self.first + 8)
    }

    async fn stop(self) {
        self.life.stop();
        self.running.await.unwrap().unwrap();
        assert_eq!(processes(self.first..self.first + 8), Vec::<i32>::new());
        assert_eq!(groups(self.first), Vec::<PathBuf>::new());
    }
}

fn configuration(directory: &Path, first: u32) -> Config {
    Config {
        listen: ListenAddress::Unix(directory.join("runner.sock")),
        allowed_users: vec![(first + WORKER).to_string()],
        build_directory: directory.join("build"),
        users: Users { first, count: 8 },
        ..Config::default()
    }
}

async fn connect(directory: &Path) -> RunnerClient<Channel> {
    let socket = directory.join("runner.sock");
    let client = RunnerClient::new(daemon::connect(&Endpoint::Unix(socket)));
    for _ in 0..500 {
        let request = CheckReadinessRequest::default();
        match client.clone().check_readiness(request).await {
            Err(status) if status.code() == Code::Unavailable => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            _ => return client,
        }
    }
    panic!("the runner does not answer");
}

/// What a worker makes for one action.
struct Slot {
    name: String,
    path: PathBuf,
}

impl Slot {
    fn make(build: &Path, number: u32, worker: u32) -> Self {
        let name = number.to_string();
        let path = build.join(&name);
        for (directory, mode) in [
            ("", 0o700),
            ("root", 0o777),
            ("tmp", 0o777),
            ("server_logs", 0o777),
        ] {
            let directory = path.join(directory);
            fs::create_dir(&directory).unwrap();
            fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
            chown(&directory, Some(worker), Some(worker)).unwrap();
        }
        Slot { name, path }
    }

    fn request(&self, arguments: &[&str]) -> RunRequest {
        RunRequest {
            arguments: arguments.iter().map(|text| text.to_string()).collect(),
            environment_variables: BTreeMap::from([(
                "PATH".to_owned(),
                "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".to_owned(),
            )]),
            working_directory: String::new(),
            stdout_path: format!("{}/stdout", self.name),
            stderr_path: format!("{}/stderr", self.name),
            input_root_directory: format!("{}/root", self.name),
            temporary_directory: format!("{}/tmp", self.name),
            server_logs_directory: format!("{}/server_logs", self.name),
        }
    }

    fn input(&self, name: &str, content: &[u8], mode: u32) {
        let path = self.path.join("root").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[derive(Debug)]
struct Ended {
    code: i64,
    usage: PosixResourceUsage,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn new(response: &RunResponse, slot: &Slot) -> Self {
        let text =
            |name| String::from_utf8_lossy(&fs::read(slot.path.join(name)).unwrap()).into_owned();
        assert_eq!(response.resource_usage.len(), 1);
        Ended {
            code: response.exit_code,
            usage: unpack(&response.resource_usage[0]).unwrap(),
            stdout: text("stdout"),
            stderr: text("stderr"),
        }
    }
}

/// Of these users, zombies aside.
fn processes(users: std::ops::Range<u32>) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()
        };
        let user = field("Uid:").and_then(|uid| uid.parse::<u32>().ok());
        if user.is_some_and(|user| users.contains(&user)) && field("State:") != Some("Z") {
            found.push(pid);
        }
    }
    found
}

/// Control groups of the runner with these users.
fn groups(first: u32) -> Vec<PathBuf> {
    let name = format!("bb-runner-{first}");
    walkdir::WalkDir::new("/sys/fs/cgroup")
        .max_depth(8)
        .into_iter()
        .filter_entry(|entry| entry.file_type().is_dir())
        .flatten()
        .filter(|entry| entry.file_name().to_str() == Some(&name))
        .map(|entry| entry.into_path())
        .collect()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not so after 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_signals_and_output_are_what_the_command_made() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let ended = farm.sh("echo out; echo err >&2; exit 255").await;
    assert_eq!(ended.code, 255);
    assert_eq!((&*ended.stdout, &*ended.stderr), ("out\n", "err\n"));
    assert!(ended.usage.maximum_resident_set_size > 100_000);
    assert_eq!(ended.usage.termination_signal, "");

    let ended = farm.sh("kill -s KILL $$").await;
    assert_eq!(ended.code, -1);
    assert_eq!(ended.usage.termination_signal, "KILL");
    let ended = farm.sh("kill -s TERM $$").await;
    assert_eq!(ended.usage.termination_signal, "TERM");
    // The logs can be opened again by their names.
    let ended = farm
        .sh("echo a >> /dev/stdout; echo b >> /dev/stderr")
        .await;
    assert_eq!((&*ended.stdout, &*ended.stderr), ("a\n", "b\n"));
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_is_exactly_what_was_sent_and_tmpdir() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let mut request = slot.request(&["/usr/bin/env"]);
    request.environment_variables = BTreeMap::from([("FOO".to_owned(), "b ar".to_owned())]);
    let ended = farm.send(request, &slot).await.unwrap();
    let tmpdir = slot.path.join("tmp");
    assert_eq!(
        ended.stdout,
        format!("TMPDIR={}\nFOO=b ar\n", tmpdir.display())
    );
    farm.sh("touch $TMPDIR/x && test $(stat -c %a $TMPDIR) = 777")
        .await;

    let slot = farm.slot();
    let mut request = slot.request(&["/usr/bin/env"]);
    request.environment_variables = BTreeMap::from([("TMPDIR".to_owned(), "/x".to_owned())]);
    let ended = farm.send(request, &slot).await.unwrap();
    assert_eq!(ended.stdout, "TMPDIR=/x\n");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_cannot_be_started_are_the_clients_fault() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    for (arguments, path, text) in [
        (
            vec!["nonexistent_command"],
            None,
            "Cannot find executable \"nonexistent_command\" in search paths \"\"",
        ),
        (
            vec!["sh", "-c", "exit 123"],
            Some("/nonexistent"),
            "Cannot find executable \"sh\" in search paths \"/nonexistent\"",
        ),
        (vec!["not_executable"], Some("."), "Cannot find executable"),
        (vec!["directory"], Some("."), "Cannot find executable"),
        (
            vec!["./nonexistent_command"],
            None,
            "Failed to start process: exec \"./nonexistent_command\"",
        ),
        (
            vec!["/nonexistent_command"],
            None,
            "Failed to start process: ",
        ),
        (vec!["./picture"], None, "Failed to start process: "),
        (vec!["picture"], Some("."), "Failed to start process: "),
        (vec!["./not_executable"], None, "Failed to start process: "),
        (
            vec!["./not_executable/x"],
            None,
            "Failed to start process: ",
        ),
        (vec!["./no_interpreter"], None, "Failed to start process: "),
        (vec!["/"], None, "Failed to start process: "),
        (vec![], None, "Insufficient number of command arguments"),
    ] {
        let slot = farm.slot();
        slot.input("picture", b"\x89PNG\r\n\x1a\n", 0o777);
        slot.input("not_executable", b"#!/bin/sh\n", 0o666);
        slot.input("no_interpreter", b"#!/nonexistent\n", 0o777);
        slot.input("directory/x", b"", 0o777);
        let mut request = slot.request(&arguments);
        request.environment_variables = path
            .map(|path| ("PATH".to_owned(), path.to_owned()))
            .into_iter()
            .collect();
        let status = farm.send(request, &slot).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().starts_with(text), "{status:?}");
    }
    let slot = farm.slot();
    let mut request = slot.request(&["/bin/true"]);
    request.working_directory = "nowhere".to_owned();
    let status = farm.send(request, &slot).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status
            .message()
            .starts_with("Failed to start process: chdir \"nowhere\""),
        "{status:?}"
    );
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relative_search_path_starts_at_the_working_directory() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    slot.input(
        "a/tools/hello",
        b"#!/bin/sh\necho $0; pwd\nexit 42\n",
        0o777,
    );
    let mut request = slot.request(&["hello"]);
    request.working_directory = "a".to_owned();
    request.environment_variables = BTreeMap::from([("PATH".to_owned(), "tools".to_owned())]);
    let ended = farm.send(request, &slot).await.unwrap();
    let pwd = slot.path.join("root/a");
    assert_eq!(ended.code, 42);
    assert_eq!(ended.stdout, format!("tools/hello\n{}\n", pwd.display()));
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_path_leads_out_of_the_build_directory() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let outside = farm.directory.path().join("outside");
    fs::create_dir_all(outside.join("root")).unwrap();
    let escape = "Path resolves to a location outside the build directory";

    let slot = farm.slot();
    let mut request = slot.request(&["/bin/true"]);
    request.stdout_path = "hello/../../../../../../etc/passwd".to_owned();
    let status = farm.send(request, &slot).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        status.message(),
        format!("Failed to open stdout path \"hello/../../../../../../etc/passwd\": {escape}")
    );

    // What an action may have left in the way.
    std::os::unix::fs::symlink(&outside, farm.build().join("link")).unwrap();
    std::os::unix::fs::symlink(outside.join("log"), slot.path.join("stderr")).unwrap();
    let mut request = slot.request(&["/bin/true"]);
    request.stdout_path = "link/stdout".to_owned();
    let status = farm.send(request, &slot).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().ends_with(escape), "{status:?}");
    let mut request = slot.request(&["/bin/true"]);
    request.input_root_directory = "link/root".to_owned();
    let status = farm.send(request, &slot).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    farm.run(&slot, &["/bin/true"]).await.unwrap_err();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_process_outlives_its_command() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    for script in [
        "sleep 1000 & exit 3",
        "setsid sleep 1000 & exit 3",
        // Twice forked, in a session of its own, deaf, and with the log held open.
        "(setsid sh -c 'trap \"\" TERM HUP INT; while :; do sleep 1; done' &) ; sleep 0.1; exit 3",
        // Breeds until it is stopped.
        "prlimit --nproc=100 sh -c 'b() { while :; do (b) & sleep 0.02; done; }; b' & sleep 0.4; exit 3",
    ] {
        let ended = farm.sh(script).await;
        assert_eq!(ended.code, 3, "{script}");
        assert_eq!(farm.processes(), Vec::<i32>::new(), "{script}");
    }
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_given_up_leaves_nothing_and_its_gate_tells_when() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let script = "trap '' TERM; setsid sleep 1000 & touch started; sleep 1000";
    let mut request = tonic::Request::new(slot.request(&["/bin/sh", "-c", script]));
    request.set_timeout(Duration::from_secs(600));
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let started = slot.path.join("root/started");
    until("the action has started", || started.exists()).await;
    let gate = fs::File::open(&slot.path).unwrap();
    assert!(gate.try_lock().is_err());
    call.abort();
    tokio::task::spawn_blocking(move || gate.lock().unwrap())
        .await
        .unwrap();
    assert_eq!(farm.processes(), Vec::<i32>::new());
    assert_eq!(slot.path.metadata().unwrap().mode() & 0o777, 0o700);

    // The same by a deadline.
    let slot = farm.slot();
    let mut request = tonic::Request::new(slot.request(&["/bin/sh", "-c", script]));
    request.set_timeout(Duration::from_millis(300));
    farm.client.clone().run(request).await.unwrap_err();
    let gate = fs::File::open(&slot.path).unwrap();
    tokio::task::spawn_blocking(move || gate.lock().unwrap())
        .await
        .unwrap();
    assert_eq!(farm.processes(), Vec::<i32>::new());
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_is_nobody_and_has_nothing() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let script = "id -u; id -g; id -G; umask; ulimit -c; ls /proc/self/fd | wc -l; \
                  cat /proc/self/status; readlink /proc/self/fd/0; \
                  ps -o sid= -p $$ 2>/dev/null; cut -d' ' -f5-7 /proc/$$/stat; echo pid $$";
    let ended = farm.sh(script).await;
    let lines: Vec<&str> = ended.stdout.lines().collect();
    let user: u32 = lines[0].parse().unwrap();
    assert!((farm.first..farm.first + 8).contains(&user), "{ended:?}");
    // 0, 1, 2, and the one that ls reads the directory with.
    let own = user.to_string();
    assert_eq!(lines[..6], [&*own, &*own, &*own, "0022", "0", "4"]);
    for (name, value) in [
        ("CapInh:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("SigBlk:", "0000000000000000"),
        ("SigIgn:", "0000000000000000"),
        ("Groups:", ""),
    ] {
        let line = lines.iter().find_map(|line| line.strip_prefix(name));
        let value_or_own = line.map(str::trim);
        // Some kernels list the primary group too.
        let listed = name == "Groups:" && value_or_own == Some(&own);
        assert!(value_or_own == Some(value) || listed, "{name} {line:?}");
    }
    assert!(lines.contains(&"/dev/null"));
    // Process group and session are its own, and the terminal is none.
    let pid = ended
        .stdout
        .lines()
        .last()
        .unwrap()
        .strip_prefix("pid ")
        .unwrap();
    assert!(lines.contains(&&*format!("{pid} {pid} 0")), "{ended:?}");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_gains_no_privilege() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    // A set-user-ID copy of id(1), where file systems may have them.
    let slot = farm.slot();
    slot.input("id", &fs::read("/usr/bin/id").unwrap(), 0o4755);
    chown(slot.path.join("root/id"), Some(0), Some(0)).unwrap();
    fs::set_permissions(
        slot.path.join("root/id"),
        fs::Permissions::from_mode(0o4755),
    )
    .unwrap();
    let ended = farm.run(&slot, &["./id", "-u"]).await.unwrap();
    assert_ne!(ended.stdout, "0\n");
    let ended = farm
        .sh("cat /etc/shadow; su -c id </dev/null; mount -t tmpfs x /mnt; echo 1 > /proc/sys/vm/drop_caches; mknod x b 1 1; chown 0 .; kill -9 1")
        .await;
    assert_eq!(ended.stdout, "");
    assert_ne!(ended.code, 0);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_that_run_at_once_cannot_touch_each_other() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let victim = farm.slot();
    let script = "echo secret > secret; chmod 666 secret; echo $$ > pid; id -u; \
                  while ! test -e stop; do sleep 0.02; done; cat secret";
    let request = victim.request(&["/bin/sh", "-c", script]);
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let root = victim.path.join("root");
    until("the victim runs", || root.join("pid").exists()).await;
    until("the victim has a pid", || {
        fs::metadata(root.join("pid")).unwrap().len() > 0
    })
    .await;
    let pid = fs::read_to_string(root.join("pid")).unwrap();
    let pid = pid.trim();
    let path = root.display();
    let ended = farm
        .sh(&format!(
            "cat {path}/secret; ls {path}; echo x > {path}/secret; touch {path}/stop; \
             kill -9 {pid}; kill -9 -1; cat /proc/{pid}/environ; ls /proc/{pid}/cwd/; \
             ls /proc/{pid}/root/tmp/; id -u"
        ))
        .await;
    // kill -9 -1 reaches nobody else, and not the shell itself.
    let attacker = ended.stdout.trim();
    assert!(attacker.parse::<u32>().is_ok(), "{ended:?}");
    fs::write(root.join("stop"), "").unwrap();
    let response = call.await.unwrap().unwrap().into_inner();
    let ended = Ended::new(&response, &victim);
    assert_eq!(ended.code, 0);
    let (user, secret) = ended.stdout.split_once('\n').unwrap();
    assert_eq!(secret, "secret\n");
    assert_ne!(user, attacker);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_an_action_writes_elsewhere_survives_it() {
    if !is_root() {
        return;
    }
    for parent in ["/tmp", "/var/tmp"] {
        let farm = Farm::start_in(parent, |_| {}).await;
        let open_to_all = farm.directory.path().join("open");
        fs::create_dir(&open_to_all).unwrap();
        fs::set_permissions(&open_to_all, fs::Permissions::from_mode(0o777)).unwrap();
        let mark = format!("bb-mark-{}", farm.first);
        let script = format!(
            "for d in /tmp /var/tmp /dev/shm; do echo $d > $d/{mark}; cat $d/{mark}; done; \
             touch {0}/{mark} /run/lock/{mark} /dev/mqueue/{mark} 2>/dev/null; \
             ipcmk -M 4096 >/dev/null; ipcs -m | grep -c {1}",
            open_to_all.display(),
            "$(id -u)",
        );
        let ended = farm.sh(&script).await;
        assert_eq!(ended.stdout, "/tmp\n/var/tmp\n/dev/shm\n1\n", "{ended:?}");
        for place in ["/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/dev/mqueue"] {
            assert!(!Path::new(place).join(&mark).exists(), "{place}");
        }
        assert!(!open_to_all.join(&mark).exists());
        let shared = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
        for user in farm.first..farm.first + 8 {
            assert!(!shared.contains(&format!(" {user} ")), "{shared}");
        }
        // The next one does not see it either.
        let ended = farm
            .sh(&format!(
                "ls /tmp/{mark} /var/tmp/{mark} /dev/shm/{mark}; ipcs -m | grep 4096"
            ))
            .await;
        assert_eq!(ended.stdout, "");
        farm.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_find_the_devices_and_files_that_they_expect() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        let cache = config.build_directory.parent().unwrap().join("cache");
        fs::create_dir(&cache).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
        config.writable_directories = vec![cache];
    })
    .await;
    let ended = farm
        .sh("set -e; echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; \
             mkdir -p a/b; echo hi > a/b/c; mv a/b/c $TMPDIR/c; ln $TMPDIR/c c; cat c; chmod 700 a; \
             rm -r a; echo 500 > /proc/self/oom_score_adj; \
             script -qec 'echo on a terminal' /dev/null < /dev/null | tr -d '\\r'")
        .await;
    assert_eq!(ended.stdout, "3\n3\nhi\non a terminal\n", "{ended:?}");
    assert_eq!(ended.code, 0);
    // What the administrator lets them share.
    let cache = farm.directory.path().join("cache");
    farm.sh(&format!("echo kept > {}/x", cache.display())).await;
    assert_eq!(fs::read_to_string(cache.join("x")).unwrap(), "kept\n");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_configured_users_may_call() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| config.socket_mode = Mode(0o666)).await;
    let socket = farm.directory.path().join("runner.sock");
    let call_as = async |user: u32| {
        let socket = socket.clone();
        let thread = std::thread::spawn(move || {
            // SAFETY: takes numbers. Raw, so that it changes this thread only.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(changed, 0);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut client = RunnerClient::new(daemon::connect(&Endpoint::Unix(socket)));
                let ready = client
                    .check_readiness(CheckReadinessRequest::default())
                    .await;
                let run = client.run(RunRequest::default()).await.unwrap_err();
                (ready, run)
            })
        });
        tokio::task::spawn_blocking(|| thread.join().unwrap())
            .await
            .unwrap()
    };
    let (ready, run) = call_as(farm.first + WORKER).await;
    ready.unwrap();
    assert_eq!(run.code(), Code::InvalidArgument);
    for stranger in [farm.first, farm.first + WORKER + 1, 65_534] {
        let (ready, run) = call_as(stranger).await;
        for status in [ready.unwrap_err(), run] {
            assert_eq!(status.code(), Code::PermissionDenied);
            assert!(status.message().contains(&stranger.to_string()));
            assert!(status.message().contains("allowed_users"));
        }
    }
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_is_told_of_paths_and_directories() {
    if !is_root() {
        return;
    }
    let needed = tempfile::NamedTempFile::new().unwrap();
    let farm = Farm::start_in("/tmp", |config| {
        config.readiness_checking_pathnames = vec![needed.path().to_owned()];
    })
    .await;
    let slot = farm.slot();
    let check = async |path: &str| {
        let request = CheckReadinessRequest {
            path: path.to_owned(),
        };
        farm.client.clone().check_readiness(request).await
    };
    for path in ["", ".", &slot.name, &format!("{}/root", slot.name)] {
        check(path).await.unwrap();
    }
    let status = check("does_not_exist").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(
        status.message().starts_with(
            "Failed to check existence of path \"does_not_exist\" in build directory: "
        )
    );
    let status = check("does/not/exist").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(
        status
            .message()
            .starts_with("Failed to resolve path \"does/not/exist\" in build directory: ")
    );

    let directory = farm.directory.path();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    let status = check("").await.unwrap_err();
    let remedy = format!("chmod o+x {}", directory.display());
    assert!(status.message().contains(&remedy), "{status:?}");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();

    // A command that failed for want of them is not at fault.
    drop(needed);
    assert_eq!(check("").await.unwrap_err().code(), Code::Unavailable);
    let status = farm.run(&slot, &["/bin/false"]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let slot = farm.slot();
    farm.run(&slot, &["/bin/true"]).await.unwrap();
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_make_its_build_directory_anew_and_leave_its_directories_open() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    farm.sh("true").await;
    fs::remove_dir_all(farm.build()).unwrap();
    let slot = Slot {
        name: "0".to_owned(),
        path: farm.build().join("0"),
    };
    farm.run(&slot, &["/bin/true"]).await.unwrap_err();
    // As Buildbarn's worker does.
    for directory in ["", "0", "0/root", "0/tmp"] {
        let directory = farm.build().join(directory);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let ended = farm
        .run(&slot, &["/bin/sh", "-c", "touch x && echo made"])
        .await
        .unwrap();
    assert_eq!(ended.stdout, "made\n");
    assert_eq!(slot.path.metadata().unwrap().mode() & 0o777, 0o777);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_is_open_to_its_actions_user_only_while_that_runs() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let before = slot.path.metadata().unwrap();
    let ended = farm
        .run(
            &slot,
            &["/bin/sh", "-c", "stat -c '%a %g' ..; id -g; ls .."],
        )
        .await
        .unwrap();
    let mut lines = ended.stdout.lines();
    let (mode, group) = lines.next().unwrap().split_once(' ').unwrap();
    assert_eq!(mode, "710");
    assert_eq!(Some(group), lines.next());
    assert_eq!(lines.next(), None);
    let after = slot.path.metadata().unwrap();
    assert_eq!(after.mode(), before.mode());
    assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_commands_finish_for_a_while_and_then_kills_them() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.shutdown.drain_timeout = "300ms".parse().unwrap();
    })
    .await;
    let slot = farm.slot();
    let request = slot.request(&["/bin/sh", "-c", "touch started; setsid sleep 1000"]);
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let started = slot.path.join("root/started");
    until("the action has started", || started.exists()).await;
    farm.stop().await;
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

/// A directory with a configuration for the program, and the first user of it.
fn program_directory() -> (TempDir, u32) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(directory.path().join("build")).unwrap();
    let first = fresh_users();
    let path = directory.path().display();
    let text = format!(
        "listen = \"unix:{path}/runner.sock\"\nbuild_directory = \"{path}/build\"\n\
         allowed_users = []\nusers = {{ first = {first}, count = 8 }}\n"
    );
    fs::write(directory.path().join("bb_runner.toml"), text).unwrap();
    (directory, first)
}

/// The program's command line, after that of a program which starts it.
fn program(prefix: &[&str], directory: &Path) -> std::process::Command {
    let program = env!("CARGO_BIN_EXE_bb_runner");
    let mut words = prefix.iter().chain([&program]);
    let mut command = std::process::Command::new(words.next().unwrap());
    command
        .args(words)
        .arg("--config")
        .arg(directory.join("bb_runner.toml"));
    command
}

/// The program at work; killed on drop.
struct Daemon(std::process::Child);

impl Daemon {
    fn start(prefix: &[&str], directory: &Path) -> Self {
        Daemon(program(prefix, directory).spawn().unwrap())
    }

    fn terminate(mut self) {
        // SAFETY: the number is that of a child that was not waited for.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_namespaces_and_control_groups_still_nothing_survives() {
    if !is_root() {
        return;
    }
    let (directory, first) = program_directory();
    // As in a container: neither is to be had.
    let prefix = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs none /sys/fs/cgroup && \
         exec setpriv --bounding-set=-sys_admin,-sys_chroot \"$@\"",
        "sh",
    ];
    let daemon = Daemon::start(&prefix, directory.path());
    let mut client = connect(directory.path()).await;
    let build = directory.path().join("build");
    let mark = format!("bb-mark-{first}");
    let script = format!(
        "for d in /tmp /var/tmp /dev/shm; do mkdir -m 700 $d/{mark}; echo $d > $d/{mark}/x; \
         cat $d/{mark}/x; done; ipcmk -M 4096 >/dev/null; ipcmk -S 1 >/dev/null; \
         ipcmk -Q >/dev/null; for i in 1 2 3 4 5; do \
         (setsid sh -c 'trap \"\" TERM; while :; do (sleep 0.01) ; done' &); done; sleep 0.1; id -u"
    );
    let slot = Slot::make(&build, 0, first + WORKER);
    let response = client.run(slot.request(&["/bin/sh", "-c", &script])).await;
    let ended = Ended::new(&response.unwrap().into_inner(), &slot);
    let user = ended
        .stdout
        .strip_prefix("/tmp\n/var/tmp\n/dev/shm\n")
        .unwrap_or_else(|| panic!("{ended:?}"))
        .trim();
    assert_eq!(processes(first..first + 8), []);
    assert_eq!(groups(first), Vec::<PathBuf>::new());
    for place in ["/tmp", "/var/tmp", "/dev/shm"] {
        assert!(!Path::new(place).join(&mark).exists(), "{place}");
    }
    for kind in ["shm", "sem", "msg"] {
        let objects = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap();
        assert!(!objects.contains(user), "{objects}");
    }
    daemon.terminate();
}

#[test]
fn without_privileges_the_program_says_what_to_do() {
    if !is_root() {
        return;
    }
    let (directory, _) = program_directory();
    // It may lie where other users cannot reach it.
    let copy = directory.path().join("bb_runner");
    fs::copy(env!("CARGO_BIN_EXE_bb_runner"), &copy).unwrap();
    for flag in [None, Some("--check")] {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--clear-groups"])
            .arg(&copy)
            .arg("--config")
            .arg(directory.path().join("bb_runner.toml"))
            .args(flag)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains("run bb_runner as root"), "{said}");
    }
    let output = program(&[], directory.path()).arg("--check").output();
    assert!(output.unwrap().status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_was_killed_leaves_nothing_after_the_next_start() {
    if !is_root() {
        return;
    }
    let (directory, first) = program_directory();
    let build = directory.path().join("build");
    let daemon = Daemon::start(&[], directory.path());
    let mut client = connect(directory.path()).await;
    let slot = Slot::make(&build, 0, first + WORKER);
    let script = "setsid sleep 1000 & setsid sleep 1000 & touch started; sleep 1000";
    let request = slot.request(&["/bin/sh", "-c", script]);
    let call = tokio::spawn(async move { client.run(request).await });
    let started = slot.path.join("root/started");
    until("the action has started", || started.exists()).await;
    drop(daemon);
    call.await.unwrap().unwrap_err();

    let daemon = Daemon::start(&[], directory.path());
    let mut client = connect(directory.path()).await;
    assert_eq!(processes(first..first + 8), Vec::<i32>::new());
    assert_eq!(slot.path.metadata().unwrap().mode() & 0o777, 0o700);
    let slot = Slot::make(&build, 1, first + WORKER);
    client.run(slot.request(&["/bin/true"])).await.unwrap();
    daemon.terminate();
    assert_eq!(groups(first), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_commands_at_once_all_get_users_and_finish() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let slot = farm.slot();
        let mut client = farm.client.clone();
        calls.spawn(async move {
            let request = slot.request(&["/bin/sh", "-c", "(sleep 100 &) ; echo done"]);
            let response = client.run(request).await.unwrap().into_inner();
            assert_eq!(Ended::new(&response, &slot).stdout, "done\n");
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert_eq!(farm.processes(), Vec::<i32>::new());
    farm.stop().await;
}

/// `cargo test --release --test it -- --ignored --nocapture time_of_a_run`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; run it alone, in a release build"]
async fn time_of_a_run() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    for arguments in [vec!["/bin/true"], vec!["true"]] {
        let mut times = Vec::new();
        // As a worker does: directories that are made anew cost more than all the rest.
        let slot = farm.slot();
        for _ in 0..500 {
            let request = slot.request(&arguments);
            let begin = Instant::now();
            farm.client.clone().run(request).await.unwrap();
            times.push(begin.elapsed());
            fs::remove_file(slot.path.join("stdout")).unwrap();
            fs::remove_file(slot.path.join("stderr")).unwrap();
        }
        times.sort();
        println!(
            "{arguments:?}: p50 {:?}, p90 {:?}, p99 {:?}",
            times[250], times[450], times[495]
        );
    }
    farm.stop().await;
}
