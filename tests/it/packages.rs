//! What the packages have in them besides the programs agrees with the programs: man pages as they
//! are shown, completions, and the units of further runners.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

const PROGRAMS: [(&str, &str); 3] = [
    ("scheduler", env!("CARGO_BIN_EXE_bb_scheduler")),
    ("worker", env!("CARGO_BIN_EXE_bb_worker")),
    ("runner", env!("CARGO_BIN_EXE_bb_runner")),
];

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A page as its reader sees it, by mandoc(1) or man(1), in wide lines; `None` where there is neither.
fn shown(page: &str) -> Option<String> {
    let path = repository().join("man").join(page);
    let mandoc = || {
        let mut command = Command::new("mandoc");
        command.args(["-T", "utf8", "-O", "width=200"]);
        command
    };
    let man = || {
        let mut command = Command::new("man");
        command.args(["-E", "UTF-8", "-P", "cat", "-l"]);
        command.env("MANWIDTH", "200").env("LC_ALL", "C.UTF-8");
        command
    };
    for mut command in [mandoc(), man()] {
        let Ok(output) = command.arg(&path).output() else {
            continue;
        };
        if !output.status.success() {
            continue;
        }
        // Bold and underlined characters are written twice, with a backspace between.
        let mut text: Vec<char> = Vec::new();
        for character in String::from_utf8(output.stdout).unwrap().chars() {
            match character {
                '\u{8}' => drop(text.pop()),
                _ => text.push(character),
            }
        }
        return Some(text.into_iter().collect());
    }
    crate::harness::skip("there is neither mandoc(1) nor man(1)");
    None
}

/// Without spaces and quotation marks, which macros add.
fn bare(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_whitespace() && !"\"'`‘’“”".contains(*c))
        .collect()
}

/// The macros of mdoc(7) that the pages use within lines; any other word is text.
const MACROS: [&str; 16] = [
    "Ar", "Cm", "Dq", "Dv", "Em", "Ev", "Fl", "Li", "No", "Ns", "Op", "Pa", "Pq", "Ql", "Sy", "Va",
];

/// What a line of mdoc says.
fn said(line: &str) -> String {
    line.split(' ')
        .filter(|word| !MACROS.contains(word))
        .collect::<Vec<_>>()
        .join(" ")
        .replace("\\(dq", "\"")
        .replace("\\&", "")
        .replace("\\-", "-")
        .replace("\\e", "\\")
}

