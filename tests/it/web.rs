//! The pages of a whole farm, in a real browser.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bb_remote_execution::proto::reapi::{
    Digest, Directory, ExecuteRequest, FileNode, RequestMetadata, ToolDetails,
};
use prost::Message;
use serde_json::json;

use crate::harness::{Client, Farm, Task, browser::Browser, is_ok, is_root, skip};

mod live;
mod walk;

/// Names that a client chose to do harm.
const HOSTILE: &str = "//<img src=x onerror=\"document.title='owned'\">\u{202e}:gpj.\u{1b}[31m";

/// A browser, if this host has one.
fn browser() -> Option<Browser> {
    let browser = Browser::start();
    if browser.is_none() {
        skip("chromium is missing; apt-get install chromium");
    }
    browser
}

/// Where pictures of the pages stay.
pub fn pictures() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages");
    fs::create_dir_all(&path).unwrap();
    path
}

/// What axe-core finds; `None` where it was not fetched (tests/run does).
fn axe(browser: &mut Browser) -> Option<String> {
    let source = fs::read_to_string(std::env::var_os("BB_AXE")?).unwrap();
    browser.evaluate(&format!("{source}; true"));
    let found = browser.evaluate(
        "axe.run(document, { resultTypes: ['violations'] }).then(result => JSON.stringify(
           result.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)])))",
    );
    Some(found.as_str().unwrap().to_owned())
}

/// Labels, headers and landmarks, where there is no axe-core.
const OWN_CHECKS: &str = "[
    ...[...document.querySelectorAll('input:not([type=hidden]), select')].filter(f => !f.closest('label')),
    ...[...document.querySelectorAll('th')].filter(h => !h.scope),
    ...[...document.querySelectorAll('[role=region], nav, svg[role=img]')].filter(r => !r.ariaLabel),
    ...(document.querySelectorAll('main').length === 1 ? [] : [document.body]),
    ...(document.querySelectorAll('h1').length === 1 ? [] : [document.body]),
  ].map(e => e.outerHTML.slice(0, 200)).join('; ')";

/// Looks at a page as several people would.
fn look_at(browser: &mut Browser, name: &str, address: &str) -> String {
    browser.set_size(1280, 800);
    browser.set_colours("light");
    browser.open(address);
    let text = browser.text();
    for scheme in ["light", "dark"] {
        browser.set_colours(scheme);
        browser.picture(&pictures().join(format!("{name}-{scheme}.png")));
        let found = axe(browser).unwrap_or_else(|| "[]".to_owned());
        assert_eq!(found, "[]", "{name}, {scheme}");
    }
    browser.set_size(390, 844);
    browser.set_colours("light");
    browser.picture(&pictures().join(format!("{name}-phone.png")));
    let wider = browser.evaluate("document.documentElement.scrollWidth > innerWidth");
    assert_eq!(wider, json!(false), "{name} is wider than a phone");
    browser.set_size(1280, 800);
    assert_eq!(browser.evaluate(OWN_CHECKS), json!(""), "{name}");
    assert_eq!(browser.complaints, Vec::<String>::new(), "{name}");
    let title = browser.evaluate("document.title");
    assert!(title.as_str().unwrap().ends_with("build farm"), "{title}");
    assert_eq!(
        browser.evaluate("document.images.length"),
        json!(0),
        "{name}"
    );
    text
}

fn metadata(target: &str) -> RequestMetadata {
    RequestMetadata {
        tool_details: Some(ToolDetails {
            tool_name: "bazel".to_owned(),
            tool_version: "9.0".to_owned(),
        }),
        tool_invocation_id: "4f2a0000-0000-4000-8000-000000000001".to_owned(),
        action_mnemonic: "TestRunner".to_owned(),
        target_id: target.to_owned(),
        ..Default::default()
    }
}

/// Executes an action for a target, without waiting for it.
async fn execute(client: &Client, task: &Task, target: &str) -> String {
    let action = client.prepare(task).await.unwrap();
    let mut request = tonic::Request::new(ExecuteRequest {
        action_digest: Some(action),
        skip_cache_lookup: true,
        ..Default::default()
    });
    request.metadata_mut().insert_bin(
        "build.bazel.remote.execution.v2.requestmetadata-bin",
        tonic::metadata::MetadataValue::from_bytes(&metadata(target).encode_to_vec()),
    );
    let mut operations = client
        .execution()
        .execute(request)
        .await
        .unwrap()
        .into_inner();
    let first = operations.message().await.unwrap().unwrap();
    // Somebody goes on waiting.
    tokio::spawn(async move { while let Ok(Some(_)) = operations.message().await {} });
    first.name
}

