//! What the configuration adds to commands and around them.

use bb_remote_execution::config::{
    Duration as Configured, Size,
    runner::{Demand, Network, Root},
};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn logs_end_at_their_limit_and_say_so() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| config.limits.log_size = Size(1000)).await;
    let ended = farm
        .sh("head -c 5000000 /dev/zero | tr '\\0' x; sleep 0.3; echo end; echo short >&2")
        .await;
    assert_eq!(ended.code, 0);
    let (kept, mark) = ended.stdout.split_once('\n').unwrap();
    assert_eq!(kept, "x".repeat(1000));
    assert!(mark.contains("limits.log_size"), "{mark}");
    assert_eq!(ended.stderr, "short\n");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_stopped_may_say_good_bye() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.termination_grace = Configured::seconds(20);
    })
    .await;
    let slot = farm.slot();
    let script = "trap 'echo bye; exit' TERM; touch started; while :; do sleep 0.02; done";
    let request = slot.request(&["/bin/sh", "-c", script]);
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let started = slot.path.join("root/started");
    until("the action has started", || started.exists()).await;
    call.abort();
    let directory = fs::File::open(&slot.path).unwrap();
    tokio::task::spawn_blocking(move || directory.lock().unwrap())
        .await
        .unwrap();
    let stdout = fs::read_to_string(slot.path.join("stdout")).unwrap();
    assert_eq!(stdout, "bye\n");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_end_at_their_limit_also_while_a_command_says_good_bye() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.termination_grace = Configured::seconds(60);
        config.limits.log_size = Size(1000);
    })
    .await;
    let slot = farm.slot();
    let script = "bye() { head -c 5000000 /dev/zero; touch said; while [ ! -e go ]; do sleep 0.02; done; exit; }; \
                  trap bye TERM; touch started; while :; do sleep 0.02; done";
    let request = slot.request(&["/bin/sh", "-c", script]);
    let mut client = farm.client.clone();
    let call = tokio::spawn(async move { client.run(request).await });
    let root = slot.path.join("root");
    until("the action has started", || root.join("started").exists()).await;
    call.abort();
    until("it has said all", || root.join("said").exists()).await;
    let stdout = slot.path.join("stdout");
    let length = || fs::metadata(&stdout).unwrap().len();
    until("its log is cut", || length() <= 1000).await;
    fs::write(root.join("go"), "").unwrap();
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_an_action_links_into_its_outputs_is_as_if_its_user_had_made_it() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let script = "ln ../stdout linked && id -u";
    let ended = farm.run(&slot, &["/bin/sh", "-c", script]).await.unwrap();
    assert_eq!(ended.code, 0, "{ended:?}");
    let user = ended.stdout.trim().parse::<u32>().unwrap();
    let owner = |name| fs::metadata(slot.path.join(name)).unwrap().uid();
    assert_eq!((owner("root/linked"), owner("stderr")), (user, 0));
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emulator_that_is_missing_is_not_the_client_s_fault() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.emulator = vec!["/nonexistent/emulator".to_owned()];
    })
    .await;
    let slot = farm.slot();
    let status = farm.run(&slot, &["/bin/true"]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let message = status.message();
    assert!(
        message.contains("exec emulator \"/nonexistent/emulator\""),
        "{message}"
    );
    assert!(message.contains("bb_runner.toml"), "{message}");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_and_an_emulator_are_added() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.additional_groups = vec!["4242".to_owned()];
        config.emulator = vec![
            "/bin/sh".to_owned(),
            "-c".to_owned(),
            "echo $0 $1; id -G".to_owned(),
        ];
    })
    .await;
    let slot = farm.slot();
    let ended = farm.run(&slot, &["true", "x"]).await.unwrap();
    let (said, groups) = ended.stdout.split_once('\n').unwrap();
    assert_eq!(said, "/usr/bin/true x");
    assert!(groups.trim().ends_with(" 4242"), "{groups}");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_actions_share_is_cleaned_around_them() {
    if !is_root() {
        return;
    }
    let shared = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = shared.path().to_owned();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(path.join("before")).unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let command = format!("echo cleaned >> {}", log.path().display());
    let farm = Farm::start_in("/tmp", |config| {
        config.writable_directories = vec![path.clone()];
        config.clean_temporary_directories = vec![path.clone()];
        config.run_command_cleaner = ["/bin/sh", "-c", &command].map(str::to_owned).to_vec();
    })
    .await;
    let ended = farm
        .sh(&format!("ls {0}; mkdir -p {0}/a/b; ls {0}", path.display()))
        .await;
    assert_eq!(ended.stdout, "a\n", "{ended:?}");
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    assert_eq!(
        fs::read_to_string(log.path()).unwrap(),
        "cleaned\ncleaned\n"
    );
    farm.stop().await;
}

