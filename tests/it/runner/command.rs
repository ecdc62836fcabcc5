//! What a command is given, what it gives, and why it may not start.

use super::*;

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
    let farm = Farm::start_in("/tmp", |config| {
        config.set_default_environment_variables = false;
    })
    .await;
    let slot = farm.slot();
    let mut request = slot.request(&["/usr/bin/env"]);
    request.environment_variables = BTreeMap::from([("FOO".to_owned(), "b ar".to_owned())]);
    let ended = farm.send(request, &slot).await.unwrap();
    // The same in every slot.
    let tmpdir = farm.build().join("tmp");
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
            "Cannot find executable \"nonexistent_command\" in search paths \"/usr/local/sbin:",
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
        let hint = match arguments[..] {
            ["./picture"] => "architecture",
            ["./not_executable"] => "FileNode.is_executable",
            ["./no_interpreter"] => "interpreter",
            _ => "",
        };
        assert!(status.message().contains(hint), "{status:?}");
    }
    // Cut off within the name of its interpreter; a disk that fails says the same.
    let slot = farm.slot();
    let program = std::fs::read("/bin/true").unwrap();
    slot.input("cut_off", &program[..800], 0o777);
    let status = farm.send(slot.request(&["./cut_off"]), &slot).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DataLoss, "{status:?}");
    assert!(status.message().contains("is cut off"), "{status:?}");
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
    let pwd = farm.build().join("root/a");
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
