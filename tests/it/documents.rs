//! What is written in etc/, in the man pages, in the units and in the packages is what the programs
//! do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

use bb_remote_execution::config::{self, ListenAddress, Validate};
use serde::de::DeserializeOwned;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The shipped file with every commented-out default switched on.
fn switched_on(name: &str) -> String {
    fs::read_to_string(repository().join("etc").join(name))
        .unwrap()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn keys(prefix: &str, table: &toml::Table, into: &mut BTreeSet<String>) {
    for (name, value) in table {
        into.insert(format!("{prefix}{name}"));
        match value {
            toml::Value::Table(table) => keys(&format!("{prefix}{name}."), table, into),
            toml::Value::Array(items) => {
                for item in items {
                    if let toml::Value::Table(table) = item {
                        keys(&format!("{prefix}{name}."), table, into);
                    }
                }
            }
            _ => {}
        }
    }
}

fn shipped_file_states_the_defaults<C>(name: &str)
where
    C: DeserializeOwned + Default + Validate + PartialEq + std::fmt::Debug,
{
    let as_shipped: C = config::load(&repository().join("etc").join(name), false).unwrap();
    assert_eq!(as_shipped, C::default(), "{name} as shipped");
    let text = switched_on(name);
    let stated: C = toml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(stated, C::default(), "{name} with its defaults switched on");

    // Every key is there: a struct tells its fields only by refusing one that it lacks.
    let mut stated = BTreeSet::new();
    keys("", &toml::from_str(&text).unwrap(), &mut stated);
    let mut sections = BTreeSet::from([String::new()]);
    sections.extend(
        stated
            .iter()
            .filter_map(|key| key.rsplit_once('.'))
            .map(|(section, _)| section.to_owned()),
    );
    for section in sections {
        let header = match section.as_str() {
            "" => String::new(),
            "runners" => "[[runners]]\n".to_owned(),
            section => format!("[{section}]\n"),
        };
        let Err(error) = toml::from_str::<C>(&format!("{header}no_such_key = 1\n")) else {
            // A map, such as a platform, takes any key.
            continue;
        };
        for field in error.message().split('`').skip(3).step_by(2) {
            let key = if section.is_empty() {
                field.to_owned()
            } else {
                format!("{section}.{field}")
            };
            assert!(stated.contains(&key), "{name} does not state {key}");
        }
    }
}

#[test]
fn shipped_configurations_state_every_key_with_its_default() {
    shipped_file_states_the_defaults::<config::scheduler::Config>("bb_scheduler.toml");
    shipped_file_states_the_defaults::<config::worker::Config>("bb_worker.toml");
    shipped_file_states_the_defaults::<config::runner::Config>("bb_runner.toml");
}

const PROGRAMS: [(&str, &str); 3] = [
    ("scheduler", env!("CARGO_BIN_EXE_bb_scheduler")),
    ("worker", env!("CARGO_BIN_EXE_bb_worker")),
    ("runner", env!("CARGO_BIN_EXE_bb_runner")),
];

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The items `.It Va key = value` of a man page, as (key, value).
fn described(page: &str) -> Vec<(String, String)> {
    read(&format!("man/{page}"))
        .lines()
        .filter_map(|line| line.strip_prefix(".It Va "))
        .map(|item| {
            let item = item.replace("\\(dq", "\"");
            let (key, value) = item.split_once(" = ").expect("a key with its default");
            (key.to_owned(), value.to_owned())
        })
        .collect()
}

fn page_states_the_defaults<C>(name: &str)
where
    C: DeserializeOwned + Default + Validate + PartialEq + std::fmt::Debug,
{
    let page = format!("{name}.5");
    let described = described(&page);
    // An array of sections is written as one.
    let (sections, plain): (Vec<_>, Vec<_>) = described
        .iter()
        .partition(|(key, _)| key.starts_with("runners."));
    let mut text = String::new();
    for (key, value) in plain {
        text.push_str(&format!("{key} = {value}\n"));
    }
    if !sections.is_empty() {
        text.push_str("[[runners]]\n");
    }
    for (key, value) in sections {
        let key = key.trim_start_matches("runners.");
        text.push_str(&format!("{key} = {value}\n"));
    }
    let stated: C = toml::from_str(&text).unwrap_or_else(|error| panic!("{page}: {error}"));
    assert_eq!(stated, C::default(), "{page}");

    // The shipped file has every key, as another test sees to.
    let mut shipped = BTreeSet::new();
    keys(
        "",
        &toml::from_str(&switched_on(name)).unwrap(),
        &mut shipped,
    );
    let mut on_page = BTreeSet::new();
    keys("", &toml::from_str(&text).unwrap(), &mut on_page);
    assert_eq!(on_page, shipped, "{page}");
}

#[test]
fn man_pages_describe_every_key_with_its_default() {
    page_states_the_defaults::<config::scheduler::Config>("bb_scheduler.toml");
    page_states_the_defaults::<config::worker::Config>("bb_worker.toml");
    page_states_the_defaults::<config::runner::Config>("bb_runner.toml");
}

#[test]
fn man_pages_name_every_option_and_no_other() {
    for (name, program) in PROGRAMS {
        let help = Command::new(program).arg("--help").output().unwrap();
        assert!(help.status.success());
        let help = String::from_utf8(help.stdout).unwrap();
        let offered: BTreeSet<_> = help
            .lines()
            .filter_map(|line| line.split_once("--"))
            .filter(|(before, _)| before.trim().trim_end_matches(',').len() <= 2)
            .map(|(_, option)| option.split([' ', ',']).next().unwrap().to_owned())
            .collect();
        let page = read(&format!("man/bb_{name}.8"));
        let described: BTreeSet<_> = page
            .lines()
            .filter(|line| !line.ends_with(" No of commands"))
            .filter_map(|line| line.strip_prefix(".It Fl -"))
            .map(|option| option.split(' ').next().unwrap().to_owned())
            .collect();
        assert_eq!(described, offered, "bb_{name}.8");
        assert!(offered.contains("check"), "{help}");

        let commands: BTreeSet<_> = help
            .lines()
            .skip_while(|line| *line != "Commands:")
            .skip(1)
            .map_while(|line| line.split_whitespace().next())
            .collect();
        let shared = ["check", "print-config", "reload"];
        for command in shared {
            assert!(page.contains(&format!("\n.Cm {command}")), "bb_{name}.8");
            assert!(
                offered.contains(command) && commands.contains(command),
                "{help}"
            );
        }
        for command in commands.iter().filter(|command| !shared.contains(command)) {
            let items = format!("\n.It Cm {command}");
            assert!(page.contains(&items), "bb_{name}.8: {command}");
        }
        let print = |what: &str| {
            let mut program = Command::new(program);
            let output = program.args(["--config", "/dev/null", what]).output();
            output.unwrap().stdout
        };
        assert_eq!(print("print-config"), print("--print-config"));
        assert!(!print("print-config").is_empty());

        let version = Command::new(program).arg("--version").output().unwrap();
        let version = String::from_utf8(version.stdout).unwrap();
        let changelog = read("packaging/debian/changelog");
        let released = changelog.split(['(', ')']).nth(1).unwrap();
        assert_eq!(version.trim(), format!("bb_{name} {released}"));
    }
}

/// Assignments of a unit, by section and key; an assignment given again is appended.
fn unit(name: &str) -> BTreeMap<String, Vec<String>> {
    let mut section = String::new();
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in read(&format!("packaging/systemd/{name}")).lines() {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        } else if !line.starts_with('#')
            && let Some((key, value)) = line.split_once('=')
        {
            found
                .entry(format!("{section}.{key}"))
                .or_default()
                .push(value.to_owned());
        }
    }
    found
}

