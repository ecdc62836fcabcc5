//! Actions that try to get out, to get at others, or to stay: a table of attempts, each with the
//! layer that stops it.
//!
//! Each attempt is Python that ends normally when it has succeeded, and with an OSError, a failed
//! assertion or a ValueError when it was stopped; any other exception is a mistake in the table.
//! Beside the attempts runs a victim, with whatever it could be robbed of. `{words}` are replaced.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::{PermissionsExt, chown},
            net::{SocketAddr, UnixListener},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bb_remote_execution::proto::reapi::{self, Directory, FileNode};

use crate::harness::{Client, Daemon, Farm, Task, WORKER_USER, is_ok, is_root};

mod abis;
mod attempts;
use abis::{AS_ROOT_OF_A_NAMESPACE, OF_USER_NAMESPACES, WAYS};
use attempts::{ATTEMPTS, Attempt, LIBRARY, VICTIM};

/// The farm of one run, and what is around it.
struct AttackedFarm {
    farm: Farm,
    mark: String,
    /// Below which the farm and its surroundings lie; removed at last.
    _parent: tempfile::TempDir,
    _listener: TcpListener,
    _abstract: UnixListener,
    words: BTreeMap<&'static str, String>,
    victim: tokio::task::JoinHandle<()>,
}

/// Everywhere that all users may write.
const SHARED: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
const SECRET: &str = "the-host's-secret";

impl AttackedFarm {
    /// With these keys of bb_runner.toml's `containment`.
    async fn start(containment: &str) -> Self {
        let parent = tempfile::Builder::new()
            .prefix("bb-escape.")
            .tempdir_in("/srv")
            .unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mark = parent
            .path()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let open = parent.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        for place in SHARED {
            let path = Path::new(place).join(&mark);
            fs::write(&path, SECRET).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = SocketAddr::from_abstract_name(format!("{mark}-host")).unwrap();
        let abstract_socket = UnixListener::bind_addr(&address).unwrap();

        let mut farm = Farm::start_with(parent.path(), 3, "", |root| {
            let root = root.display();
            format!("[containment]\nhidden_paths = [\"{root}\"]\n{containment}")
        })
        .await;
        let secret = farm.path().join("worker/secret");
        fs::write(&secret, SECRET).unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&secret, Some(WORKER_USER), Some(WORKER_USER)).unwrap();

        let mut words = BTreeMap::from([
            ("mark", mark.clone()),
            ("root", farm.path().display().to_string()),
            ("build", farm.build_directory().display().to_string()),
            ("open", open.display().to_string()),
            ("secret", secret.display().to_string()),
            ("port", listener.local_addr().unwrap().port().to_string()),
            ("clients", farm.port().to_string()),
            ("worker", farm.pid(Daemon::Worker).to_string()),
            ("runner", farm.pid(Daemon::Runner).to_string()),
        ]);
        let client = farm.client();
        let task = with_library(&client, VICTIM, &words).await;
        let victim = tokio::spawn(async move {
            let response = client.run(&task).await;
            assert!(is_ok(&response), "the victim suffered: {response:?}");
        });
        let directory = until("the victim runs", || {
            let entries = fs::read_dir(farm.build_directory()).ok()?;
            entries
                .flatten()
                .map(|entry| entry.path())
                .find(|directory| directory.join("root/ready").exists())
        })
        .await;
        let pid = until("the victim is seen", || {
            let found = processes_with(&farm, &mark);
            found.first().copied()
        })
        .await;
        words.insert(
            "slot",
            directory
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned(),
        );
        words.insert("victim", directory.display().to_string());
        words.insert("pid", pid.to_string());
        AttackedFarm {
            farm,
            mark,
            _parent: parent,
            _listener: listener,
            _abstract: abstract_socket,
            words,
            victim,
        }
    }

