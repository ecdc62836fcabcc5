//! The installed runner, on a host whose control groups have all controllers: what it limits, and
//! whether its figures are right. tests/package/vm boots such a host, configures the runner as
//! the constants say, and runs these tests there.

use super::*;

/// Of bb_runner.toml.
const MEMORY: f64 = 96.0 * MIB;
const PROCESSORS: f64 = 0.5;
const PROCESSES: usize = 64;
const MIB: f64 = 1_048_576.0;

/// An action of the runner that systemd has started.
async fn sh(script: &str) -> Ended {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let build = Path::new("/var/lib/bb-worker/build");
    let number = 1_000_000 + NEXT.fetch_add(1, Ordering::Relaxed);
    let owner = build.metadata().unwrap().uid();
    let slot = Slot::make(build, number, owner);
    let socket = PathBuf::from("/run/bb-runner/runner.sock");
    let mut client = RunnerClient::new(daemon::connect(&Endpoint::Unix(socket)));
    let request = slot.request(&["/bin/sh", "-c", script]);
    let response = client.run(request).await.unwrap().into_inner();
    let ended = Ended::new(&response, &slot);
    println!("{script}\n  {ended:?}");
    ended
}

#[track_caller]
fn is_near(figure: f64, expected: f64) {
    let error = figure / expected - 1.0;
    println!("  {figure} is {:+.1} % from {expected}", error * 100.0);
    assert!(error.abs() <= 0.05, "{figure} instead of {expected}");
}

fn seconds(time: &Option<prost_types::Duration>) -> f64 {
    time.as_ref().map_or(0.0, |time| {
        time.seconds as f64 + f64::from(time.nanos) / 1e9
    })
}

#[tokio::test]
#[ignore = "takes a host with control groups that have controllers: tests/package/run --vm"]
async fn installed_want_of_memory_is_told_apart_from_other_ends() {
    // The shell would say something else, if it lived.
    let ended = sh("dd if=/dev/zero of=/dev/null bs=300M count=1; exit 0").await;
    assert_eq!((ended.code, &*ended.usage.termination_signal), (-1, "KILL"));
    assert!(
        ended
            .stderr
            .contains("ran out of memory: its limit is 96MiB"),
        "{ended:?}"
    );
    assert_eq!(ended.group["out_of_memory"], 1.0);
    assert_eq!(ended.group["memory_limit_bytes"], MEMORY);
    is_near(ended.group["memory_peak_bytes"], MEMORY);
    assert!(ended.server_log.contains("limits.memory"), "{ended:?}");

    let ended = sh("kill -KILL $$").await;
    assert_eq!((ended.code, &*ended.usage.termination_signal), (-1, "KILL"));
    assert_eq!((ended.group["out_of_memory"], &*ended.stderr), (0.0, ""));
    assert_eq!(ended.server_log, "");

    let ended = sh("exit 137").await;
    assert_eq!((ended.code, &*ended.usage.termination_signal), (137, ""));
    assert_eq!((ended.group["out_of_memory"], &*ended.stderr), (0.0, ""));
}

#[tokio::test]
#[ignore = "as above"]
async fn installed_peaks_of_memory_are_right() {
    let ended = sh("exec dd if=/dev/zero of=/dev/null bs=64M count=1 status=none").await;
    assert_eq!(ended.code, 0);
    is_near(ended.usage.maximum_resident_set_size as f64, 64.0 * MIB);
    is_near(ended.group["memory_peak_bytes"], 64.0 * MIB);

    // Less than the runner itself has.
    let ended = sh("exec true").await;
    let figures = (
        ended.usage.maximum_resident_set_size as f64,
        ended.group["memory_peak_bytes"],
    );
    assert!(figures.0 <= figures.1, "{figures:?}");
}

#[tokio::test]
#[ignore = "as above"]
async fn installed_processes_are_limited() {
    let script = format!(
        "exec perl -e 'for (1..{}) {{ $p = fork; if (!defined $p) {{ print $_; exit 3 }} \
         if (!$p) {{ sleep 1000 }} }}'",
        PROCESSES * 2
    );
    let ended = sh(&script).await;
    assert_eq!(ended.code, 3);
    // The first process of the namespace and perl itself are two of them.
    assert_eq!(ended.stdout, (PROCESSES - 1).to_string());
    assert_eq!(ended.group["process_limit_reached"], 1.0);
    assert!(ended.stderr.contains("its limit is 64"), "{ended:?}");
    assert!(ended.server_log.contains("limits.processes"), "{ended:?}");
}

#[tokio::test]
#[ignore = "as above"]
async fn installed_time_of_processors_is_limited_and_right() {
    // Two processes want all that they can get; perl's start is not measured.
    let script = "exec perl -MTime::HiRes=time -e '$begin = time; $used -= $_ for times; \
                  $child = fork; 1 while time < $begin + 8; exit if !$child; wait; \
                  $used += $_ for times; print $used / (time - $begin)'";
    let ended = sh(script).await;
    assert_eq!(ended.code, 0);
    is_near(ended.stdout.parse().unwrap(), PROCESSORS);
    assert!(ended.group["cpu_throttled_seconds"] > 0.0);

    // Ends when it has used so much, by its own account.
    let ended = sh("exec perl -e '1 while (times)[0] < 2'").await;
    assert_eq!(ended.code, 0);
    is_near(seconds(&ended.usage.user_time), 2.0);
    is_near(
        ended.group["cpu_user_seconds"] + ended.group["cpu_system_seconds"],
        seconds(&ended.usage.user_time) + seconds(&ended.usage.system_time),
    );
}

#[tokio::test]
#[ignore = "as above"]
async fn installed_writes_are_counted() {
    let ended = sh("exec dd if=/dev/zero of=file bs=1M count=32 conv=fsync status=none").await;
    assert_eq!(ended.code, 0);
    is_near(ended.group["io_written_bytes"], 32.0 * MIB);
}
