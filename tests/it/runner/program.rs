//! The daemon: who may call, when it is ready, how it starts and stops.

use super::*;

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
    for other_user in [farm.first, farm.first + WORKER + 1, 65_534] {
        let (ready, run) = call_as(other_user).await;
        for status in [ready.unwrap_err(), run] {
            assert_eq!(status.code(), Code::PermissionDenied);
            assert!(status.message().contains(&other_user.to_string()));
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
    assert_eq!(processes(first..first + 8), [0i32; 0]);
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
    crate::harness::copy_program(env!("CARGO_BIN_EXE_bb_runner"), &copy);
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

#[test]
fn a_check_finds_nothing_good_in_users_of_whom_there_are_none() {
    if !is_root() {
        return;
    }
    let (directory, _) = program_directory();
    let path = directory.path().join("bb_runner.toml");
    let text = fs::read_to_string(&path).unwrap();
    for (count, is_good) in [("count = 8", true), ("count = 0", false)] {
        fs::write(&path, text.replace("count = 8", count)).unwrap();
        let output = program(&[], directory.path()).arg("--check").output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.contains("are nobody else's"), is_good, "{said}");
        assert_eq!(output.status.success(), is_good, "{said}");
    }
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
    assert_eq!(processes(first..first + 8), [0i32; 0]);
    assert_eq!(slot.path.metadata().unwrap().mode() & 0o777, 0o700);
    let slot = Slot::make(&build, 1, first + WORKER);
    client.run(slot.request(&["/bin/true"])).await.unwrap();
    daemon.terminate();
    assert_eq!(groups(first), Vec::<PathBuf>::new());
}

/// setpriv(1) with the capabilities that the unit leaves to the daemon, and no others.
fn capabilities_of_the_unit() -> [String; 3] {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd/bb-runner.service");
    let unit = fs::read_to_string(unit).unwrap();
    let names = unit
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .flat_map(str::split_whitespace)
        .map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
    let set = names.fold("--bounding-set=-all".to_owned(), |set, name| set + &name);
    assert!(set.contains("+sys_admin"), "{set}");
    ["setpriv".to_owned(), set, "--no-new-privs".to_owned()]
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_units_capabilities_every_action_starts_however_many_at_once() {
    if !is_root() {
        return;
    }
    const AT_ONCE: usize = 8;
    const EACH: usize = 100;
    let (directory, first) = program_directory();
    let prefix = capabilities_of_the_unit();
    let prefix = prefix.each_ref().map(String::as_str);
    let daemon = Daemon::start(&prefix, directory.path());
    let client = connect(directory.path()).await;
    let build = directory.path().join("build");
    let mut calls = tokio::task::JoinSet::new();
    for slot in 0..AT_ONCE {
        let (build, mut client) = (build.clone(), client.clone());
        calls.spawn(async move {
            let mut failed = Vec::new();
            for number in 0..EACH {
                let number = u32::try_from(slot * EACH + number).unwrap();
                let slot = Slot::make(&build, number, first + WORKER);
                // Others' load: the machine's processors are taken when the next one starts.
                let script = [
                    "/bin/sh",
                    "-c",
                    "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done",
                ];
                if let Err(status) = client.run(slot.request(&script)).await {
                    failed.push(status);
                }
            }
            failed
        });
    }
    let failed: Vec<Status> = calls.join_all().await.into_iter().flatten().collect();
    assert!(
        failed.is_empty(),
        "{} of {}: {:?}",
        failed.len(),
        AT_ONCE * EACH,
        failed[0]
    );
    daemon.terminate();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runners_never_share_users_even_with_a_run_directory_each() {
    if !is_root() {
        return;
    }
    let (directory, _) = program_directory();
    let daemon = Daemon::start(&[], directory.path());
    connect(directory.path()).await;
    let other = directory.path().join("other");
    fs::create_dir(&other).unwrap();
    let text = fs::read_to_string(directory.path().join("bb_runner.toml")).unwrap();
    let text = text.replace("runner.sock", "other/runner.sock");
    fs::write(other.join("bb_runner.toml"), text).unwrap();
    let prefix = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs none /run && exec \"$@\"",
        "sh",
    ];
    let output = program(&prefix, &other).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if !Path::new("/sys/fs/cgroup/cgroup.procs").exists()
        && !Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists()
    {
        crate::harness::skip("there are no control groups of version 2 here");
        return;
    }
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("users.first"), "{said}");
    assert!(said.contains("another bb_runner"), "{said}");
    daemon.terminate();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_soft_limit_of_descriptors_limits_no_actions_and_is_not_theirs() {
    if !is_root() {
        return;
    }
    let (directory, first) = program_directory();
    let daemon = Daemon::start(&["prlimit", "--nofile=48:"], directory.path());
    let client = connect(directory.path()).await;
    let build = directory.path().join("build");
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (mut client, slot) = (client.clone(), Slot::make(&build, number, first + WORKER));
        calls.spawn(async move {
            let script = "sleep 0.5; ulimit -Sn";
            let response = client.run(slot.request(&["/bin/sh", "-c", script])).await;
            Ended::new(&response.unwrap().into_inner(), &slot).stdout
        });
    }
    for said in calls.join_all().await {
        assert_eq!(said, "1024\n");
    }
    daemon.terminate();
}