    /// Whether it got out, and what it said.
    async fn attempt(&self, client: &Client, attempt: &Attempt) -> (bool, String) {
        let task = with_library(client, attempt.code, &self.words).await;
        let response = client.run(&task).await;
        let said = client.standard_output(&response).await;
        let result = response.result.clone().unwrap();
        let mut escaped = said.contains("ESCAPED");
        // What was taken for an output.
        for file in &result.output_files {
            let data = client.read(file.digest.as_ref().unwrap()).await;
            escaped |= data
                .windows(SECRET.len())
                .any(|window| window == SECRET.as_bytes());
            escaped |= data.starts_with(b"root:");
        }
        let errors = match &result.stderr_digest {
            Some(digest) if digest.size_bytes > 0 && result.stderr_raw.is_empty() => {
                String::from_utf8_lossy(&client.read(digest).await).into_owned()
            }
            _ => String::from_utf8_lossy(&result.stderr_raw).into_owned(),
        };
        assert!(!said.contains("BROKEN"), "{}: {said}{errors}", attempt.name);
        (escaped, format!("{said}{errors}"))
    }

    /// Ends the victim, and looks for what is left.
    async fn finish(mut self) -> Vec<String> {
        let mut left = Vec::new();
        for daemon in [Daemon::Scheduler, Daemon::Worker, Daemon::Runner] {
            if !self.farm.is_alive(daemon) {
                left.push(format!("{daemon:?} is gone"));
            }
        }
        let directory = PathBuf::from(&self.words["victim"]);
        fs::write(directory.join("root/stop"), "").unwrap();
        if self.victim.await.is_err() {
            left.push("the victim was harmed".to_owned());
        }
        for pid in processes_with(&self.farm, "") {
            left.push(format!("process {pid}"));
        }
        for place in SHARED {
            for entry in fs::read_dir(place).unwrap().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("left-") && name.contains(&self.mark) {
                    left.push(entry.path().display().to_string());
                }
            }
            let _ = fs::remove_file(Path::new(place).join(&self.mark));
        }
        for entry in fs::read_dir(&self.words["open"]).unwrap().flatten() {
            left.push(entry.path().display().to_string());
        }
        for kind in ["shm", "sem", "msg"] {
            let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
            for user in self.farm.users() {
                if table.contains(&format!(" {user} ")) {
                    left.push(format!("{kind} of user {user}"));
                }
            }
        }
        // Whatever the actions left in their directories goes soon.
        let build = self.farm.build_directory();
        let users = self.farm.users();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            use std::os::unix::fs::MetadataExt;
            // No deeper: there may be 10,000 levels.
            let found = walkdir::WalkDir::new(&build)
                .max_depth(3)
                .into_iter()
                .flatten()
                .find(|entry| entry.metadata().is_ok_and(|it| users.contains(&it.uid())));
            match found {
                None => break,
                Some(entry) if Instant::now() > deadline => {
                    left.push(entry.path().display().to_string());
                    break;
                }
                Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        left
    }
}

async fn with_library(client: &Client, code: &str, words: &BTreeMap<&'static str, String>) -> Task {
    let mut code = code.to_owned();
    for (word, value) in words {
        code = code.replace(&format!("{{{word}}}"), value);
    }
    let mut task =
        Task::new(&["/usr/bin/python3", "-B", "lib.py", &code]).outputs(&["out", "dir/secret"]);
    task.input_root = Directory {
        files: vec![
            file("abi.py", client.upload(abis::LIBRARY).await),
            file("lib.py", client.upload(LIBRARY).await),
        ],
        ..Default::default()
    };
    task.command.environment_variables[0].value = "/usr/bin:/bin:/usr/sbin".to_owned();
    task
}

fn file(name: &str, digest: reapi::Digest) -> FileNode {
    FileNode {
        name: name.to_owned(),
        digest: Some(digest),
        ..Default::default()
    }
}

/// Processes of the actions' users whose command lines have this text.
fn processes_with(farm: &Farm, text: &str) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if entry
            .metadata()
            .is_ok_and(|it| farm.users().contains(&it.uid()))
            && String::from_utf8_lossy(&line).contains(text)
        {
            found.push(pid);
        }
    }
    found
}

async fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match look() {
            Some(found) => return found,
            None => assert!(Instant::now() < deadline, "not so after 20 s: {what}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Makes attempts, two at a time; the names of those that succeeded, and what is left.
async fn all(
    containment: &str,
    attempts: &[&'static Attempt],
) -> (BTreeSet<&'static str>, Vec<String>) {
    let attacked = AttackedFarm::start(containment).await;
    let next = std::sync::atomic::AtomicUsize::new(0);
    let drive = async || {
        let client = attacked.farm.client();
        let mut escapes = BTreeSet::new();
        loop {
            let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(attempt) = attempts.get(index) else {
                return escapes;
            };
            let (escaped, said) = attacked.attempt(&client, attempt).await;
            if escaped {
                if containment.is_empty() {
                    eprintln!("{} ({}): {said}", attempt.name, attempt.layer);
                }
                escapes.insert(attempt.name);
            }
        }
    };
    let (mut escapes, others) = tokio::join!(drive(), drive());
    escapes.extend(others);
    // It serves all the same.
    let client = attacked.farm.client();
    assert!(is_ok(&client.run(&Task::shell("exit 0")).await));
    (escapes, attacked.finish().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_action_escapes_and_nothing_of_it_stays() {
    if !is_root() {
        return;
    }
    let began = Instant::now();
    let attempts: Vec<_> = ATTEMPTS.iter().chain(WAYS).collect();
    let (escapes, left) = all("", &attempts).await;
    println!(
        "{} attempts in {:?}, {} escapes, {} left",
        attempts.len(),
        began.elapsed(),
        escapes.len(),
        left.len()
    );
    assert!(ATTEMPTS.len() >= 80);
    assert!(escapes.is_empty(), "{escapes:#?}");
    assert!(left.is_empty(), "{left:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_action_escapes_by_a_user_namespace_where_these_are_allowed() {
    if !is_root() {
        return;
    }
    let attempts: Vec<_> = ATTEMPTS
        .iter()
        .chain(WAYS)
        .chain(AS_ROOT_OF_A_NAMESPACE)
        .collect();
    let (escapes, left) = all("allow_user_namespaces = true", &attempts).await;
    let expected: BTreeSet<_> = OF_USER_NAMESPACES.into();
    let unexpected: Vec<_> = escapes.difference(&expected).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    // They were made, so that the rest means something.
    assert!(escapes.contains("be root in a namespace of one's own"));
    assert!(left.is_empty(), "{left:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_off_is_missed() {
    if !is_root() {
        return;
    }
    // Those that need no other layer, in one farm.
    let off = "ipc = \"off\"\nhostname = \"off\"\nnetwork = \"host\"\nseccomp = \"off\"";
    let layers = ["ipc", "hostname", "network", "seccomp"];
    let attempts: Vec<_> = ATTEMPTS
        .iter()
        .chain(WAYS)
        .filter(|attempt| layers.contains(&attempt.layer))
        .collect();
    let (escapes, _) = all(off, &attempts).await;
    for layer in layers {
        let missed = attempts
            .iter()
            .any(|attempt| attempt.layer == layer && escapes.contains(attempt.name));
        assert!(missed, "{layer} stops nothing");
    }
    for way in [
        "make a refused call as a 32-bit program",
        "open a socket of another family by socketcall",
    ] {
        assert!(escapes.contains(way), "{way}: {escapes:?}");
    }
}

/// `cargo test --test it -- --ignored --nocapture each_layer` prints what becomes possible.
#[ignore = "takes long, every attempt once for each layer: tests/run --all"]
#[tokio::test(flavor = "multi_thread")]
async fn each_layer_stops_what_nothing_else_does() {
    if !is_root() {
        return;
    }
    for (setting, layer) in [
        ("mounts = \"off\"", "mounts"),
        ("processes = \"off\"", "processes"),
        ("ipc = \"off\"", "ipc"),
        ("hostname = \"off\"", "hostname"),
        ("network = \"host\"", "network"),
        ("devices = \"off\"", "devices"),
        ("hidden = \"off\"", "hidden"),
        ("seccomp = \"off\"", "seccomp"),
        ("cgroups = \"off\"", "cgroups"),
    ] {
        let (escapes, left) = all(setting, &ATTEMPTS.iter().collect::<Vec<_>>()).await;
        println!("with {setting}: {escapes:?}; left: {left:?}");
        // The rest of what a layer stops is stopped by another one, too.
        let its = |name: &&str| {
            ATTEMPTS
                .iter()
                .any(|attempt| attempt.name == *name && attempt.layer == layer)
        };
        // The users of actions tell their processes as well.
        assert!(
            layer == "cgroups" || escapes.iter().any(its),
            "{layer} stops nothing"
        );
        let processes: Vec<_> = left.iter().filter(|it| it.starts_with("process")).collect();
        assert!(processes.is_empty(), "{processes:?}");
    }
}
