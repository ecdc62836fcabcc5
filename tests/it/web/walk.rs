//! From a failed `bazel test` to its command run by hand, by what Bazel printed alone.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{browser, look_at};
use crate::harness::{Farm, is_root, skip};

const MESSAGE: &str = "expected 42 in answer.txt, found 41";

/// A workspace with a test that fails on the farm.
fn workspace(at: &Path) {
    let write = |name: &str, text: &str| fs::write(at.join(name), text).unwrap();
    write("WORKSPACE", "workspace(name = \"walk\")\n");
    write(
        "BUILD.bazel",
        "genrule(name = \"answer\", outs = [\"answer.txt\"], cmd = \"echo 41 > $@\")\n\
         sh_test(name = \"answer_test\", size = \"small\", srcs = [\"answer_test.sh\"], data = [\"answer.txt\"])\n",
    );
    write(
        "answer_test.sh",
        "#!/bin/bash\nfound=$(cat answer.txt)\n\
         [ \"$found\" = 42 ] || { echo \"expected 42 in answer.txt, found $found\" >&2; exit 3; }\n",
    );
    use std::os::unix::fs::PermissionsExt;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(at.join("answer_test.sh"), executable).unwrap();
}

/// What Bazel says of its tests on the farm.
fn bazel_test(farm: &Farm, at: &Path) -> Option<String> {
    let found = Command::new("sh").args(["-c", "command -v bazel"]).output();
    if !found.unwrap().status.success() {
        skip(
            "bazel is missing; apt-get install bazel-bootstrap bazel-rules-java bazel-rules-proto",
        );
        return None;
    }
    let repositories = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/demo/repositories");
    let repositories = repositories.display();
    let root = format!("--output_user_root={}", farm.path().join("bazel").display());
    let bazel = |words: &[String]| {
        let bazel = Command::new("bazel")
            .args([&root, "--max_idle_secs=30"])
            .args(words)
            .current_dir(at)
            .env("HOME", farm.path())
            .output();
        let output = bazel.unwrap();
        let [said, complained] =
            [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        format!("{said}{complained}")
    };
    let words = [
        "test".to_owned(),
        format!("--remote_executor=grpc://127.0.0.1:{}", farm.port()),
        "--remote_default_exec_properties=OSFamily=linux".to_owned(),
        "--spawn_strategy=remote".to_owned(),
        "--genrule_strategy=remote".to_owned(),
        "--remote_local_fallback=false".to_owned(),
        "--color=no".to_owned(),
        "--curses=no".to_owned(),
        "--test_output=errors".to_owned(),
        "--nosandbox_debug".to_owned(),
        format!("--override_repository=remote_coverage_tools={repositories}/remote_coverage_tools"),
        format!("--override_repository=rules_cc={repositories}/rules_cc"),
        "--override_repository=rules_java=/usr/share/bazel/rules/java".to_owned(),
        "--override_repository=rules_proto=/usr/share/bazel/rules/proto".to_owned(),
        "//:answer_test".to_owned(),
    ];
    let said = bazel(&words);
    bazel(&["shutdown".to_owned()]);
    Some(said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_test_is_run_by_hand_by_what_bazel_printed() {
    if !is_root() {
        return;
    }
    let Some(mut browser) = browser() else {
        return;
    };
    let farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let place = tempfile::Builder::new()
        .prefix("bb-walk.")
        .tempdir_in("/var/tmp")
        .unwrap();
    workspace(place.path());
    let mut steps: Vec<(&str, Duration)> = Vec::new();
    let begun = Instant::now();
    let Some(said) = bazel_test(&farm, place.path()) else {
        return;
    };
    assert!(said.contains(MESSAGE), "{said}");
    steps.push(("bazel test, which fails", begun.elapsed()));

    let begun = Instant::now();
    let pages = farm.pages();
    let link = said
        .split_whitespace()
        .find(|word| word.starts_with(&pages));
    let link = link.unwrap_or_else(|| panic!("Bazel printed no link to {pages}: {said}"));
    let text = look_at(&mut browser, "failed-test", link);
    assert!(
        text.contains(MESSAGE) && text.contains("exit code 3"),
        "{text}"
    );
    assert!(text.contains("answer_test"), "{text}");
    steps.push(("the page that it printed", begun.elapsed()));

    let begun = Instant::now();
    let offered = browser.evaluate(
        "[...document.querySelectorAll('a')].find(a => a.innerText.includes('run it by hand'))?.href ?? ''",
    );
    assert_ne!(offered, json!(""), "{text}");
    // As the page says: "tar xf …, and run.sh in it".
    let script = "curl -sf -o a.tar \"$0\" && tar xf a.tar && cd action-* && ./run.sh";
    let ran = Command::new("bash")
        .args(["-c", script, offered.as_str().unwrap()])
        .current_dir(place.path())
        .output()
        .unwrap();
    let [told, complained] = [&ran.stdout, &ran.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(
        told.contains(MESSAGE) || complained.contains(MESSAGE),
        "{ran:?}"
    );
    assert_eq!(ran.status.code(), Some(3), "{ran:?}");
    steps.push(("its archive, unpacked, and run.sh", begun.elapsed()));
    for (what, took) in steps {
        println!("{what}: {took:.1?}");
    }
}
