//! The commands of bb_scheduler that ask a scheduler, as programs of their own.

use std::{
    os::unix::fs::PermissionsExt,
    process::{Output, Stdio},
};

use super::*;

/// What a terminal would obey, and what would hide or turn what follows.
const HOSTILE: &str = "\u{1b}]0;x\u{7}\u{1b}[31m\u{9b}2J\u{202e}\u{2066}\u{200b}\r\n<b>";

impl Scheduler {
    fn program(&self) -> tokio::process::Command {
        let config = self.directory.path().join("cli.toml");
        let socket = self.directory.path().join("control");
        std::fs::write(
            &config,
            format!("[control]\nlisten = \"unix:{}\"\n", socket.display()),
        )
        .unwrap();
        let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_bb_scheduler"));
        program.arg("--config").arg(config).stdin(Stdio::null());
        program
    }

    async fn command(&self, words: &[&str]) -> Output {
        self.program().args(words).output().await.unwrap()
    }

    /// Its standard output, once it has done what it should.
    pub async fn told(&self, words: &[&str]) -> String {
        let output = self.command(words).await;
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn json(&self, words: &[&str]) -> serde_json::Value {
        let mut words = words.to_vec();
        words.push("--json");
        let told = self.told(&words).await;
        assert_eq!(told.lines().count(), 1, "{told}");
        serde_json::from_str(&told).unwrap()
    }
}

/// One action of a hostile client, queued for workers that are busy with another one.
async fn hostile_farm() -> (Scheduler, Vec<Streaming<Operation>>, Digest) {
    let scheduler = Scheduler::start(|_| {}).await;
    let name = format!("w{HOSTILE}");
    let mut request = synchronize(&name);
    request.prefer_being_idle = false;
    let mut streams = Vec::new();
    let command = scheduler
        .upload(
            Command {
                arguments: vec!["sh".to_owned(), format!("-c {HOSTILE}")],
                ..Default::default()
            }
            .encode_to_vec(),
        )
        .await;
    let held = scheduler.parked(&name).await;
    let mut last = Digest::default();
    for salt in ["1", "2"] {
        let action = scheduler
            .action(salt, |action| action.command_digest = Some(command.clone()))
            .await;
        let mut request = Request::new(execute(&action));
        let metadata = RequestMetadata {
            tool_invocation_id: format!("i{HOSTILE}"),
            target_id: format!("//t:{salt}{HOSTILE}"),
            ..Default::default()
        };
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        request
            .metadata_mut()
            .insert_bin(REQUEST_METADATA_HEADER, value);
        streams.push(scheduler.request(request).await.unwrap());
        last = action;
    }
    desired(held.await.unwrap().unwrap());
    (scheduler, streams, last)
}

fn is_harmless(text: &str) -> bool {
    text.chars().all(|c| {
        let turns = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
        c == '\n' || !(c.is_control() || turns)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn each_question_has_a_command_and_none_lets_clients_write_to_the_terminal() {
    let (scheduler, mut streams, action) = hostile_farm().await;
    let executing = next(&mut streams[0]).await.name;
    let queued = next(&mut streams[1]).await.name;
    let digest = format!("{}/{}", action.hash, action.size_bytes);
    let commands: [&[&str]; 12] = [
        &["status"],
        &["queues"],
        &["workers"],
        &["operations"],
        &["why", &executing],
        &["why", &queued],
        &["action", &digest],
        &["action", &action.hash],
        &["store", "usage"],
        &["store", "check"],
        &["drain", "name=none"],
        &["undrain"],
    ];
    for words in commands {
        for form in [None, Some("--json")] {
            let mut words = words.to_vec();
            words.extend(form);
            let output = scheduler.command(&words).await;
            for text in [&output.stdout, &output.stderr] {
                let text = String::from_utf8(text.clone()).unwrap();
                assert!(is_harmless(&text), "{words:?}: {text:?}");
            }
            let is_known = !words.contains(&"name=none");
            assert_eq!(output.status.success(), is_known, "{words:?}: {output:?}");
        }
        // On a terminal, which has 80 columns unless it says otherwise.
        let program = env!("CARGO_BIN_EXE_bb_scheduler");
        let config = scheduler.directory.path().join("cli.toml");
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let line = format!(
            "stty cols 80; '{program}' --config '{}' {}",
            config.display(),
            quoted.join(" ")
        );
        let output = tokio::process::Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let mut text = String::from_utf8(output.stdout).unwrap();
        for own in [
            "\u{1b}[31m",
            "\u{1b}[32m",
            "\u{1b}[33m",
            "\u{1b}[0m",
            "\r\n",
        ] {
            text = text.replace(own, if own == "\r\n" { "\n" } else { "" });
        }
        assert!(is_harmless(&text), "{words:?}: {text:?}");
        if ["queues", "workers", "operations"].contains(&words[0]) {
            let longest = text.lines().map(|line| line.chars().count()).max();
            assert!(longest <= Some(80), "{text}");
        }
    }

    let status = scheduler.json(&["status"]).await;
    for (key, value) in [("workers", 1), ("executing", 1), ("idle", 0), ("queued", 1)] {
        assert_eq!(status[key], value, "{status}");
    }
    assert!(status["oldest_wait_seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(status["serving"], true);
    let queues = scheduler.json(&["queues"]).await;
    assert_eq!(queues[0]["wanted_workers"], 2);
    assert_eq!(queues[0]["platform"][0]["name"], "OSFamily");
    let workers = scheduler.json(&["workers"]).await;
    assert_eq!(workers[0]["labels"]["name"], format!("w{HOSTILE}"));
    assert_eq!(workers[0]["state"], "executing");
    let operations = scheduler.json(&["operations", "--stage", "queued"]).await;
    assert_eq!(operations.as_array().unwrap().len(), 1);
    assert_eq!(operations[0]["target"], format!("//t:2{HOSTILE}"));
    let why = scheduler.json(&["why", &queued]).await;
    assert_eq!(why["matching_workers"], 1, "{why}");
    let shown = scheduler.json(&["action", &action.hash]).await;
    assert_eq!(shown["operations"][0], operations[0]["name"]);
    let described = std::fs::read_to_string(
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("man/bb_scheduler.8"),
    )
    .unwrap();
    for value in [
        &status,
        &queues[0],
        &workers[0],
        &operations[0],
        &why,
        &shown,
    ] {
        for key in value.as_object().unwrap().keys() {
            assert!(
                described.contains(&format!(" {key} ")),
                "{key} is in no man page"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_drained_and_operations_killed_by_commands() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("a").await;
    let listed = scheduler.told(&["undrain"]).await;
    assert_eq!(listed, "No workers are drained.\n");
    let drained = scheduler.told(&["drain", "name=a"]).await;
    assert_eq!(drained, "Drained 1 slot of name=a (OSFamily=linux).\n");
    let again = scheduler.told(&["drain", "name=a"]).await;
    assert!(
        again.starts_with("name=a was drained already, since 20"),
        "{again}"
    );
    assert!(again.ends_with("Z: 1 slot (OSFamily=linux).\n"), "{again}");
    assert_eq!(scheduler.json(&["workers"]).await[0]["drained"], true);
    let action = scheduler.action("1", |_| {}).await;
    let mut stream = scheduler.execute(&action).await.unwrap();
    let name = next(&mut stream).await.name;
    let why = scheduler.told(&["why", &name]).await;
    assert!(why.contains("1 drained"), "{why}");
    let listed = scheduler.json(&["undrain"]).await;
    assert_eq!(listed[0]["pattern"]["name"], "a");
    scheduler.told(&["undrain", "name=a"]).await;
    desired(held.await.unwrap().unwrap());
    let killed = scheduler
        .told(&["kill", &name, "--reason", "it is late"])
        .await;
    assert!(killed.starts_with("Killed "), "{killed}");
    let status = response(&mut stream).await.status.unwrap();
    assert_eq!(
        (status.code, &*status.message),
        (rpc::Code::PermissionDenied as i32, "it is late")
    );
    let terminated = scheduler.json(&["terminate", "name=a"]).await;
    assert_eq!(terminated["terminated"], 1);
    let workers = scheduler.json(&["workers"]).await;
    assert_eq!(workers[0]["terminating"], true, "{workers}");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_drained_before_they_come() {
    let scheduler = Scheduler::start(|_| {}).await;
    let none = scheduler.command(&["drain", "name=a"]).await;
    assert_eq!(none.status.code(), Some(66));
    let ahead = ["drain", "name=a", "--ahead", "--platform", "OSFamily=linux"];
    scheduler.told(&ahead).await;
    let listed = scheduler.json(&["undrain"]).await;
    assert_eq!(listed[0]["pattern"]["name"], "a");
    let _held = scheduler.parked("a").await;
    assert_eq!(scheduler.json(&["workers"]).await[0]["drained"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_kills_an_operation_hears_which_others_ended_with_it() {
    let scheduler = Scheduler::start(|_| {}).await;
    let held = scheduler.parked("a").await;
    let action = scheduler.action("1", |_| {}).await;
    let mut names = Vec::new();
    let mut streams = Vec::new();
    for build in ["one", "other"] {
        let mut request = Request::new(execute(&action));
        let metadata = RequestMetadata {
            tool_invocation_id: build.to_owned(),
            ..Default::default()
        };
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        request
            .metadata_mut()
            .insert_bin(REQUEST_METADATA_HEADER, value);
        let mut stream = scheduler.request(request).await.unwrap();
        names.push(next(&mut stream).await.name);
        streams.push(stream);
    }
    desired(held.await.unwrap().unwrap());
    let listed = scheduler.told(&["operations"]).await;
    assert!(
        listed.ends_with("2 operations, oldest first.\n"),
        "{listed}"
    );
    let killed = scheduler.told(&["kill", &names[0]]).await;
    assert!(killed.ends_with(": 2 operations.\n"), "{killed}");
    for stream in &mut streams {
        let status = response(stream).await.status.unwrap();
        assert_eq!(status.code, rpc::Code::PermissionDenied as i32);
    }
    let again = scheduler.told(&["kill", &names[1]]).await;
    assert!(again.ends_with("had ended already.\n"), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_no_action_is_said_to_be_none() {
    let scheduler = Scheduler::start(|_| {}).await;
    let blob = scheduler.upload(b"no action".to_vec()).await;
    let digest = format!("{}/{}", blob.hash, blob.size_bytes);
    let output = scheduler.command(&["action", &digest]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(66), "{text}");
    assert!(text.contains("but is no Action"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_does_not_answer_is_named_within_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    // Connections are taken by the kernel, and by nobody else.
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let endpoint = format!("unix:{}", socket.display());
    let begin = std::time::Instant::now();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_bb_scheduler"))
        .args(["status", "--endpoint", &endpoint])
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{text}");
    assert!(text.contains("systemctl status bb-scheduler"), "{text}");
    assert!(begin.elapsed().as_secs() < 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_result_is_taken_back_by_a_command() {
    let scheduler = Scheduler::start(|_| {}).await;
    let action = scheduler.action("1", |_| {}).await;
    let update = reapi::UpdateActionResultRequest {
        action_digest: Some(action.clone()),
        action_result: Some(reapi::ActionResult {
            exit_code: 0,
            stdout_raw: b"wrong".as_slice().into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut cache = reapi::action_cache_client::ActionCacheClient::new(scheduler.clients.clone());
    cache.update_action_result(update).await.unwrap();
    let shown = scheduler.json(&["action", &action.hash]).await;
    assert_eq!(shown["result"]["exit_code"], 0);
    let digest = format!("{}/{}", action.hash, action.size_bytes);
    scheduler.told(&["store", "remove-result", &digest]).await;
    assert!(scheduler.json(&["action", &digest]).await["result"].is_null());
    let again = scheduler
        .command(&["store", "remove-result", &digest])
        .await;
    assert_eq!(again.status.code(), Some(66));
    let checked = scheduler.json(&["store", "check"]).await;
    assert_eq!(checked["removed"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_scripts_who_must_act() {
    let own = format!("uid:{}", nix::unistd::geteuid());
    let grants = format!(
        "[[grants]]\nwho = [\"{own}\"]\nmay = [\"execute\", \"cas.write\"]\nmay_not = [\"steer\"]\n"
    );
    let parsed: Config = toml::from_str(&grants).unwrap();
    let scheduler = Scheduler::start(|config| config.grants = parsed.grants).await;
    let path = |name: &str| scheduler.directory.path().join(name);
    let state = format!("unix:{}", path("state").display());
    let nowhere = format!("unix:{}", path("nowhere").display());
    let unknown = "00000000-0000-4000-8000-000000000000";
    for (words, code, says) in [
        // The control socket lets see whoever may open it, but for what the grants refuse.
        (&["status"][..], 0, ""),
        (&["terminate", "a"], 66, "no worker has these labels"),
        (&["kill", unknown], 77, "may not \"steer\""),
        (&["store", "check"], 77, "may not \"steer\""),
        (&["status", "--endpoint", &state], 77, "may not \"see\""),
        (&["why", unknown], 66, "not found"),
        (&["why", "x"], 66, "it is no name"),
        (&["status", "--endpoint", &nowhere], 69, "could not connect"),
        (&["status", "--endpoint", "x"], 2, "--endpoint"),
        (&["drain"], 2, "<PATTERN>"),
        (&["action", "ab"], 2, "2 characters"),
        (&["action", &"AB".repeat(32)], 2, "characters other than"),
        (
            &["kill", unknown, "--size-class", "1"],
            2,
            "--without-workers",
        ),
        (&["action", &"ab".repeat(32)], 66, "There is no action"),
    ] {
        let output = scheduler.command(words).await;
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {text}");
        assert!(text.contains(says), "{words:?}: {text}");
    }
    // A configuration that says nothing names no daemon to ask.
    std::fs::write(path("none.toml"), "none").unwrap();
    for (config, says) in [("nope.toml", "No such file"), ("none.toml", "is not TOML")] {
        let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_bb_scheduler"));
        program.arg("--config").arg(path(config)).arg("status");
        let output = program.output().await.unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(66), "{text}");
        assert!(text.contains(config) && text.contains(says), "{text}");
    }
    let mode = std::fs::metadata(path("control")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o660);
    scheduler.lifecycle.stop();
    scheduler.running.await.unwrap().unwrap();
    let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_bb_scheduler"));
    program.arg("--config").arg(path("cli.toml")).arg("queues");
    let output = program.output().await.unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{text}");
    assert!(text.contains("systemctl start bb-scheduler"), "{text}");
}

/// As a user who is not in the socket's group.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_not_open_the_socket_is_told_who_may() {
    if !crate::harness::is_root() {
        return;
    }
    let scheduler = Scheduler::start(|_| {}).await;
    scheduler.told(&["status"]).await;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let program = directory.path().join("bb_scheduler");
    crate::harness::copy_program(env!("CARGO_BIN_EXE_bb_scheduler"), &program);
    for path in [directory.path(), scheduler.directory.path()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let socket = scheduler.directory.path().join("control");
    std::os::unix::fs::chown(&socket, None, Some(2)).unwrap();
    let output = tokio::process::Command::new(&program)
        .arg("--config")
        .arg(scheduler.directory.path().join("cli.toml"))
        .arg("status")
        .uid(64_064)
        .gid(64_064)
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(77), "{text}");
    assert!(text.contains("members of the group bin"), "{text}");
}
