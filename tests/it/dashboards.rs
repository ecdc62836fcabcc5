//! The dashboards, asked of a real Prometheus over a farm under load: each of their queries has data, and a
//! picture of each dashboard stays in target/tmp/pages.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{Read, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use futures::future::join_all;
use serde_json::Value;
use tokio::net::{TcpListener, UnixStream};

use crate::{
    harness::{Client, Farm, Task, browser::Browser, digest_of, free_address, is_root, skip},
    web,
};

/// How long the farm is under load.
const LOAD: Duration = Duration::from_secs(25);

/// A Prometheus that scrapes a farm every second; it is killed when it is dropped.
struct Prometheus {
    process: Child,
    address: SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/monitoring")
}

impl Prometheus {
    /// `None` where there is none. `targets` are the addresses of the jobs.
    async fn start(directory: &Path, targets: &[(&str, SocketAddr)]) -> Option<Self> {
        let found = Command::new("prometheus").arg("--version").output();
        if found.is_err() {
            skip("prometheus is missing; apt-get install prometheus");
            return None;
        }
        let mut scrapes = fs::read_to_string(monitoring().join("scrape_configs.yml")).unwrap();
        for (job, address) in targets {
            let (before, after) = scrapes.split_once(&format!("job_name: {job}\n")).unwrap();
            let (old, rest) = after.split_once("localhost:").unwrap();
            let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
            scrapes = format!("{before}job_name: {job}\n{old}{address}{rest}");
        }
        let rules = monitoring().join("bb-remote-execution.rules.yml");
        let configuration = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 2s }}\n\
             rule_files: [\"{}\"]\nscrape_configs:\n{scrapes}",
            rules.display()
        );
        let file = directory.join("prometheus.yml");
        fs::write(&file, configuration).unwrap();
        let address = free_address();
        let log = fs::File::create(directory.join("prometheus.log")).unwrap();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut prometheus = Prometheus { process, address };
        let begun = Instant::now();
        while prometheus.try_get("/-/ready").is_none() {
            let log = || fs::read_to_string(directory.join("prometheus.log")).unwrap();
            assert!(
                prometheus.process.try_wait().unwrap().is_none(),
                "{}",
                log()
            );
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some(prometheus)
    }

    /// The body of a good answer. As of HTTP/1.0, it comes in one piece.
    fn try_get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.split(' ').nth(1).filter(|code| *code == "200")?;
        Some(body.to_owned())
    }

    /// What an expression was from `start` on, until now.
    fn range(&self, expression: &str, start: SystemTime) -> Result<Vec<Series>, String> {
        let seconds = |time: SystemTime| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            since.as_secs()
        };
        let encoded: String = expression
            .bytes()
            .map(|byte| format!("%{byte:02x}"))
            .collect();
        let (start, end) = (seconds(start), seconds(SystemTime::now()));
        let path = format!("/api/v1/query_range?query={encoded}&start={start}&end={end}&step=1");
        let body = self.try_get(&path).ok_or("it is refused")?;
        let answer: Value = serde_json::from_str(&body).unwrap();
        let found = answer["data"]["result"].as_array().unwrap().iter();
        let series: Vec<Series> = found
            .map(Series::of)
            .filter(|series| !series.points.is_empty())
            .collect();
        match series.is_empty() {
            true => Err("there is no data".to_owned()),
            false => Ok(series),
        }
    }
}

/// One line of a chart.
struct Series {
    labels: BTreeMap<String, String>,
    /// Seconds since the epoch, and what it was then.
    points: Vec<(f64, f64)>,
}

impl Series {
    fn of(found: &Value) -> Self {
        let labels = found["metric"].as_object().unwrap().iter();
        let points = found["values"].as_array().unwrap().iter().map(|pair| {
            let value: f64 = pair[1].as_str().unwrap().parse().unwrap();
            (pair[0].as_f64().unwrap(), value)
        });
        Series {
            labels: labels
                .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
                .collect(),
            // Of nothing, no quantile is a number.
            points: points.filter(|(_, value)| value.is_finite()).collect(),
        }
    }

    /// As Grafana writes it.
    fn legend(&self, format: &str) -> String {
        let mut text = format.to_owned();
        for (name, value) in &self.labels {
            text = text.replace(&format!("{{{{{name}}}}}"), value);
        }
        text
    }
}

/// Makes a Unix socket reachable at a port.
async fn forward(socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut to = UnixStream::connect(socket).await?;
                tokio::io::copy_bidirectional(&mut from, &mut to).await
            });
        }
    });
    address
}

