//! Why one action is not another's cache hit: in what they differ.

use std::collections::{BTreeMap, BTreeSet};

use maud::{Markup, html};

use super::{
    Place,
    address::parse_digest,
    command,
    read::{self, Problem},
};
use crate::{
    digest::Digest,
    proto::{
        self,
        reapi::{self, Action, Command, Directory},
    },
    scheduler::web::{
        Pages,
        format::{duration, name},
        layout::{self, Page, Section},
    },
};

/// Directories that are read for a comparison, and differences that a page shows.
const MOST_DIRECTORIES: usize = 4_000;
const MOST_DIFFERENCES: usize = 200;

/// What one side has and the other has not, or has otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Difference {
    what: String,
    /// `None` where it is absent.
    one: Option<String>,
    other: Option<String>,
}

/// What asks for another action to compare with.
pub(super) fn form(own: &str) -> Markup {
    html! {
        details #compare {
            summary { "Compare with another action" }
            form.filters method="get" action=(own) {
                label { "Hash and size, or the address of its page "
                    input name="with" required autocomplete="off" spellcheck="false";
                }
                button { "Compare" }
            }
        }
    }
}

/// A digest as people write it: `hash-size`, `hash/size`, or within an address.
fn find_digest(place: &Place, text: &str) -> Option<Digest> {
    let text = text.trim();
    let parts = text.split('/').filter(|part| !part.is_empty());
    let parts: Vec<&str> = parts.collect();
    let joined = parts.windows(2).map(|pair| pair.join("-"));
    let all = parts.iter().map(|part| (*part).to_owned()).chain(joined);
    all.into_iter()
        .find_map(|part| parse_digest(place.function, &part).ok())
}

pub(super) async fn page(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    other: &str,
) -> Result<Page<'static>, Problem> {
    let own = place.address("action", digest);
    let Some(other) = find_digest(place, other) else {
        let content = html! {
            h1 { "Comparison" }
            p { "“" (name(&crate::text::shorten(other))) "” has no digest in it: a hash and a size with a hyphen between them." }
            (form(&own))
        };
        return Ok(framed(content));
    };
    let (one_action, other_action) = futures::join!(
        read::message::<Action>(pages, place, digest, "Action"),
        read::message::<Action>(pages, place, &other, "Action"),
    );
    let one_action = one_action?;
    let other_action = match other_action {
        Ok(action) => action,
        Err(_) => {
            let content = html! {
                h1 { "Comparison" }
                p {
                    "The other action, " code { (other.hash_hex()) } ", is not in the storage, or is none. "
                    "It may have been evicted: build it again."
                }
                (form(&own))
            };
            return Ok(framed(content));
        }
    };
    let mut differences = of_actions(&one_action, &other_action);
    let commands = [&one_action, &other_action].map(|action| action.command_digest.as_ref());
    let same_command = commands[0] == commands[1];
    let mut notes = Vec::new();
    if !same_command {
        match both::<Command>(pages, place, commands, "Command").await {
            Some([one, other]) => differences.extend(of_commands(&one, &other)),
            None => notes.push("The commands differ; one of them is not in the storage any more."),
        }
    }
    let roots = [&one_action, &other_action].map(|action| action.input_root_digest.as_ref());
    let mut inputs = Vec::new();
    if roots[0] != roots[1] {
        let parse = |digest: Option<&reapi::Digest>| {
            Digest::parse_required(Some(place.function), digest).ok()
        };
        match (parse(roots[0]), parse(roots[1])) {
            (Some(one), Some(other)) => {
                let mut walk = Walk {
                    pages,
                    place,
                    read: 0,
                    found: Vec::new(),
                    is_cut: false,
                };
                walk.compare(one, other).await;
                if walk.is_cut {
                    notes.push("There is more that differs in the inputs than was looked at.");
                }
                inputs = walk.found;
            }
            _ => notes.push("An input root has no valid digest."),
        }
    }
    let content = html! {
        h1 { "Comparison of two actions" }
        dl.facts {
            div { dt { "One" } dd { a href=(own) { code { (digest.hash_hex()) } } } }
            div { dt { "The other" } dd { a href=(place.address("action", &other)) { code { (other.hash_hex()) } } } }
        }
        @if *digest == other { p { "They are the same action: its result is one and the same." } }
        @for note in notes { p.empty { (note) } }
        h2 { "Action and command" }
        (table(&differences, "They ask for the same, but for their inputs."))
        h2 { "Inputs" }
        (table(&inputs, "Their input roots are the same."))
    };
    Ok(framed(content))
}

fn framed(content: Markup) -> Page<'static> {
    Page {
        section: Section::None,
        title: "Comparison",
        is_live: false,
        content,
    }
}

