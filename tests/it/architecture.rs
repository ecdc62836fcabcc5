//! The direction of dependencies, as src/ARCHITECTURE.md gives it.

use std::{collections::BTreeSet, fs, path::Path};

use imports::{Modules, absolute_paths, circle, files, source};

mod imports;

/// Each imports only those before it.
const WORDS: &[&str] = &[
    "codec", "proto", "text", "digest", "instance", "path", "resource", "metadata",
];
/// Each imports only those before it.
const SERVICES: &[&str] = &["removal", "config", "auth", "daemon", "storage"];
const DAEMONS: &[&str] = &["scheduler", "worker", "runner"];

/// These have no I/O, clock, randomness, lock or `HashMap`; .clippy.toml lists what that means.
const PURE: &[&str] = &[
    "auth",
    "scheduler/queue",
    "scheduler/size_class",
    "scheduler/routing",
    "scheduler/operation_name.rs",
    "worker/slot.rs",
    "worker/health.rs",
    "worker/inputs/plan.rs",
    "runner/run_spec.rs",
];

/// The top-level module that a file belongs to.
fn module(path: &Path) -> String {
    let relative = path.strip_prefix(source()).unwrap();
    let first = relative.components().next().unwrap();
    first
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

/// Whether `first` comes before `second` in a list.
fn precedes(list: &[&str], first: &str, second: &str) -> bool {
    let place = |name: &str| list.iter().position(|entry| *entry == name);
    place(first).is_some() && place(first) < place(second)
}

fn may_import(from: &str, to: &str) -> bool {
    let is = |set: &[&str], name: &str| set.contains(&name);
    if from == to {
        return true;
    }
    if is(WORDS, from) {
        return precedes(WORDS, to, from);
    }
    if is(SERVICES, from) {
        return is(WORDS, to) || precedes(SERVICES, to, from);
    }
    if from == "runner" && to == "storage" {
        return false;
    }
    is(DAEMONS, from) && (is(WORDS, to) || is(SERVICES, to))
}

#[test]
fn modules_import_only_what_lies_below_them() {
    for (path, text) in files(&source()) {
        let from = module(&path);
        if from == "lib" || from == "bin" {
            continue;
        }
        for to in absolute_paths(&text) {
            let to = to.split("::").next().unwrap();
            assert!(
                may_import(&from, to),
                "{} must not import crate::{to}",
                path.display()
            );
        }
    }
}

#[test]
fn every_module_has_a_layer() {
    for entry in fs::read_dir(source()).unwrap() {
        let path = entry.unwrap().path();
        let name = module(&path);
        if ["lib", "bin", "ARCHITECTURE.md"].contains(&name.as_str()) {
            continue;
        }
        assert!(
            [WORDS, SERVICES, DAEMONS]
                .iter()
                .any(|layer| layer.contains(&name.as_str())),
            "src/{name} is in no layer"
        );
    }
}

#[test]
fn programs_are_about_ten_lines() {
    for (path, text) in files(&source().join("bin")) {
        assert!(text.lines().count() <= 15, "{}", path.display());
    }
}

#[test]
fn pure_modules_deny_what_is_impure() {
    let lints = "#![deny(clippy::disallowed_methods, clippy::disallowed_types)]";
    for pure in PURE {
        let path = source().join(pure);
        // Lints that a module switches on hold for its submodules.
        let root = if path.is_dir() {
            path.join("mod.rs")
        } else {
            path
        };
        let text = fs::read_to_string(&root).unwrap();
        assert!(text.contains(lints), "{} lacks {lints}", root.display());
    }
}

/// All of tonic's.
const STATUS_CONSTRUCTORS: &[&str] = &[
    "new",
    "with_details",
    "with_metadata",
    "with_details_and_metadata",
    "from",
    "from_error",
    "from_header_map",
    "try_from_error",
    "ok",
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
];

#[test]
fn a_status_is_made_only_at_the_edge() {
    for (path, text) in files(&source()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let services = [
            "action_routing.rs",
            "control.rs",
            "execution.rs",
            "operations.rs",
            "output_stream.rs",
            "state.rs",
            "status.rs",
            "workers.rs",
        ];
        let of_the_scheduler = path.parent() == Some(&source().join("scheduler"));
        let at_edge = name == "service.rs"
            || (of_the_scheduler && services.contains(&name))
            || path.starts_with(source().join("storage/serve"))
            || path.starts_with(source().join("storage/grpc"))
            || path.ends_with("daemon/client.rs")
            || path.ends_with("daemon/server/access.rs")
            || path.ends_with("daemon/server/call.rs")
            || path.ends_with("daemon/server/status.rs");
        // Unit tests make what others would send.
        let product = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let makes = STATUS_CONSTRUCTORS.iter().any(|constructor| {
            let name = format!("Status::{constructor}");
            // Called, or handed on as a function; but not a longer name.
            product.match_indices(&name).any(|(at, _)| {
                let after = product[at + name.len()..].chars().next();
                !after.is_some_and(|c| c.is_alphanumeric() || c == '_')
            })
        });
        assert!(
            at_edge || !makes,
            "{} makes a tonic::Status; only services, storage/serve, storage/grpc and the server do",
            path.display()
        );
    }
}

/// Statuses are shortened, and callers bounded, in one place; so everything is served through it. And
/// clients take the long ones of others.
#[test]
fn all_is_served_by_one_server_and_called_by_one_client() {
    for (path, text) in files(&source()) {
        let code: Vec<&str> = text
            .lines()
            .take_while(|line| !line.contains("#[cfg(test)]"))
            .collect();
        for (call, place) in [
            ("Server::builder", "nowhere"),
            ("serve_with_incoming", "nowhere"),
            ("http2::Builder", "daemon/server"),
            ("serve_connection", "daemon/server"),
            ("Channel::builder", "nowhere"),
            ("Endpoint::from_shared", "daemon/client.rs"),
            ("Endpoint::new", "nowhere"),
            ("connect_lazy", "daemon/client.rs"),
        ] {
            let calls = code.iter().any(|line| line.contains(call));
            let allowed = path.to_str().unwrap().contains(place);
            assert!(!calls || allowed, "{} calls {call}", path.display());
        }
    }
    for (file, times) in [("call.rs", 2), ("response_body.rs", 1)] {
        let text = fs::read_to_string(source().join("daemon/server").join(file)).unwrap();
        let found = text.matches("status::shorten(").count();
        assert_eq!(found, times, "headers and refusals; trailers");
    }
    let client = fs::read_to_string(source().join("daemon/client.rs")).unwrap();
    assert!(client.contains(".http2_max_header_list_size("));
}

#[test]
fn the_map_has_a_line_for_every_module_and_no_other() {
    let text = fs::read_to_string(source().join("ARCHITECTURE.md")).unwrap();
    let (_, map) = text.split_once("## The map").unwrap();
    let (map, _) = map.split_once("\n## ").unwrap();
    let named: Vec<&str> = map
        .lines()
        .filter_map(|line| line.strip_prefix("- `")?.split_once("`: "))
        .map(|(path, _)| path)
        .collect();
    let there: Vec<String> = files(&source())
        .into_iter()
        .map(|(path, _)| path.strip_prefix(source()).unwrap().display().to_string())
        .filter(|path| path != "lib.rs" && !path.starts_with("bin/"))
        .collect();
    let is_there = |name: &str| there.iter().any(|path| path == name);
    let without_line: Vec<_> = there
        .iter()
        .filter(|path| !named.contains(&path.as_str()))
        .collect();
    let without_file: Vec<_> = named.iter().filter(|name| !is_there(name)).collect();
    assert!(
        without_line.is_empty() && without_file.is_empty(),
        "without a line: {without_line:?}; without a file: {without_file:?}"
    );
    assert_eq!(named.len(), there.len(), "a module has two lines");
}

#[test]
fn every_file_says_what_it_is_for() {
    for (path, text) in files(&source()) {
        if path.starts_with(source().join("bin")) || path.ends_with("src/lib.rs") {
            continue;
        }
        assert!(
            text.starts_with("//!"),
            "{} opens with code",
            path.display()
        );
    }
}

/// The runner's modules from the top down: each uses only those after it.
const RUNNER: &[&str] = &[
    "status_command",
    "early_response_headers",
    "service",
    "check_command",
    "metrics",
    "run_action",
    "idle_invoker",
    "log_size_limit",
    "server_logs",
    "action_directory_lock",
    "input_ownership",
    "action_mounts",
    "input_root_chroot",
    "build_directory",
    "run_spec",
    "default_environment",
    "user_range_lock",
    "sandbox",
    "spawn",
    "user_pool",
    "user_cleanup",
    "host_requirements",
    "proc_self_status",
    "counts",
    "grpc_timeout",
    "run_cancellation",
    "sys",
];

/// What is in a directory of these is read from its `mod.rs` on, which names it: so `mod.rs` counts as
/// importing all of it, and nothing in it imports from there.
const READ_FROM_THE_TOP: &[&str] = &["runner", "worker"];

#[test]
fn modules_import_one_another_in_no_circle() {
    let mut imports = Modules::read().imports();
    assert!(imports.len() > 350 && imports.values().map(BTreeSet::len).sum::<usize>() > 1500);
    let names: Vec<String> = imports.keys().cloned().collect();
    for name in names {
        let Some((parent, _)) = name.rsplit_once("::") else {
            continue;
        };
        let top = name.split("::").next().unwrap();
        if READ_FROM_THE_TOP.contains(&top) {
            imports.get_mut(parent).unwrap().insert(name);
        }
    }
    assert_eq!(circle(&imports), None);
}

#[test]
fn modules_of_the_runner_import_only_what_comes_after_them() {
    let place = |module: &str| {
        let name = module.strip_prefix("runner::")?.split("::").next()?;
        let place = RUNNER.iter().position(|it| *it == name);
        Some(place.unwrap_or_else(|| panic!("runner/{name} is in no place")))
    };
    for (module, imported) in Modules::read().imports() {
        let of_runner = imported.iter().filter(|name| name.starts_with("runner"));
        for imported in of_runner.filter(|_| module.starts_with("runner")) {
            assert!(
                place(&module) <= place(imported),
                "{module} must not import {imported}"
            );
        }
    }
}

/// What a peer controls has a bound, and the table of them says which test drives it there.
#[test]
fn the_tests_that_the_table_of_bounds_names_are_there() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ARCHITECTURE.md"))
            .unwrap();
    let (_, table) = text
        .split_once("| what | bound | what happens at it | test |")
        .unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let mut named = 0;
    for row in table.lines().skip(2) {
        let test = row.trim_end_matches(" |").rsplit("| ").next().unwrap();
        let test = test
            .strip_prefix('`')
            .and_then(|test| test.strip_suffix('`'))
            .unwrap_or_else(|| panic!("{row}: which test drives it there?"));
        let (modules, name) = test.rsplit_once("::").unwrap();
        let file = modules.replace("::", "/");
        // Among the tests of the whole, or beside what it is about.
        let beside = file.strip_suffix("/tests").unwrap_or(&file);
        let places = [
            format!("tests/it/{file}.rs"),
            format!("src/{file}.rs"),
            format!("src/{beside}.rs"),
        ];
        let is_there = places.iter().any(|place| {
            let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(place));
            text.is_ok_and(|text| text.contains(&format!("fn {name}(")))
        });
        assert!(is_there, "{test}");
        named += 1;
    }
    assert!(named >= 15, "{named}");
}
