//! Headless Chromium, driven by the Chrome DevTools Protocol over a pipe.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use base64::Engine;
use serde_json::{Value, json};

/// A browser with one page.
pub struct Browser {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: String,
    last: u64,
    /// Errors of scripts, and what the browser complains about.
    pub complaints: Vec<String>,
    loaded: bool,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// `None` where there is no Chromium.
    pub fn start() -> Option<Browser> {
        let profile = tempfile::tempdir().unwrap();
        // The browser reads from descriptor 3, and writes to 4.
        let script = "exec chromium --headless=new --remote-debugging-pipe --no-sandbox --disable-gpu \
             --no-first-run --disable-dev-shm-usage --hide-scrollbars --disable-extensions \
             --user-data-dir=\"$0\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let found = Command::new("sh")
            .args(["-c", "command -v chromium"])
            .output()
            .unwrap();
        if !found.status.success() {
            return None;
        }
        let mut process = Command::new("sh")
            .args(["-c", script])
            .arg(profile.path())
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (
            process.stdin.take().unwrap(),
            process.stdout.take().unwrap(),
        );
        let mut browser = Browser {
            process,
            to,
            from: BufReader::new(from),
            session: String::new(),
            last: 0,
            complaints: Vec::new(),
            loaded: false,
            _profile: profile,
        };
        let page = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let number = self.last;
        let mut message = json!({ "id": number, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        self.to.write_all(message.to_string().as_bytes()).unwrap();
        self.to.write_all(&[0]).unwrap();
        self.to.flush().unwrap();
        loop {
            let answer = self.receive();
            if answer["id"] == json!(number) {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    fn receive(&mut self) -> Value {
        let mut data = Vec::new();
        self.from.read_until(0, &mut data).unwrap();
        data.pop();
        let message: Value = serde_json::from_slice(&data).expect("the browser has ended");
        match message["method"].as_str() {
            Some("Page.loadEventFired") => self.loaded = true,
            Some("Runtime.exceptionThrown") => {
                self.complaints
                    .push(message["params"]["exceptionDetails"].to_string());
            }
            Some("Log.entryAdded") => {
                let entry = &message["params"]["entry"];
                // That a page is none is what some tests are about.
                if entry["level"] == "error" && entry["source"] != "network" {
                    self.complaints.push(entry.to_string());
                }
            }
            _ => {}
        }
        message
    }

    /// Loads a page, until all of it is there.
    pub fn open(&mut self, address: &str) {
        self.loaded = false;
        self.call("Page.navigate", json!({ "url": address }));
        while !self.loaded {
            self.receive();
        }
    }

    /// The value of an expression.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let parameters = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true,
        });
        let result = self.call("Runtime.evaluate", parameters);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].clone()
    }

    /// Text of the page as a person sees it, without empty lines.
    pub fn text(&mut self) -> String {
        let text = self.evaluate(r"document.body.innerText.replace(/\n+/g, '\n')");
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, expression: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.evaluate(expression) != json!(true) {
            assert!(Instant::now() < end, "{expression}: {}", self.text());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Clicks what a selector finds first, and waits for the page that follows.
    pub fn submit(&mut self, selector: &str) {
        self.loaded = false;
        self.evaluate(&format!("document.querySelector({selector:?}).click()"));
        while !self.loaded {
            self.receive();
        }
    }

    pub fn set_colours(&mut self, scheme: &str) {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": [feature] }),
        );
    }

    pub fn set_size(&mut self, width: u32, height: u32) {
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// Leaves a picture of the page.
    pub fn picture(&mut self, path: &Path) {
        let taken = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let data = taken["data"].as_str().unwrap();
        let data = base64::engine::general_purpose::STANDARD
            .decode(data)
            .unwrap();
        std::fs::write(path, data).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