async fn both<M: prost::Message + Default>(
    pages: &Pages,
    place: &Place,
    digests: [Option<&reapi::Digest>; 2],
    kind: &'static str,
) -> Option<[M; 2]> {
    let [one, other] = digests.map(|digest| Digest::parse_required(Some(place.function), digest));
    let (one, other) = (one.ok()?, other.ok()?);
    let (one, other) = futures::join!(
        read::message::<M>(pages, place, &one, kind),
        read::message::<M>(pages, place, &other, kind),
    );
    Some([one.ok()?, other.ok()?])
}

fn table(differences: &[Difference], none: &str) -> Markup {
    let side = |text: &Option<String>| {
        html! {
            @match text {
                Some(text) => code { (name(&crate::text::shorten(text))) },
                None => span.quiet { "absent" }
            }
        }
    };
    html! {
        @if differences.is_empty() { p.empty { (none) } } @else {
            (layout::table("Differences", None, html! {
                th scope="col" { "What" }
                th scope="col" { "One" }
                th scope="col" { "The other" }
            }, html! {
                @for difference in differences.iter().take(MOST_DIFFERENCES) {
                    tr {
                        th scope="row" { (name(&difference.what)) }
                        td { (side(&difference.one)) }
                        td { (side(&difference.other)) }
                    }
                }
            }))
            @if differences.len() > MOST_DIFFERENCES {
                p { "… and " (differences.len() - MOST_DIFFERENCES) " more." }
            }
        }
    }
}

fn compared(what: &str, one: String, other: String) -> Option<Difference> {
    (one != other).then(|| Difference {
        what: what.to_owned(),
        one: Some(one),
        other: Some(other),
    })
}

fn of_maps(
    kind: &str,
    one: &BTreeMap<String, String>,
    other: &BTreeMap<String, String>,
) -> Vec<Difference> {
    let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let different = names
        .into_iter()
        .filter(|name| one.get(*name) != other.get(*name));
    different
        .map(|name| Difference {
            what: format!("{kind} {name}"),
            one: one.get(name).cloned(),
            other: other.get(name).cloned(),
        })
        .collect()
}

fn properties(platform: Option<&reapi::Platform>) -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for property in platform.iter().flat_map(|platform| &platform.properties) {
        let values = found.entry(property.name.clone()).or_default();
        if !values.is_empty() {
            values.push_str(", ");
        }
        values.push_str(&property.value);
    }
    found
}

fn of_actions(one: &Action, other: &Action) -> Vec<Difference> {
    let time = |action: &Action| {
        let time = action.timeout.as_ref().and_then(proto::duration);
        time.map_or_else(|| "none".to_owned(), duration)
    };
    let salt = |action: &Action| action.salt.escape_ascii().to_string();
    let cached = |action: &Action| (!action.do_not_cache).to_string();
    let mut found: Vec<Difference> = [
        compared("timeout", time(one), time(other)),
        compared("salt", salt(one), salt(other)),
        compared("result may be cached", cached(one), cached(other)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let [one, other] = [one, other].map(|action| properties(command::platform(action, None)));
    found.extend(of_maps("property", &one, &other));
    found
}

fn of_commands(one: &Command, other: &Command) -> Vec<Difference> {
    let variables = |command: &Command| -> BTreeMap<String, String> {
        let variables = command.environment_variables.iter();
        variables
            .map(|variable| (variable.name.clone(), variable.value.clone()))
            .collect()
    };
    let mut found = of_lists("argument", &one.arguments, &other.arguments);
    found.extend(of_maps("variable", &variables(one), &variables(other)));
    found.extend(compared(
        "working directory",
        one.working_directory.clone(),
        other.working_directory.clone(),
    ));
    let outputs = |command: &Command| -> BTreeMap<String, String> {
        let outputs = command::declared_outputs(command).into_iter();
        outputs
            .map(|path| (path.clone(), "declared".to_owned()))
            .collect()
    };
    found.extend(of_maps("output", &outputs(one), &outputs(other)));
    if found.is_empty() {
        found.push(Difference {
            what: "command".to_owned(),
            one: Some("the same but for the order of its parts".to_owned()),
            other: None,
        });
    }
    found
}

/// What differs between what two lists begin and end with alike.
fn of_lists(kind: &str, one: &[String], other: &[String]) -> Vec<Difference> {
    let before = count_alike(one.iter().zip(other));
    let shorter = one.len().min(other.len());
    let after = count_alike(one.iter().rev().zip(other.iter().rev())).min(shorter - before);
    let [one, other] = [one, other].map(|list| list.get(before..list.len() - after).unwrap_or(&[]));
    (0..one.len().max(other.len()))
        .map(|place| Difference {
            what: format!("{kind} {}", before + place + 1),
            one: one.get(place).cloned(),
            other: other.get(place).cloned(),
        })
        .collect()
}

fn count_alike<'l>(pairs: impl Iterator<Item = (&'l String, &'l String)>) -> usize {
    pairs.take_while(|(one, other)| one == other).count()
}

/// Both input roots from the top, as far as they differ.
struct Walk<'a> {
    pages: &'a Pages,
    place: &'a Place,
    read: usize,
    found: Vec<Difference>,
    is_cut: bool,
}

