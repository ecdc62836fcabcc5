//! Which modules of the sources import which.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

pub fn source() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every .rs file below `directory`, with its text.
pub fn files(directory: &Path) -> Vec<(PathBuf, String)> {
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

/// What `use` brings into a module.
struct Import {
    /// From the root of the crate.
    path: Vec<String>,
    /// What the module calls it.
    name: String,
    /// Others may import it from the module.
    is_reexport: bool,
}

/// A module: what it brings in by `use`, and what else it names by a path.
struct Module {
    imports: Vec<Import>,
    paths: Vec<Vec<String>>,
}

/// The modules by their paths, such as `daemon::server`, without their tests.
pub struct Modules(BTreeMap<String, Module>);

/// For each module, those that it imports something from.
pub type Imports = BTreeMap<String, BTreeSet<String>>;

/// The code of a file, without its tests and comments.
fn code(text: &str) -> String {
    let lines = text.lines();
    lines
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
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

/// The trees of paths of a text's `use` declarations, and whether each is a re-export; and the words of the
/// rest of it.
fn declarations(code: &str) -> (Vec<(bool, String)>, Vec<&str>) {
    let (mut trees, mut words) = (Vec::new(), Vec::new());
    for statement in code.split(';') {
        let import = statement.rsplit_once("use ").and_then(|(before, tree)| {
            let line = before.rsplit('\n').next().unwrap_or_default().trim();
            (line.is_empty() || line.starts_with("pub")).then_some((!line.is_empty(), tree))
        });
        match import {
            Some((is_reexport, tree)) => trees.push((is_reexport, tree.to_owned())),
            None => {
                words.extend(statement.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c)))
            }
        }
    }
    (trees, words)
}

/// All that a text names from the root of the crate on, its tests included.
pub fn absolute_paths(text: &str) -> Vec<String> {
    let (trees, words) = declarations(text);
    let trees = trees.into_iter().flat_map(|(_, tree)| expand(&tree));
    trees
        .chain(words.into_iter().map(str::to_owned))
        .filter_map(|path| Some(path.strip_prefix("crate::")?.to_owned()))
        .collect()
}

/// A path in a module, from the root of the crate; `None` of one that leads to other crates.
fn from_root(path: &str, module: &str, is_module: impl Fn(&str) -> bool) -> Option<Vec<String>> {
    let mut at: Vec<String> = module.split("::").map(str::to_owned).collect();
    let mut rest = path.split("::").map(str::trim);
    match rest.next()? {
        "crate" => at.clear(),
        "super" => drop(at.pop()),
        "self" => {}
        child if is_module(&format!("{module}::{child}")) => at.push(child.to_owned()),
        _ => return None,
    }
    for name in rest {
        match name {
            "self" => {}
            "super" => drop(at.pop()),
            name => at.push(name.to_owned()),
        }
    }
    Some(at)
}

impl Modules {
    pub fn read() -> Self {
        let texts: BTreeMap<String, String> = files(&source())
            .into_iter()
            .map(|(path, text)| {
                let path = path.strip_prefix(source()).unwrap().with_extension("");
                let name = path.to_str().unwrap().replace('/', "::");
                (
                    name.strip_suffix("::mod").unwrap_or(&name).to_owned(),
                    code(&text),
                )
            })
            .filter(|(name, _)| !format!("{name}::").contains("::tests::"))
            .filter(|(name, _)| name != "lib" && !name.starts_with("bin::"))
            .collect();
        let is_module = |name: &str| texts.contains_key(name);
        let modules = texts.iter().map(|(name, code)| {
            let (trees, words) = declarations(code);
            let imports = trees.into_iter().flat_map(|(is_reexport, tree)| {
                expand(&tree).into_iter().filter_map(move |path| {
                    let (path, alias) = path.split_once(" as ").unwrap_or((&path, ""));
                    let path = from_root(path, name, is_module)?;
                    let own = path.last().cloned().unwrap_or_default();
                    let name = Some(alias.trim().to_owned()).filter(|name| !name.is_empty());
                    Some(Import {
                        path,
                        name: name.unwrap_or(own),
                        is_reexport,
                    })
                })
            });
            let module = Module {
                imports: imports.collect(),
                paths: words
                    .into_iter()
                    .filter(|word| word.contains("::"))
                    .filter_map(|word| from_root(word, name, is_module))
                    .collect(),
            };
            (name.clone(), module)
        });
        Modules(modules.collect())
    }

    /// The module that has what a path leads to, whoever re-exports it.
    fn of(&self, path: &[String]) -> Option<String> {
        let length = (1..=path.len()).rev();
        let mut prefixes = length.map(|length| (path[..length].join("::"), &path[length..]));
        let (name, rest) = prefixes.find(|(name, _)| self.0.contains_key(name))?;
        let imported = rest.split_first().and_then(|(first, rest)| {
            let mut imports = self.0[&name].imports.iter();
            let import = imports.find(|import| import.name == *first)?;
            Some([&import.path, rest].concat())
        });
        match imported {
            Some(path) => self.of(&path),
            None => Some(name),
        }
    }

    /// Re-exports of what is below a module are none of its imports.
    pub fn imports(&self) -> Imports {
        let of_module = |(name, module): (&String, &Module)| {
            let below = format!("{name}::");
            let own = module.imports.iter().filter(|import| {
                !(import.is_reexport && import.path.join("::").starts_with(&below))
            });
            let paths = own.map(|import| &import.path).chain(&module.paths);
            let imported = paths.filter_map(|path| self.of(path));
            (
                name.clone(),
                imported.filter(|other| other != name).collect(),
            )
        };
        self.0.iter().map(of_module).collect()
    }
}

/// Modules each of which imports the next one, and the last one the first.
pub fn circle(imports: &Imports) -> Option<Vec<String>> {
    fn visit(
        module: &str,
        imports: &Imports,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> bool {
        if let Some(at) = path.iter().position(|it| it == module) {
            path.drain(..at);
            return true;
        }
        if done.contains(module) {
            return false;
        }
        path.push(module.to_owned());
        for imported in &imports[module] {
            if visit(imported, imports, path, done) {
                return true;
            }
        }
        path.pop();
        done.insert(module.to_owned());
        false
    }
    let (mut path, mut done) = (Vec::new(), BTreeSet::new());
    let has_circle = imports
        .keys()
        .any(|module| visit(module, imports, &mut path, &mut done));
    has_circle.then_some(path)
}
