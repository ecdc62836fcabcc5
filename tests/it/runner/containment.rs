//! What an action cannot do, and what is left of it: nothing.

use bb_remote_execution::config::runner::Demand;

use super::*;

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
        assert_eq!(farm.processes(), [0i32; 0], "{script}");
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
    let directory = fs::File::open(&slot.path).unwrap();
    assert!(directory.try_lock().is_err());
    call.abort();
    tokio::task::spawn_blocking(move || directory.lock().unwrap())
        .await
        .unwrap();
    assert_eq!(farm.processes(), [0i32; 0]);
    assert_eq!(slot.path.metadata().unwrap().mode() & 0o777, 0o700);

    // The same by a deadline.
    let slot = farm.slot();
    let mut request = tonic::Request::new(slot.request(&["/bin/sh", "-c", script]));
    request.set_timeout(Duration::from_millis(300));
    farm.client.clone().run(request).await.unwrap_err();
    let directory = fs::File::open(&slot.path).unwrap();
    tokio::task::spawn_blocking(move || directory.lock().unwrap())
        .await
        .unwrap();
    assert_eq!(farm.processes(), [0i32; 0]);
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
    // As the host sees it.
    let pid = farm.processes()[0];
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
             ipcmk -M 4096 >/dev/null; ipcs -m | grep -c ' build .* 4096 '",
            open_to_all.display(),
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
    assert_eq!(farm.processes(), [0i32; 0]);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_control_group_counts_what_nobody_waited_for() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let script = "(setsid sh -c 'i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; touch done' &); \
                  while [ ! -e done ]; do sleep 0.01; done";
    let ended = farm.sh(script).await;
    if let Some(whole) = ended.group.get("cpu_user_seconds") {
        let time = ended.usage.user_time.unwrap();
        let waited_for = time.seconds as f64 + f64::from(time.nanos) / 1e9;
        assert!(*whole > waited_for, "{ended:?}");
        assert_eq!(ended.group["process_limit_reached"], 0.0);
    }
    farm.stop().await;
}

/// Of the host; unmounted on drop.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: PathBuf) -> Self {
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "mode=1777", "tmpfs"])
            .arg(&path)
            .status();
        assert!(mount.unwrap().success());
        Mounted(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_mounted_on_the_host_later_is_there_and_read_only() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let directory = tempfile::tempdir_in("/srv").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    until("sandboxes are ready", || first_processes(&farm).len() > 4).await;
    let mounted = Mounted::tmpfs(directory.path().to_owned());
    fs::write(mounted.0.join("file"), "there").unwrap();
    let place = mounted.0.display();
    let ended = farm
        .sh(&format!("cat {place}/file; touch {place}/new"))
        .await;
    assert_eq!(ended.stdout, "there");
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
    drop(mounted);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_first_thread_has_ended_is_killed_by_its_user_alone() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.containment.processes = Demand::Off;
        config.containment.cgroups = Demand::Off;
    })
    .await;
    // proc(5) calls it a zombie.
    let script = "import ctypes, os, threading, time
if os.fork():
    time.sleep(0.3)
    os._exit(3)
os.setsid()
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).pthread_exit(None)";
    let slot = farm.slot();
    let ended = farm.run(&slot, &["python3", "-c", script]).await.unwrap();
    assert_eq!(ended.code, 3, "{ended:?}");
    let user = farm.first..farm.first + 8;
    let left = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u32>().ok()
        };
        field("Uid:").is_some_and(|id| user.contains(&id)) && field("Threads:") > Some(1)
    });
    assert_eq!(left.count(), 0);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_mounted_on_the_host_while_an_action_runs_is_not_its_to_write_to() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let directory = tempfile::tempdir_in("/srv").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let slot = farm.slot();
    let root = slot.path.join("root");
    let script = format!(
        "touch started; until [ -e go ]; do sleep 0.02; done; touch {}/new",
        directory.path().display()
    );
    let arguments = ["/bin/sh", "-c", &script];
    let mount = async {
        until("it runs", || root.join("started").exists()).await;
        let mounted = Mounted::tmpfs(directory.path().to_owned());
        fs::write(root.join("go"), "").unwrap();
        mounted
    };
    let (ended, mounted) = tokio::join!(farm.run(&slot, &arguments), mount);
    let ended = ended.unwrap();
    assert_ne!(ended.code, 0, "{ended:?}");
    assert!(!mounted.0.join("new").exists());
    drop(mounted);
    farm.stop().await;
}

/// The first processes of sandboxes around this farm's build directory.
fn first_processes(farm: &Farm) -> Vec<i32> {
    let place = farm.build().to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if read("cmdline").starts_with("bb-init") && read("mountinfo").contains(&place) {
            found.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<i32>().ok()),
            );
        }
    }
    found
}

fn kill(process: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(process),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_is_killed_with_its_namespace_is_the_farms_to_run_again() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let request = slot.request(&["/bin/sh", "-c", "touch started; exec sleep 1000"]);
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let started = slot.path.join("root/started");
    until("the action has started", || started.exists()).await;
    let action = farm.processes()[0];
    let namespace = |process: i32| fs::read_link(format!("/proc/{process}/ns/pid")).ok();
    let first = first_processes(&farm)
        .into_iter()
        .find(|&first| namespace(first) == namespace(action))
        .unwrap();
    kill(first);
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(
        status.message().contains("killed from outside"),
        "{status:?}"
    );
    assert_eq!(farm.processes(), [0i32; 0]);

    // Told apart from a command that kills itself, and from one that says so.
    let ended = farm.sh("kill -KILL $$").await;
    assert_eq!((ended.code, &*ended.usage.termination_signal), (-1, "KILL"));
    let ended = farm.sh("exit 137").await;
    assert_eq!((ended.code, &*ended.usage.termination_signal), (137, ""));
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_that_were_killed_before_an_action_came_are_passed_over() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    // Until there is nothing more to prepare.
    until("sandboxes are ready", || first_processes(&farm).len() > 4).await;
    for first in first_processes(&farm) {
        kill(first);
    }
    until("they are gone", || first_processes(&farm).is_empty()).await;
    assert_eq!(farm.sh("exit 3").await.code, 3);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_sees_its_own_control_group_and_no_other() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    if groups(farm.first).is_empty() {
        crate::harness::skip("there are no control groups of version 2 here");
        return;
    }
    let ended = farm
        .sh(
            "cat /proc/self/cgroup; echo; find /sys/fs/cgroup -name cgroup.procs; \
             grep -c . /sys/fs/cgroup/cgroup.procs; touch /sys/fs/cgroup/x 2>/dev/null; \
             mkdir /sys/fs/cgroup/x 2>/dev/null; ls -d /sys/fs/cgroup/x",
        )
        .await;
    let (paths, files) = ended.stdout.split_once("\n\n").unwrap();
    for line in paths.lines() {
        assert!(line.ends_with(":/"), "{line}");
    }
    let (file, processes) = files.trim().split_once('\n').unwrap();
    assert_eq!(file, "/sys/fs/cgroup/cgroup.procs", "{ended:?}");
    // The first process of its namespace, the shell, grep.
    assert_eq!(processes, "3", "{ended:?}");
    farm.stop().await;
}
