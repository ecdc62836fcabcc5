//! The direction of dependencies, as src/ARCHITECTURE.md gives it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Each imports only those before it.
const WORDS: &[&str] = &[
    "proto", "text", "digest", "instance", "path", "resource", "metadata",
];
/// Each imports only those before it.
const SERVICES: &[&str] = &["config", "auth", "daemon", "storage"];
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

fn source() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every .rs file below `directory`, with its text.
fn files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut files: Vec<_> = walkdir::WalkDir::new(directory)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect();
    files.sort();
    files
}

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

/// The top-level modules that a text names: `crate::x`, and the members of `crate::{…}`.
fn imports(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (index, _) in text.match_indices("crate::") {
        let rest = &text[index + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut name = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        found.push(std::mem::take(&mut name));
                        continue;
                    }
                    _ => {}
                }
                if depth == 0 {
                    name.push(c);
                }
            }
            found.push(name);
        } else {
            found.push(rest.to_owned());
        }
    }
    found
        .into_iter()
        .map(|name| {
            name.trim()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        })
        .filter(|name: &String| !name.is_empty())
        .collect()
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
        for to in imports(&text) {
            assert!(
                may_import(&from, &to),
                "{} must not import crate::{to}",
                path.display()
            );
        }
    }
}

/// The modules below a directory of the sources by their paths, with their texts but not their tests'.
fn modules_below(directory: &str) -> BTreeMap<String, String> {
    let files = files(&source().join(directory)).into_iter();
    let modules = files.filter_map(|(path, text)| {
        let path = path.strip_prefix(source()).unwrap().with_extension("");
        let name = path.to_str().unwrap().replace('/', "::");
        let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
        let code: Vec<&str> = text
            .lines()
            .take_while(|line| !line.starts_with("#[cfg(test)]"))
            .map(|line| line.split("//").next().unwrap())
            .collect();
        (!name.ends_with("::tests")).then(|| (name, code.join("\n")))
    });
    modules.collect()
}

/// The single paths of a tree of them, `a::{b, c::{d, e}}`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.to_owned()];
    };
    let (mut depth, mut start, mut paths) = (0, 0, Vec::new());
    let members = rest.strip_suffix('}').unwrap_or(rest);
    for (at, c) in members.char_indices().chain([(members.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let expanded = expand(&members[start..at]).into_iter();
                let expanded = expanded.filter(|path| !path.is_empty());
                paths.extend(expanded.map(|path| format!("{prefix}{path}")));
                start = at + 1;
            }
            _ => {}
        }
    }
    paths
}

/// What a module names: in its imports, and from the root of the crate or the module above elsewhere.
fn paths_in(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for statement in code.split(';') {
        let import = statement.rsplit_once("use ").filter(|(before, _)| {
            let line = before.lines().last().unwrap_or_default().trim();
            line.is_empty() || line.starts_with("pub")
        });
        match import {
            Some((_, tree)) => paths.extend(expand(tree)),
            None => {
                let words = statement.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
                let absolute =
                    |word: &&str| word.starts_with("crate::") || word.starts_with("super::");
                paths.extend(words.filter(absolute).map(str::to_owned));
            }
        }
    }
    paths
}

/// Which of the modules a path in one of them leads to.
fn module_of(path: &str, from: &str, modules: &BTreeMap<String, String>) -> Option<String> {
    let mut at: Vec<&str> = from.split("::").collect();
    let mut rest = path.split("::").map(str::trim).peekable();
    match *rest.peek()? {
        "crate" => at.clear(),
        "super" | "self" => {}
        child if modules.contains_key(&format!("{from}::{child}")) => {}
        _ => return None,
    }
    for part in rest {
        match part {
            "crate" | "self" => {}
            "super" => drop(at.pop()),
            name => at.push(name),
        }
    }
    while !at.is_empty() && !modules.contains_key(&at.join("::")) {
        at.pop();
    }
    Some(at.join("::")).filter(|module| !module.is_empty() && module != from)
}

/// A module of several files is read from its `mod.rs` on, which names what is in it; so what is in it
/// does not import from there.
#[test]
fn the_workers_modules_import_one_another_in_no_circle() {
    let modules = modules_below("worker");
    let mut imports: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (name, code) in &modules {
        let paths = paths_in(code);
        let named = paths
            .iter()
            .filter_map(|path| module_of(path, name, &modules));
        imports.insert(name, named.collect());
    }
    assert!(imports.values().map(BTreeSet::len).sum::<usize>() > modules.len());
    loop {
        let left: BTreeSet<String> = imports.keys().map(|name| (*name).to_owned()).collect();
        imports.retain(|_, imported| imported.iter().any(|name| left.contains(name)));
        if imports.len() == left.len() {
            break;
        }
    }
    assert!(imports.is_empty(), "in circles, or above one: {imports:#?}");
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
    "commands",
    "early_headers",
    "service",
    "check",
    "metrics",
    "run",
    "cleaner",
    "limited_log",
    "action_directory",
    "input_ownership",
    "action_mounts",
    "input_root_as_root",
    "build_directory",
    "run_spec",
    "environment",
    "user_range_lock",
    "sandbox",
    "spawn",
    "users",
    "sweep",
    "host",
    "process_status",
    "counts",
    "grpc_timeout",
    "stop",
    "sys",
];