fn one<'u>(unit: &'u BTreeMap<String, Vec<String>>, key: &str) -> &'u str {
    match unit.get(key).map(Vec::as_slice) {
        Some([value]) => value,
        other => panic!("{key}: {other:?}"),
    }
}

/// Names of sockets that a daemon takes from systemd.
fn listened(daemon: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in walkdir::WalkDir::new(repository().join("src").join(daemon)) {
        let entry = entry.unwrap();
        if !entry.file_type().is_file() {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap();
        let plain = text.split("daemon::listen(").skip(1);
        let tried = text.split("daemon::listen_if_possible(").skip(1);
        for call in plain.chain(tried) {
            if let Some(name) = call.trim_start().strip_prefix('"') {
                names.insert(name.split('"').next().unwrap().to_owned());
            }
        }
    }
    names
}

#[test]
fn sockets_listen_where_the_defaults_say_under_the_names_that_daemons_take() {
    let scheduler = config::scheduler::Config::default();
    let runner = config::runner::Config::default();
    let worker = config::worker::Config::default();
    let written = |address: &ListenAddress| address.to_string().replace("unix:", "");
    let expected = [
        ("bb-scheduler.socket", "clients", &scheduler.clients.listen),
        (
            "bb-scheduler-workers.socket",
            "workers",
            &scheduler.workers.listen,
        ),
        (
            "bb-scheduler-state.socket",
            "state",
            &scheduler.state.listen,
        ),
        (
            "bb-scheduler-control.socket",
            "control",
            &scheduler.control.listen,
        ),
        ("bb-scheduler-web.socket", "web", &scheduler.web.listen),
        ("bb-runner.socket", "runner", &runner.listen),
        (
            "bb-runner-metrics.socket",
            "metrics",
            &runner.metrics.listen,
        ),
        (
            "bb-runner-control.socket",
            "control",
            &runner.control.listen,
        ),
        ("bb-worker.socket", "metrics", &worker.metrics.listen),
        (
            "bb-worker-control.socket",
            "control",
            &worker.control.listen,
        ),
    ];
    for (name, socket, address) in expected {
        let unit = unit(name);
        assert_eq!(one(&unit, "Socket.FileDescriptorName"), socket, "{name}");
        assert_eq!(
            one(&unit, "Socket.ListenStream"),
            written(address),
            "{name}"
        );
    }
    assert_eq!(
        listened("scheduler"),
        BTreeSet::from(["clients", "workers", "state", "web", "control"].map(str::to_owned))
    );
    assert_eq!(listened("runner"), BTreeSet::from(["runner".to_owned()]));

    let socket = unit("bb-runner.socket");
    assert_eq!(
        one(&socket, "Socket.SocketMode"),
        format!("{:04o}", runner.socket_mode.0)
    );
    assert_eq!(
        [one(&socket, "Socket.SocketGroup")],
        *runner.allowed_users,
        "the worker is let in by the socket and by the runner"
    );
    assert_eq!(
        worker.runners[0].endpoint.to_string(),
        runner.listen.to_string()
    );
    assert_eq!(worker.build_directory, runner.build_directory);
}

#[test]
fn units_fit_the_programs_and_their_defaults() {
    let seconds = |text: &str| text.trim_end_matches('s').parse::<u64>().unwrap();
    let drain = |daemon: &str| match daemon {
        "scheduler" => config::scheduler::Config::default().shutdown.drain_timeout,
        "worker" => config::worker::Config::default().shutdown.drain_timeout,
        _ => config::runner::Config::default().shutdown.drain_timeout,
    };
    for (name, _) in PROGRAMS {
        let unit = unit(&format!("bb-{name}.service"));
        let program = format!("/usr/bin/bb_{name}");
        assert_eq!(one(&unit, "Service.ExecStart"), program);
        assert_eq!(
            one(&unit, "Service.ExecReload"),
            format!("{program} --reload $MAINPID")
        );
        assert_eq!(one(&unit, "Service.Type"), "notify");
        assert_eq!(one(&unit, "Service.RestartPreventExitStatus"), "78");
        let limit = seconds(one(&unit, "Service.TimeoutStopSec"));
        let drain = drain(name).get().as_secs();
        assert!(
            limit >= drain + 20,
            "{name}: {limit} s to stop, {drain} s to drain"
        );
        // The man pages tell the figures.
        let page = read(&format!("man/bb_{name}.toml.5"));
        assert!(page.contains(&format!("{limit} seconds")), "{name}");
        let installed = read(&format!("packaging/debian/bb-{name}.install"));
        assert!(installed.contains(&format!("etc/bb_{name}.toml ")));
        let pages = read(&format!("packaging/debian/bb-{name}.manpages"));
        for page in [format!("man/bb_{name}.8"), format!("man/bb_{name}.toml.5")] {
            assert!(pages.lines().any(|line| line == page), "{page}");
            assert!(repository().join(&page).exists());
        }
    }
    let below = |directory: &std::path::Path, name: &str| {
        let state = format!("/var/lib/{name}");
        assert!(directory.starts_with(&state), "{}", directory.display());
        assert_eq!(
            one(&unit(&format!("{name}.service")), "Service.StateDirectory"),
            name
        );
    };
    let worker = config::worker::Config::default();
    below(&worker.cache.directory, "bb-worker");
    below(&worker.build_directory, "bb-worker");
    below(
        &config::scheduler::Config::default()
            .storage
            .embedded
            .directory,
        "bb-scheduler",
    );
    assert_eq!(
        one(&unit("bb-runner.service"), "Service.ReadWritePaths"),
        format!("-{}", worker.build_directory.display())
    );
}

#[test]
fn the_numbers_of_actions_users_are_documented_and_are_no_accounts() {
    let users = config::runner::Config::default().users;
    let made = read("packaging/debian/bb-runner.sysusers");
    let accounts: Vec<&str> = made.lines().filter(|line| line.starts_with("u ")).collect();
    assert_eq!(accounts.len(), 2, "{accounts:?}");
    let numbers = format!("{} to {}", users.first, users.first + users.count - 1);
    assert!(made.contains(&numbers), "{made}");
    assert!(read("packaging/debian/control").contains(&numbers));
    for page in ["bb_runner.8", "bb-remote-execution.7"] {
        let range = format!("{} to {}", users.first, users.first + users.count - 1);
        assert!(read(&format!("man/{page}")).contains(&range), "{page}");
    }
}

#[test]
fn the_manual_names_fields_of_the_journal_that_daemons_write() {
    let mut source = String::new();
    for entry in walkdir::WalkDir::new(repository().join("src")) {
        let entry = entry.unwrap();
        if entry.path().extension().is_some_and(|end| end == "rs") {
            source.push_str(&fs::read_to_string(entry.path()).unwrap());
        }
    }
    let described: Vec<String> = read("man/bb-remote-execution.7")
        .lines()
        .filter_map(|line| line.strip_prefix(".It Va BB_"))
        .flat_map(|line| line.split(" and BB_"))
        .map(str::to_lowercase)
        .collect();
    assert!(described.len() > 10, "{described:?}");
    for field in described {
        let written = [
            format!("{field} ="),
            format!("%{field},"),
            format!("\n                {field},\n"),
        ];
        assert!(written.iter().any(|text| source.contains(text)), "{field}");
    }
}

/// What people are alerted of is explained, and nothing else.
#[test]
fn each_message_id_has_an_entry_in_the_catalog() {
    let quoted = |line: &str| {
        Some(
            line.split_once(": &str = \"")?
                .1
                .split_once('"')?
                .0
                .to_owned(),
        )
    };
    let source = read("src/daemon/message_id.rs");
    let ids: BTreeSet<String> = source.lines().filter_map(quoted).collect();
    let catalog = read("packaging/bb-remote-execution.catalog");
    let entries: Vec<&str> = catalog.split("\n-- ").skip(1).collect();
    let explained = entries.iter().map(|entry| entry[..32].to_owned());
    assert_eq!(explained.collect::<BTreeSet<_>>(), ids);
    assert_eq!(entries.len(), ids.len());
    for entry in entries {
        for field in ["\nSubject: ", "\nDefined-By: bb-remote-execution\n", "\n\n"] {
            assert!(entry.contains(field), "{entry}");
        }
    }
}

#[test]
fn the_time_to_stop_that_check_knows_is_that_of_the_units() {
    let known = bb_remote_execution::daemon::SHIPPED_STOP_TIMEOUT.as_secs();
    for (name, _) in PROGRAMS {
        let unit = unit(&format!("bb-{name}.service"));
        assert_eq!(one(&unit, "Service.TimeoutStopSec"), format!("{known}s"));
    }
}