/// A program that needs no library, if this host has one.
fn static_shell() -> Option<Vec<u8>> {
    let found = fs::read("/bin/busybox").ok();
    if found.is_none() {
        crate::harness::skip("install busybox-static");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_root_can_be_the_root() {
    let Some(shell) = static_shell().filter(|_| is_root()) else {
        return;
    };
    let farm = Farm::start_in("/tmp", |config| config.root = Root::Input).await;
    let slot = farm.slot();
    slot.input("bin/sh", &shell, 0o755);
    slot.input("work/file", b"hello\n", 0o644);
    let script = "pwd; cat /work/file; cd /; echo *; echo $TMPDIR; echo x > /tmp/x; \
                  test -r /proc/self/status && test -c /dev/null && echo y > /output; \
                  echo ..; cd ..; echo *";
    let mut request = slot.request(&["/bin/sh", "-c", script]);
    request.working_directory = "work".to_owned();
    let ended = farm.send(request, &slot).await.unwrap();
    assert_eq!(
        ended.stdout,
        "/work\nhello\nbin dev proc tmp work\n/tmp\n..\nbin dev output proc tmp work\n",
        "{ended:?}"
    );
    // What it was given to mount things on is no output.
    let mut left: Vec<_> = fs::read_dir(slot.path.join("root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["bin", "output", "work"]);
    // Inputs in the way of what is mounted are their client's fault, and no reason to avoid this host.
    for name in ["proc", "dev", "tmp"] {
        let slot = farm.slot();
        slot.input("bin/sh", &shell, 0o755);
        slot.input(name, b"", 0o644);
        let request = slot.request(&["/bin/sh", "-c", "true"]);
        let status = farm.send(request, &slot).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(name), "{status:?}");
    }
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_can_be_the_root() {
    let Some(shell) = static_shell().filter(|_| is_root()) else {
        return;
    };
    let image = tempfile::tempdir_in("/srv").unwrap();
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut build = PathBuf::new();
    let farm = Farm::start_in("/srv", |config| {
        build.clone_from(&config.build_directory);
        for directory in ["bin", "proc", "sys", "dev", "tmp"] {
            fs::create_dir(image.path().join(directory)).unwrap();
        }
        fs::create_dir_all(image.path().join(build.strip_prefix("/").unwrap())).unwrap();
        let program = image.path().join("bin/sh");
        fs::write(&program, &shell).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        config.root = Root::Image(image.path().to_owned());
    })
    .await;
    let ended = farm
        .sh("cd /; echo *; cd -; echo y > output; echo x > /x; echo x > /tmp/x && echo in /tmp")
        .await;
    let expected = format!(
        "bin dev proc srv sys tmp\n{}/root\nin /tmp\n",
        build.display()
    );
    assert_eq!(ended.stdout, expected, "{ended:?}");
    assert!(!image.path().join("x").exists());
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_required_and_not_there_stops_the_daemon() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let mut config = configuration(directory.path(), fresh_users());
    fs::create_dir(&config.build_directory).unwrap();
    config.containment.hidden = Demand::Require;
    config.containment.mounts = Demand::Off;
    let Err(Failure::Configuration { key, message }) = runner::run(config, Lifecycle::new()).await
    else {
        panic!("it started");
    };
    assert_eq!(key, "containment.hidden");
    assert!(message.contains("containment.mounts"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn required_control_groups_keep_the_limits_or_the_check_says_which_they_do_not() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let mut config = configuration(directory.path(), fresh_users());
    fs::create_dir(&config.build_directory).unwrap();
    config.containment.cgroups = Demand::Require;
    config.limits.memory = Size(100 << 20);
    let controllers = ["", "/unified"]
        .map(|mount| fs::read_to_string(format!("/sys/fs/cgroup{mount}/cgroup.controllers")));
    let limited = controllers
        .iter()
        .flatten()
        .any(|names| names.split_whitespace().any(|name| name == "memory"));
    let loaded = bb_remote_execution::config::examine::<Config>(directory.path(), true);
    let installation = daemon::Installation::of("bb_runner", directory.path(), &loaded);
    let mut report = daemon::CheckReport::default();
    runner::check_host(&config, &installation, &mut report).await;
    let failures = report.failures();
    let told = failures
        .iter()
        .any(|failure| failure.to_string().contains("limits.memory"));
    assert_eq!(told, !limited, "{failures:?}");
    if !limited {
        let failure = runner::run(config, Lifecycle::new()).await.unwrap_err();
        assert!(failure.to_string().contains("limits.memory"), "{failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_runner_on_the_same_build_directory_may_give_what_the_first_does_not() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    let other = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(other.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let first = fresh_users();
    let mut config = configuration(other.path(), first);
    config.build_directory = farm.build();
    config.containment.network = Network::Host;
    let lifecycle = Lifecycle::new();
    let running = tokio::spawn(runner::run(config, lifecycle.clone()));
    let mut client = connect(other.path()).await;

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
    let arguments = ["/bin/bash", "-c", &script];
    assert_ne!(farm.run(&slot, &arguments).await.unwrap().code, 0);
    let slot = farm.slot();
    let response = client.run(slot.request(&arguments)).await.unwrap();
    assert_eq!(response.into_inner().exit_code, 0);

    lifecycle.stop();
    running.await.unwrap().unwrap();
    assert_eq!(farm.sh("exit 3").await.code, 3);
    farm.stop().await;
}