/// The module of a file: `runner/spawn/mod.rs` is `runner::spawn`.
fn module_path(path: &Path) -> Vec<String> {
    let relative = path.strip_prefix(source()).unwrap().with_extension("");
    let mut names: Vec<String> = relative
        .iter()
        .map(|name| name.to_str().unwrap().to_owned())
        .collect();
    names.pop_if(|name| name == "mod");
    names
}

/// The paths of a use tree, such as `a::{b, c::d}`, with which a text begins.
fn use_tree(text: &mut &str) -> Vec<Vec<String>> {
    let name: String = text
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    *text = &text[name.len()..];
    if let Some(rest) = text.strip_prefix("::{") {
        *text = rest;
        let mut paths = Vec::new();
        loop {
            *text = text.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
            let before = text.len();
            if text.starts_with('}') || text.is_empty() {
                *text = text.get(1..).unwrap_or_default();
                break;
            }
            paths.extend(use_tree(text));
            if text.len() == before {
                break;
            }
        }
        for path in &mut paths {
            path.insert(0, name.clone());
        }
        return paths;
    }
    match text.strip_prefix("::") {
        Some(rest) if rest.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
            *text = rest;
            let mut paths = use_tree(text);
            for path in &mut paths {
                path.insert(0, name.clone());
            }
            paths
        }
        _ => vec![vec![name]],
    }
}

/// The modules below `root` that each file there uses; a directory's mod.rs uses all that it declares.
fn uses(root: &str) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let files = files(&source().join(root));
    let modules: BTreeSet<Vec<String>> = files.iter().map(|(path, _)| module_path(path)).collect();
    let mut uses = BTreeMap::new();
    for (path, text) in &files {
        let own = module_path(path);
        let product = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let mut used = BTreeSet::new();
        let starts = product
            .match_indices("super::")
            .chain(product.match_indices("crate::"))
            .filter(|(at, _)| !product[..*at].ends_with("::"));
        for (at, _) in starts {
            for named in use_tree(&mut &product[at..]) {
                let mut absolute = own.clone();
                for name in named {
                    match name.as_str() {
                        "crate" => absolute.clear(),
                        "super" => drop(absolute.pop()),
                        _ => absolute.push(name),
                    }
                }
                while !absolute.is_empty() && !modules.contains(&absolute) {
                    absolute.pop();
                }
                used.insert(absolute);
            }
        }
        for line in product.lines() {
            if let Some(name) = line
                .strip_prefix("mod ")
                .and_then(|it| it.strip_suffix(';'))
            {
                used.insert([own.as_slice(), &[name.to_owned()]].concat());
            }
        }
        used.remove(&own);
        used.remove(&Vec::new());
        uses.insert(own, used);
    }
    uses
}

/// Modules each of which uses the next one, and the last one the first.
fn circle(uses: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> Option<Vec<Vec<String>>> {
    fn visit(
        module: &Vec<String>,
        uses: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>,
        path: &mut Vec<Vec<String>>,
        done: &mut BTreeSet<Vec<String>>,
    ) -> bool {
        if let Some(at) = path.iter().position(|it| it == module) {
            path.drain(..at);
            return true;
        }
        if done.contains(module) {
            return false;
        }
        path.push(module.clone());
        for used in &uses[module] {
            if visit(used, uses, path, done) {
                return true;
            }
        }
        path.pop();
        done.insert(module.clone());
        false
    }
    let (mut path, mut done) = (Vec::new(), BTreeSet::new());
    let has_circle = uses
        .keys()
        .any(|module| visit(module, uses, &mut path, &mut done));
    has_circle.then_some(path)
}

#[test]
fn no_two_files_of_the_runner_use_each_other() {
    let uses = uses("runner");
    assert!(uses.len() > 40 && uses.values().map(BTreeSet::len).sum::<usize>() > 100);
    assert_eq!(circle(&uses), None);
}

#[test]
fn modules_of_the_runner_use_only_what_comes_after_them() {
    let place = |module: &[String]| {
        let name = module.get(1)?;
        let place = RUNNER.iter().position(|it| it == name);
        Some(place.unwrap_or_else(|| panic!("runner/{name} is in no place")))
    };
    for (module, used) in uses("runner") {
        for used in used {
            assert!(
                place(&module) <= place(&used),
                "{} must not use {}",
                module.join("::"),
                used.join("::")
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