fn pages() -> Vec<String> {
    let mut pages: Vec<_> = fs::read_dir(repository().join("man"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    pages
}

#[test]
fn what_titles_and_commands_of_man_pages_say_is_shown() {
    for page in pages() {
        let Some(shown) = shown(&page) else { return };
        let shown = bare(&shown);
        for line in read(&format!("man/{page}")).lines() {
            for title in [".It ", ".Sh ", ".Ss ", ".Dl "] {
                let Some(text) = line.strip_prefix(title) else {
                    continue;
                };
                // It is followed by a cross reference's parentheses.
                if text.contains("Xr ") {
                    continue;
                }
                let text = bare(&said(text));
                assert!(shown.contains(&text), "{page}: {line}");
            }
        }
    }
}

/// The titles in a section, as they are shown.
fn titles(page: &str, section: &str) -> Vec<String> {
    let text = read(&format!("man/{page}"));
    let from = text.find(&format!(".Sh {section}\n")).unwrap();
    text[from..]
        .lines()
        .skip(1)
        .take_while(|line| !line.starts_with(".Sh "))
        .filter_map(|line| line.strip_prefix(".It "))
        .map(said)
        .collect()
}

#[test]
fn messages_that_the_manual_explains_are_the_programs_own() {
    let mut sources = String::new();
    for entry in walkdir::WalkDir::new(repository().join("src")) {
        let entry = entry.unwrap();
        if entry.path().extension().is_some_and(|end| end == "rs") {
            sources += &fs::read_to_string(entry.path()).unwrap();
        }
    }
    // Lines of a string that goes on with a backslash are one.
    let mut joined = String::new();
    for part in sources.split("\\\n") {
        joined += part.trim_start_matches(' ');
    }
    // What systemd and the kernel say.
    let others = [
        "status=78/CONFIG",
        "Watchdog timeout",
        "Invalid cross-device link",
        "Read-only file system",
    ];
    let mut compared = 0;
    for title in titles("bb-remote-execution.7", "DIAGNOSTICS") {
        let is_code = |c: char| c.is_ascii_uppercase() || "_, ".contains(c);
        if others.contains(&title.as_str()) || title.chars().all(is_code) {
            continue;
        }
        // Up to what differs from case to case.
        let text = title
            .trim_start_matches("... ")
            .split(['"', '{'])
            .next()
            .unwrap();
        let text = text.split("grpc://").next().unwrap().trim_end();
        assert!(joined.contains(text), "nothing says {text:?}");
        if let Some(shown) = shown("bb-remote-execution.7") {
            assert!(shown.contains(text), "{text:?} is shown as something else");
        }
        compared += 1;
    }
    assert!(compared >= 3, "{compared} messages");
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn shells_complete_every_option_that_the_help_has() {
    for (name, program) in PROGRAMS {
        let help = output(program, &["--help"]);
        let offered: BTreeSet<_> = help
            .lines()
            .filter_map(|line| line.trim_start().split_once("--"))
            .filter(|(before, _)| before.trim_end_matches([' ', ',']).len() <= 2)
            .map(|(_, option)| option.split([' ', ',']).next().unwrap().to_owned())
            .collect();
        assert!(offered.contains("config"), "{help}");
        for shell in ["bash", "zsh", "fish"] {
            let script = output(program, &["--completions", shell]);
            assert!(script.contains(&format!("bb_{name}")), "{shell}");
            assert!(!script.contains("--completions"), "{script}");
            for option in &offered {
                // fish: -l option.
                let found = [format!("--{option}"), format!("-l {option}")];
                assert!(
                    found.iter().any(|found| script.contains(found)),
                    "{shell}: {option}"
                );
            }
        }
        let installed = read(&format!("packaging/debian/bb-{name}.install"));
        for place in [
            format!("debian/completions/bb_{name} usr/share/bash-completion/completions"),
            format!("debian/completions/_bb_{name} usr/share/zsh/vendor-completions"),
            format!("debian/completions/bb_{name}.fish usr/share/fish/vendor_completions.d"),
        ] {
            assert!(installed.lines().any(|line| line == place), "{place}");
        }
    }
}

/// Assignments of a unit's text, by section and key.
fn unit(text: &str) -> BTreeMap<String, Vec<&str>> {
    let mut section = "";
    let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for line in text.lines() {
        if line.starts_with('[') {
            section = line;
        } else if !line.starts_with('#')
            && let Some((key, value)) = line.split_once('=')
        {
            found
                .entry(format!("{section}{key}"))
                .or_default()
                .push(value);
        }
    }
    found
}

#[test]
fn units_of_further_runners_differ_from_the_first_ones_by_their_name_only() {
    let directory = repository().join("packaging/systemd");
    for (kind, own) in [
        (
            "service",
            [
                "[Unit]After",
                "[Unit]Before",
                "[Unit]Description",
                "[Unit]Requires",
                "[Unit]Wants",
                "[Service]ExecReload",
                "[Service]ExecStart",
                "[Service]ExecStopPost",
            ]
            .as_slice(),
        ),
        (
            "socket",
            ["[Unit]Before", "[Unit]Description", "[Socket]ListenStream"].as_slice(),
        ),
    ] {
        let first = read(&format!("packaging/systemd/bb-runner.{kind}"));
        let made = Command::new("sed")
            .arg("-f")
            .arg(directory.join("instance.sed"))
            .arg(directory.join(format!("bb-runner.{kind}")))
            .output()
            .unwrap();
        assert!(made.status.success());
        let made = String::from_utf8(made.stdout).unwrap();
        let (first, made) = (unit(&first), unit(&made));
        let keys: BTreeSet<_> = first.keys().chain(made.keys()).collect();
        for key in keys {
            if own.contains(&key.as_str()) {
                continue;
            }
            assert_eq!(made.get(key), first.get(key), "{kind}: {key}");
        }
        for key in own {
            for value in made.get(*key).into_iter().flatten() {
                assert!(
                    value.contains("%i") || *key == "[Unit]Before",
                    "{kind}: {key}={value}"
                );
            }
        }
        assert_eq!(made["[Unit]Before"], ["bb-worker.service"]);
        for values in made.values().flatten() {
            assert!(!values.contains("bb-runner.socket"), "{values}");
            assert!(!values.contains("/run/bb-runner/"), "{values}");
        }
    }
}

#[test]
fn the_overview_is_in_one_package_on_which_the_others_depend() {
    let control = read("packaging/debian/control");
    let paragraphs: Vec<_> = control.split("\n\n").skip(1).collect();
    assert_eq!(paragraphs.len(), 4);
    for paragraph in paragraphs {
        let name = paragraph
            .lines()
            .find_map(|line| line.strip_prefix("Package: "))
            .unwrap();
        let is_shared = name == "bb-remote-execution-common";
        let pages = read(&format!("packaging/debian/{name}.manpages"));
        assert_eq!(pages.contains("man/bb-remote-execution.7"), is_shared);
        assert_eq!(
            paragraph.contains("bb-remote-execution-common (>= ${source:Version})"),
            !is_shared
        );
        let architecture = if is_shared { "all" } else { "amd64 arm64" };
        assert!(
            paragraph.contains(&format!("\nArchitecture: {architecture}\n")),
            "{paragraph}"
        );
    }
}

/// The blocks of indented commands between two lines.
fn blocks(text: &str, indent: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in text.lines() {
        match line.strip_prefix(indent) {
            Some(line) => *blocks.last_mut().unwrap() += &format!("{line}\n"),
            None if blocks.last().unwrap().is_empty() => {}
            None => blocks.push(String::new()),
        }
    }
    blocks.retain(|block| !block.is_empty());
    blocks
}

#[test]
fn the_readme_and_the_manual_set_up_several_hosts_in_the_same_way() {
    let readme = read("README.md");
    let (_, section) = readme.split_once("### Several hosts\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let page = read("man/bb-remote-execution.7");
    let (_, there) = page.split_once(".Ss Many hosts\n").unwrap();
    let (there, _) = there.split_once("\n.Ss ").unwrap();
    let literal: Vec<_> = there
        .split(".Bd -literal -offset indent\n")
        .skip(1)
        .map(|block| block.split(".Ed").next().unwrap().to_owned())
        .collect();
    assert_eq!(blocks(section, "    "), literal);
    assert_eq!(literal.len(), 2);
}