/// The page of an operation, by the name that its client has.
fn operation_page(pages: &str, name: &str) -> String {
    let uuid = name
        .split(['/', '.'])
        .find(|part| part.len() == 36 && part.matches('-').count() == 4);
    format!(
        "{pages}/operations/{}",
        uuid.unwrap_or_else(|| panic!("{name}"))
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_is_good_in_a_browser() {
    if !is_root() {
        return;
    }
    let Some(mut browser) = browser() else {
        return;
    };
    let farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let pages = farm.pages();
    let client = farm.client();

    let script = client.upload("#!/bin/sh\necho hello\n").await;
    let root = Directory {
        files: vec![FileNode {
            name: "tool <b>.sh".to_owned(),
            digest: Some(script),
            is_executable: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut good = Task::shell("printf '\\033[1;32mPASS\\033[0m <b>bold</b> \\342\\200\\256x\\n'; mkdir d; echo x > d/f; echo y > out")
        .outputs(&["out", "d"]);
    good.input_root = root.clone();
    let response = client.run(&good).await;
    assert!(is_ok(&response), "{response:?}");
    let good_link = response.message.split(' ').next_back().unwrap().to_owned();
    let good_action = client.prepare(&good).await.unwrap();

    let mut bad =
        Task::shell("seq 1 40000; printf '\\033[31mFAILED\\033[0m: it is broken\\n' >&2; exit 3");
    bad.input_root = root;
    let response = client.run(&bad).await;
    // The farm's own pages, without anything in the worker's configuration.
    let link = response.message.split(' ').next_back().unwrap().to_owned();
    assert!(link.starts_with(&pages), "{}", response.message);
    let bad_action = client.prepare(&bad).await.unwrap();

    let running =
        Task::shell("i=0; while [ $i -lt 600 ]; do echo \"line $i\"; i=$((i+1)); sleep 0.1; done");
    let running = execute(&client, &running, "//pkg:running").await;
    let hostile = execute(&client, &Task::shell("sleep 60"), HOSTILE).await;
    for number in 0..5 {
        let task = Task::shell(&format!("echo {number}; sleep 30"));
        execute(&client, &task, &format!("//pkg:queued_{number}")).await;
    }

    let text = {
        browser.open(&pages);
        browser.wait_for("document.body.innerText.includes('all busy')");
        look_at(&mut browser, "overview", &pages)
    };
    assert!(text.contains("Queued\n5"), "{text}");
    assert!(text.contains("Executing\n2"), "{text}");
    let text = look_at(&mut browser, "queues", &format!("{pages}/queues"));
    assert!(text.contains("OSFamily"), "{text}");
    let link_of = "document.querySelector('tbody th a').href";
    let queue = browser.evaluate(link_of).as_str().unwrap().to_owned();
    let text = look_at(&mut browser, "queue", &queue);
    assert!(text.contains("Invocations and their shares"), "{text}");
    let text = look_at(&mut browser, "workers", &format!("{pages}/workers"));
    assert!(text.contains("//pkg:running"), "{text}");
    assert!(text.contains("\\u{202e}:gpj.\\u{1b}[31m"), "{text}");
    let text = look_at(&mut browser, "operations", &format!("{pages}/operations"));
    assert!(
        text.contains("//pkg:queued_4") && text.contains("<img src=x"),
        "{text}"
    );
    browser.open(&format!("{pages}/operations?stage=queued&find=queued_3"));
    let text = browser.text();
    assert!(
        text.contains("queued_3") && !text.contains("queued_4"),
        "{text}"
    );

    let page = operation_page(&pages, &running);
    let text = look_at(&mut browser, "executing", &page);
    assert!(text.contains("executing on"), "{text}");
    browser.open(&page);
    browser.wait_for("/line \\d\\d/.test(document.querySelector('.log')?.innerText ?? '')");
    look_at(&mut browser, "hostile", &operation_page(&pages, &hostile));

    let text = look_at(&mut browser, "failed", &link);
    for part in [
        "exit code 3",
        "FAILED: it is broken",
        "left out",
        "Peak memory",
        "seq 1 40000",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let colour = "document.querySelector('.log .f1').innerText";
    assert_eq!(browser.evaluate(colour), json!("FAILED"));
    let address = |action: &Digest| {
        let (hash, size) = (&action.hash, action.size_bytes);
        format!("{pages}/blobs/sha256/action/{hash}-{size}/")
    };
    let text = look_at(&mut browser, "action", &good_link);
    for part in [
        "PASS <b>bold</b> \\u{202e}x",
        "Timeline",
        "tool <b>.sh",
        "d/",
        "OSFamily",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let with = format!("{}?with={}", address(&good_action), address(&bad_action));
    let text = look_at(&mut browser, "comparison", &with);
    assert!(
        text.contains("argument 3") && text.contains("Their input roots are the same"),
        "{text}"
    );
    let directory = "document.querySelector('a[href*=\"/tree/\"], a[href*=\"/directory/\"]').href";
    browser.open(&good_link);
    let directory = browser.evaluate(directory).as_str().unwrap().to_owned();
    look_at(&mut browser, "directory", &directory);
    let gone = format!("{pages}/blobs/sha256/action/{}-7/", "0".repeat(64));
    let text = look_at(&mut browser, "evicted", &gone);
    assert!(text.contains("Build again"), "{text}");
    let text = look_at(&mut browser, "no-page", &format!("{pages}/x<b>"));
    assert!(text.contains("no page"), "{text}");

    // To run it by hand: what the page offers.
    let archive = farm.path().join("a.tar");
    let fetched = std::process::Command::new("curl")
        .args(["-sf", "-o"])
        .arg(&archive)
        .arg(format!("{}?format=tar", address(&bad_action)))
        .status();
    if fetched.is_ok_and(|status| status.success()) {
        let ran = std::process::Command::new("sh")
            .args([
                "-c",
                "tar xf a.tar && action-*/run.sh | tail -n 1; ls action-*/root",
            ])
            .current_dir(farm.path())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(
            told.contains("40000") && told.contains("tool <b>.sh"),
            "{told}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_drained_by_a_click_and_an_action_killed() {
    if !is_root() {
        return;
    }
    let Some(mut browser) = browser() else {
        return;
    };
    let farm = Farm::start(Path::new("/var/tmp"), 1, "").await;
    let pages = farm.pages();
    let client = farm.client();
    let running = execute(&client, &Task::shell("sleep 300"), "//pkg:long").await;
    browser.open(&format!("{pages}/workers"));
    browser.wait_for("document.body.innerText.includes('//pkg:long')");
    browser.evaluate("document.querySelector('details.confirm summary').click()");
    browser.picture(&pictures().join("drain-light.png"));
    browser.submit("details.confirm[open] button");
    assert!(browser.text().contains("Undrain"), "{}", browser.text());
    browser.open(&format!("{pages}/workers"));
    assert!(browser.text().contains("drained"), "{}", browser.text());

    browser.open(&operation_page(&pages, &running));
    browser.evaluate("document.querySelector('#kill summary').click()");
    browser.evaluate("document.querySelector('#kill input[name=reason]').value = 'a <test>'");
    browser.submit("#kill button");
    browser.wait_for("document.body.innerText.includes('a <test>')");

    let waiting = execute(&client, &Task::shell("true"), "//pkg:waits").await;
    browser.open(&operation_page(&pages, &waiting));
    assert!(browser.text().contains("1 drained"), "{}", browser.text());
    browser.picture(&pictures().join("why-light.png"));
    browser.open(&format!("{pages}/queues"));
    browser.evaluate("document.querySelector('tbody th a').click()");
    browser.wait_for("document.querySelector('#drains + * details.confirm summary') !== null");
    browser.evaluate("document.querySelector('#drains + * details.confirm summary').click()");
    browser.submit("details.confirm[open] button");
    browser.open(&operation_page(&pages, &waiting));
    browser.wait_for("document.body.innerText.includes('exit code 0')");
    assert_eq!(browser.complaints, Vec::<String>::new());
}
