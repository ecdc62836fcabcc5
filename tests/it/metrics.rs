//! What the three daemons tell those who watch them: metrics, health, and their own commands; and the
//! dashboards and alerts that are made of it.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::harness::{Farm, Task, is_ok, is_root, skip};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn exchange(mut stream: impl Read + Write, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, body.to_owned())
}

/// From a worker or a runner of a farm.
fn get(farm: &Farm, daemon: &str, path: &str) -> (u16, String) {
    let socket = farm.path().join(format!("run-{daemon}/metrics.sock"));
    exchange(UnixStream::connect(socket).unwrap(), path)
}

fn ask(farm: &Farm, daemon: &str, words: &[&str]) -> serde_json::Value {
    let program = farm.path().join("bin").join(format!("bb_{daemon}"));
    let socket = farm.path().join(format!("run-{daemon}/control.sock"));
    let output = Command::new(program)
        .args(words)
        .args(["--json", "--endpoint"])
        .arg(format!("unix:{}", socket.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The value of a series, whose labels begin so.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Names of series in expressions of dashboards and alerts.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let prefixes = ["bb_", "buildbarn_", "grpc_server_", "process_"];
    words
        .filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

fn expressions(value: &serde_json::Value, into: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(map) => {
            if let Some(expression) = map.get("expr").and_then(|text| text.as_str()) {
                into.push(expression.to_owned());
            }
            map.values().for_each(|value| expressions(value, into));
        }
        serde_json::Value::Array(list) => {
            list.iter().for_each(|value| expressions(value, into));
        }
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_farm_tells_what_it_did_and_every_dashboard_and_alert_is_about_what_it_tells() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let client = farm.client();
    for number in 0..3 {
        assert!(is_ok(
            &client.run(&Task::shell(&format!("echo {number}"))).await
        ));
    }
    let failed = client.run(&Task::shell("exit 3")).await;
    assert_eq!(failed.result.unwrap().exit_code, 3);

    let status = ask(&farm, "scheduler", &["status"]);
    assert_eq!(status["workers"], 2, "{status}");
    let web = status["addresses"]["web"].as_str().unwrap().to_owned();
    let scheduler = |path: &str| exchange(std::net::TcpStream::connect(&web).unwrap(), path);
    let (code, scheduler_told) = scheduler("/metrics");
    assert_eq!(code, 200);
    let (code, worker_told) = get(&farm, "worker", "/metrics");
    assert_eq!(code, 200);
    let deadline = Instant::now() + Duration::from_secs(20);
    let runner_told = loop {
        let (code, told) = get(&farm, "runner", "/metrics");
        assert_eq!(code, 200);
        // An action is reported before the runner has counted its end.
        let counted = value(&told, "bb_runner_running_actions") == 0.0;
        if counted || Instant::now() > deadline {
            break told;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for text in [&scheduler_told, &worker_told, &runner_told] {
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    let queue = "buildbarn_builder_in_memory_build_queue";
    assert!(value(&scheduler_told, "bb_scheduler_workers{") >= 2.0);
    assert_eq!(
        value(&scheduler_told, "bb_scheduler_queued_operations{"),
        0.0
    );
    let executed: f64 = scheduler_told
        .lines()
        .filter(|line| line.starts_with(&format!("{queue}_tasks_executing_duration_seconds_count")))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert!(executed >= 4.0, "{scheduler_told}");
    assert!(scheduler_told.contains("result=\"NonZeroExitCode\",grpc_code=\"\""));
    // All of Buildbarn's, but for what nothing happened of.
    for (name, labels) in [
        (
            "in_flight_deduplications_total",
            "outcome=\"SameInvocation\"",
        ),
        (
            "in_flight_deduplications_total",
            "outcome=\"OtherInvocation\"",
        ),
        ("in_flight_deduplications_total", "outcome=\"New\""),
        ("invocations_created_total", "depth=\"0\""),
        ("invocations_activated_total", "depth=\"1\""),
        ("invocations_deactivated_total", "depth=\"1\""),
        ("invocations_removed_total", "depth=\"1\""),
        (
            "tasks_scheduled_total",
            "assignment=\"Worker\",do_not_cache=\"false\"",
        ),
        (
            "tasks_scheduled_total",
            "assignment=\"Queue\",do_not_cache=\"true\"",
        ),
        ("tasks_queued_duration_seconds_count", ""),
        (
            "tasks_executing_duration_seconds_count",
            "result=\"Success\"",
        ),
        ("tasks_executing_retries_count", "result=\"Success\""),
        ("workers_created_total", ""),
        ("workers_terminating_total", ""),
        ("workers_removed_total", "state=\"Idle\""),
        ("worker_invocation_stickiness_retained_count", ""),
    ] {
        let name = format!("{queue}_{name}{{");
        let found = scheduler_told
            .lines()
            .any(|line| line.starts_with(&name) && line.contains(labels));
        assert!(found, "{name}{labels}: {scheduler_told}");
    }
    assert!(value(&scheduler_told, "bb_storage_used_bytes") > 0.0);
    let called = "grpc_server_handled_total{grpc_service=\"build.bazel.remote.execution.v2.Execution\",grpc_method=\"Execute\"";
    assert!(value(&scheduler_told, called) >= 4.0);
    assert_eq!(value(&worker_told, "bb_worker_slots"), 2.0);
    assert_eq!(value(&worker_told, "bb_worker_serving"), 1.0);
    let stage = "buildbarn_builder_build_executor_duration_seconds_count{result=\"Success\",grpc_code=\"\",stage=\"Running\"}";
    assert!(value(&worker_told, stage) >= 3.0);
    let ended = "bb_runner_actions_total{outcome=\"Ended\"}";
    assert!(value(&runner_told, ended) >= 4.0);
    assert_eq!(value(&runner_told, "bb_runner_running_actions"), 0.0);

    // What is asked for in dashboards and alerts is there, but for what nothing happened of.
    let mut all = Vec::new();
    let directory = repository().join("packaging/monitoring");
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        match path.extension().unwrap().to_str().unwrap() {
            "json" => expressions(&serde_json::from_str(&text).unwrap(), &mut all),
            _ if path.ends_with("bb-remote-execution.rules.yml") => {
                all.extend(
                    text.lines()
                        .filter(|line| line.contains("bb_") || line.contains("buildbarn_"))
                        .filter(|line| {
                            let line = line.trim_start();
                            line.starts_with("expr:") || line.starts_with('(')
                        })
                        .map(str::to_owned),
                );
            }
            _ => {}
        }
    }
    assert!(all.len() > 50, "{all:?}");
    let told = [&scheduler_told, &worker_told, &runner_told]
        .map(String::as_str)
        .concat();
    let labels = ["bb_scheduler", "bb_worker", "bb_runner"];
    let needs_an_eviction = ["bb_storage_retention_seconds"];
    let wanted: BTreeSet<String> = all.iter().flat_map(|text| names_in(text)).collect();
    for name in wanted {
        let is_told = told.contains(&format!("\n{name}{{")) || told.contains(&format!("\n{name} "));
        assert!(
            is_told || labels.contains(&&*name) || needs_an_eviction.contains(&&*name),
            "{name} is told by nobody"
        );
    }

    for (daemon, words, keys) in [
        (
            "worker",
            "status",
            &["serving", "slots", "scheduler", "line"][..],
        ),
        (
            "worker",
            "cache",
            &["files", "hits", "kept_roots", "free_bytes"][..],
        ),
        (
            "runner",
            "status",
            &["layers", "started", "running", "users"][..],
        ),
    ] {
        let told = ask(&farm, daemon, &[words]);
        let page = fs::read_to_string(repository().join(format!("man/bb_{daemon}.8"))).unwrap();
        for key in told.as_object().unwrap().keys() {
            assert!(
                page.contains(&format!(" {key} ")),
                "bb_{daemon}.8 has no {key}"
            );
        }
        for key in keys {
            assert!(!told[*key].is_null(), "{daemon} {words}: {told}");
        }
    }
    for daemon in ["worker", "runner"] {
        assert_eq!(get(&farm, daemon, "/-/ready").0, 200);
        assert_eq!(get(&farm, daemon, "/-/healthy").0, 200);
        assert_eq!(get(&farm, daemon, "/").0, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_serves_when_its_scheduler_answers_and_starts_without_it() {
    if !is_root() {
        return;
    }
    use crate::harness::Daemon;
    let mut farm = Farm::start(Path::new("/var/tmp"), 1, "").await;
    assert_eq!(
        get(&farm, "worker", "/-/ready"),
        (200, "ready\n".to_owned())
    );
    farm.kill(Daemon::Scheduler);
    let silent = async |farm: &Farm, wanted: u16| {
        for _ in 0..300 {
            if get(farm, "worker", "/-/ready").0 == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!(
            "{:?}\n{}\n{}",
            get(farm, "worker", "/-/ready"),
            farm.log("bb_worker"),
            farm.log("bb_scheduler")
        );
    };
    silent(&farm, 503).await;
    let (_, told) = get(&farm, "worker", "/metrics");
    assert_eq!(value(&told, "bb_worker_serving"), 0.0);
    let status = ask(&farm, "worker", &["status"]);
    let why = status["not_serving_because"].as_str().unwrap();
    assert!(why.starts_with("scheduler grpc://"), "{status}");
    // One that starts now says that it is ready, and what it waits for.
    farm.kill(Daemon::Worker);
    farm.spawn(Daemon::Worker);
    for _ in 0..200 {
        if farm.log("bb_worker").contains("not serving yet: ") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(
        farm.log("bb_worker").contains("not serving yet: "),
        "{}",
        farm.log("bb_worker")
    );
    farm.spawn(Daemon::Scheduler);
    silent(&farm, 200).await;
}

#[test]
fn each_alert_fires_when_it_should_and_none_when_all_is_well() {
    let directory = repository().join("packaging/monitoring");
    for words in [
        ["check", "rules", "bb-remote-execution.rules.yml"],
        ["test", "rules", "bb-remote-execution.rules.test.yml"],
    ] {
        let output = Command::new("promtool")
            .args(words)
            .current_dir(&directory)
            .output();
        let Ok(output) = output else {
            skip("promtool is missing, of Debian's package prometheus");
            return;
        };
        assert!(output.status.success(), "{output:?}");
    }
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    let (rules, tests) = (
        read("bb-remote-execution.rules.yml"),
        read("bb-remote-execution.rules.test.yml"),
    );
    for line in rules.lines() {
        if let Some((_, alert)) = line.split_once("- alert: ") {
            let test = format!("alertname=\"{alert}\"");
            assert!(tests.contains(&test), "{alert} has no test");
        }
    }
}

#[test]
fn a_farm_names_every_daemon_and_address_for_scripts() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("run")).unwrap();
    let marker = "made=yes\nport=21210\nslots=0\nusers=50000:128\n";
    fs::write(directory.path().join(".bb-farm"), marker).unwrap();
    let output = Command::new(repository().join("packaging/farm"))
        .args(["status", "--json", "--dir"])
        .arg(directory.path())
        .output()
        .unwrap();
    // None of its daemons runs.
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let addresses = &status["addresses"];
    assert_eq!(addresses["clients"], "127.0.0.1:21210");
    assert_eq!(addresses["workers"], "127.0.0.1:21213");
    assert_eq!(addresses["state"], "127.0.0.1:21214");
    assert_eq!(addresses["web"], "http://127.0.0.1:21212/");
    let daemons = status["daemons"].as_array().unwrap();
    let names: Vec<_> = daemons
        .iter()
        .map(|daemon| daemon["name"].as_str())
        .collect();
    assert_eq!(
        names,
        [Some("bb_scheduler"), Some("bb_runner"), Some("bb_worker")]
    );
    assert!(daemons.iter().all(|daemon| daemon["running"] == false));
}