/// What builds do: many actions at a time, some of which fail, more blobs than the store has room for, and some
/// that are not there.
async fn load(client: &Client, begun: Instant) {
    let shared = client.upload(vec![b'i'; 300_000]).await;
    let mut random = fastrand::Rng::with_seed(1);
    let mut round = 0;
    while begun.elapsed() < LOAD {
        let actions = (0..6).map(|number| {
            let script = match number {
                0 => format!("echo {round}; exit 3"),
                _ => format!("cat in{number} | head -c 1000 > out; echo {round}; sleep 0.2"),
            };
            let mut task = Task::shell(&script).outputs(&["out"]);
            task.action.do_not_cache = number % 2 == 0;
            let node = |name: String| bb_remote_execution::proto::reapi::FileNode {
                name,
                digest: Some(shared.clone()),
                ..Default::default()
            };
            // Some of them are where none was before.
            let moved = format!("moved-{round}-{number}");
            let names = (1..6).map(|number| format!("in{number}"));
            task.input_root.files = names.chain([moved]).map(node).collect();
            task
        });
        let actions: Vec<Task> = actions.collect();
        join_all(actions.iter().map(|task| client.run(task))).await;
        for _ in 0..4 {
            let mut blob = vec![0; 1_000_000];
            random.fill(&mut blob);
            client.upload(blob).await;
        }
        let missing = bb_remote_execution::proto::reapi::GetActionResultRequest {
            action_digest: Some(digest_of(&[round])),
            ..Default::default()
        };
        client
            .action_cache()
            .get_action_result(missing)
            .await
            .unwrap_err();
        round = round.wrapping_add(1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_query_of_the_dashboards_has_data_of_a_farm_under_load() {
    if !is_root() {
        return;
    }
    let farm = Farm::start(
        Path::new("/var/tmp"),
        2,
        "storage.embedded.maximum_size = \"32MiB\"",
    )
    .await;
    let pages = farm.pages().rsplit(':').next().unwrap().parse().unwrap();
    let socket = |daemon: &str| farm.path().join(format!("run-{daemon}/metrics.sock"));
    let targets = [
        ("bb_scheduler", SocketAddr::from(([127, 0, 0, 1], pages))),
        ("bb_worker", forward(socket("worker")).await),
        ("bb_runner", forward(socket("runner")).await),
    ];
    let directory = tempfile::tempdir().unwrap();
    let Some(prometheus) = Prometheus::start(directory.path(), &targets).await else {
        return;
    };
    let start = SystemTime::now();
    load(&farm.client(), Instant::now()).await;

    let mut without = Vec::new();
    for name in ["bb-scheduler", "bb-workers"] {
        let text = fs::read_to_string(monitoring().join(format!("{name}.json"))).unwrap();
        let dashboard: Value = serde_json::from_str(&text).unwrap();
        let mut charts = Vec::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let mut lines = Vec::new();
            for target in panel["targets"].as_array().unwrap() {
                let expression = target["expr"].as_str().unwrap();
                let legend = target["legendFormat"].as_str().unwrap();
                match prometheus.range(expression, start) {
                    Ok(found) => lines.extend(
                        found
                            .into_iter()
                            .map(|line| (line.legend(legend), line.points)),
                    ),
                    Err(why) => {
                        without.push(format!("{name}: {}: {expression}: {why}", panel["title"]))
                    }
                }
            }
            let unit = panel["fieldConfig"]["defaults"]["unit"]
                .as_str()
                .unwrap_or("short");
            charts.push(chart(panel["title"].as_str().unwrap(), unit, &lines));
        }
        let picture = draw(dashboard["title"].as_str().unwrap(), &charts);
        let path = web::pictures().join(format!("dashboard-{name}.svg"));
        fs::write(&path, &picture).unwrap();
        println!("{}", path.display());
        if let Some(mut browser) = Browser::start() {
            browser.set_size(
                WIDTH as u32 * 2,
                charts.len().div_ceil(2) as u32 * HEIGHT as u32 + 60,
            );
            browser.open(&format!("file://{}", path.display()));
            browser.picture(&path.with_extension("png"));
        }
    }
    assert_eq!(without, Vec::<String>::new());

    // Alerts are computed, and none of them fires on a farm that is well.
    let rules: Value = serde_json::from_str(&prometheus.try_get("/api/v1/rules").unwrap()).unwrap();
    let mut count = 0;
    for group in rules["data"]["groups"].as_array().unwrap() {
        for rule in group["rules"].as_array().unwrap() {
            assert_eq!(rule["health"], "ok", "{rule}");
            assert_ne!(rule["state"], "firing", "{rule}");
            count += 1;
        }
    }
    assert!(count > 5, "{rules}");
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const COLOURS: [&str; 8] = [
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf",
];

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// A number in the unit of a panel.
fn shown(value: f64, unit: &str) -> String {
    let scaled = |base: f64, units: &[&str]| {
        let mut scaled = value;
        let mut at = 0;
        while scaled.abs() >= base && at + 1 < units.len() {
            scaled /= base;
            at += 1;
        }
        format!("{:.3} {}", scaled, units[at])
    };
    match unit {
        "bytes" | "Bps" => scaled(1024.0, &["B", "KiB", "MiB", "GiB", "TiB"]),
        "percentunit" => format!("{:.1} %", value * 100.0),
        "s" if value < 1.0 => format!("{:.1} ms", value * 1000.0),
        "s" => format!("{value:.2} s"),
        _ => scaled(1000.0, &["", "k", "M", "G"]),
    }
}

/// One panel.
fn chart(title: &str, unit: &str, lines: &[(String, Vec<(f64, f64)>)]) -> String {
    const LEFT: f64 = 90.0;
    const TOP: f64 = 34.0;
    let (right, bottom) = (WIDTH - 16.0, HEIGHT - 90.0);
    let points = || lines.iter().flat_map(|(_, points)| points);
    let first = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let last = points()
        .map(|point| point.0)
        .fold(0.0, f64::max)
        .max(first + 1.0);
    let least = points().map(|point| point.1).fold(0.0, f64::min);
    let greatest = points().map(|point| point.1).fold(least + 1e-9, f64::max);
    let mut svg = format!(
        "<rect x='4' y='4' width='{}' height='{}' fill='white' stroke='#ccc'/><text x='14' y='24' font-weight='bold'>{}</text>",
        WIDTH - 8.0,
        HEIGHT - 8.0,
        escaped(title)
    );
    for part in 0..=4 {
        let share = f64::from(part) / 4.0;
        let y = bottom - share * (bottom - TOP);
        let value = shown(least + share * (greatest - least), unit);
        let _ = write!(
            svg,
            "<line x1='{LEFT}' x2='{right}' y1='{y:.1}' y2='{y:.1}' stroke='#eee'/><text x='{}' y='{:.1}' text-anchor='end' font-size='11'>{value}</text>",
            LEFT - 6.0,
            y + 4.0
        );
    }
    for (number, (legend, points)) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let place = |(time, value): &(f64, f64)| {
            let x = LEFT + (time - first) / (last - first) * (right - LEFT);
            let y = bottom - (value - least) / (greatest - least) * (bottom - TOP);
            format!("{x:.1},{y:.1}")
        };
        let path: Vec<String> = points.iter().map(place).collect();
        let _ = write!(
            svg,
            "<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{}'/>",
            path.join(" ")
        );
        // Three columns of four.
        if number < 12 {
            let (x, y) = (
                14.0 + (number % 3) as f64 * 208.0,
                bottom + 24.0 + (number / 3) as f64 * 16.0,
            );
            let legend: String = legend.chars().take(30).collect();
            let _ = write!(
                svg,
                "<rect x='{x}' y='{}' width='10' height='10' fill='{colour}'/><text x='{}' y='{y}' font-size='11'>{}</text>",
                y - 9.0,
                x + 14.0,
                escaped(&legend)
            );
        }
    }
    svg
}

/// All panels of a dashboard, in two columns.
fn draw(title: &str, charts: &[String]) -> String {
    let height = charts.len().div_ceil(2) as f64 * HEIGHT + 50.0;
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{0}' height='{height}' viewBox='0 0 {0} {height}' font-family='sans-serif' font-size='14'><rect width='{0}' height='{height}' fill='#f5f5f5'/><text x='14' y='32' font-size='22'>{1}</text>",
        2.0 * WIDTH,
        escaped(title)
    );
    for (number, chart) in charts.iter().enumerate() {
        let (x, y) = (
            (number % 2) as f64 * WIDTH,
            50.0 + (number / 2) as f64 * HEIGHT,
        );
        let _ = write!(svg, "<g transform='translate({x},{y})'>{chart}</g>");
    }
    svg + "</svg>\n"
}