/// What a name in a directory stands for.
fn entries(directory: &Directory) -> BTreeMap<String, (String, Option<reapi::Digest>)> {
    let text = |digest: &Option<reapi::Digest>| {
        let digest = digest.clone().unwrap_or_default();
        format!("{}-{}", digest.hash, digest.size_bytes)
    };
    let files = directory.files.iter().map(|file| {
        let kind = if file.is_executable {
            "program"
        } else {
            "file"
        };
        (
            file.name.clone(),
            (format!("{kind} {}", text(&file.digest)), None),
        )
    });
    let links = directory.symlinks.iter();
    let links = links.map(|link| {
        (
            link.name.clone(),
            (format!("link to {}", link.target), None),
        )
    });
    let directories = directory.directories.iter().map(|child| {
        let kind = format!("directory {}", text(&child.digest));
        (child.name.clone(), (kind, child.digest.clone()))
    });
    files.chain(links).chain(directories).collect()
}

impl Walk<'_> {
    async fn directory(&mut self, digest: &Digest) -> Option<Directory> {
        self.read += 1;
        read::message(self.pages, self.place, digest, "Directory")
            .await
            .ok()
    }

    async fn compare(&mut self, one: Digest, other: Digest) {
        let mut left = vec![(String::new(), one, other)];
        while let Some((path, one, other)) = left.pop() {
            if self.read + 2 > MOST_DIRECTORIES || self.found.len() > MOST_DIFFERENCES {
                self.is_cut = true;
                return;
            }
            let (Some(one), Some(other)) =
                (self.directory(&one).await, self.directory(&other).await)
            else {
                self.found.push(Difference {
                    what: format!("{path}/"),
                    one: Some("not in the storage on one side".to_owned()),
                    other: None,
                });
                continue;
            };
            let (one, other) = (entries(&one), entries(&other));
            let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            for name in names {
                let (here, there) = (one.get(name), other.get(name));
                if here == there {
                    continue;
                }
                let path = match path.is_empty() {
                    true => name.clone(),
                    false => format!("{path}/{name}"),
                };
                let digest = |side: Option<&(String, Option<reapi::Digest>)>| {
                    let digest = side?.1.as_ref()?;
                    Digest::parse(Some(self.place.function), digest).ok()
                };
                match (digest(here), digest(there)) {
                    (Some(here), Some(there)) => left.push((path, here, there)),
                    _ => self.found.push(Difference {
                        what: path,
                        one: here.map(|(text, _)| text.clone()),
                        other: there.map(|(text, _)| text.clone()),
                    }),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_differ_between_what_they_begin_and_end_with_alike() {
        let list = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let differ = |one: &str, other: &str| {
            let found = of_lists("argument", &list(one), &list(other));
            let texts = found.into_iter().map(|difference| {
                let side = |side: Option<String>| side.unwrap_or_else(|| "-".to_owned());
                format!(
                    "{} {} {}",
                    difference.what,
                    side(difference.one),
                    side(difference.other)
                )
            });
            texts.collect::<Vec<_>>().join("; ")
        };
        assert_eq!(differ("cc -O2 a.c", "cc -O3 a.c"), "argument 2 -O2 -O3");
        assert_eq!(differ("cc a.c", "cc -g a.c"), "argument 2 - -g");
        assert_eq!(differ("a a", "a a a"), "argument 3 - a");
        assert_eq!(differ("a b", "a b"), "");
    }

    #[test]
    fn a_digest_is_found_however_it_is_written() {
        let place = Place {
            instance: crate::instance::InstanceName::empty(),
            function: crate::digest::DigestFunction::Sha256,
        };
        let hash = "b".repeat(64);
        for text in [
            format!("{hash}-7"),
            format!(" {hash}/7 "),
            format!("http://farm/blobs/sha256/action/{hash}-7/"),
        ] {
            assert_eq!(find_digest(&place, &text).unwrap().size(), 7, "{text}");
        }
        assert_eq!(find_digest(&place, "nothing"), None);
    }
}
