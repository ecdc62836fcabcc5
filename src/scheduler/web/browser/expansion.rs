//! What a directory comes to when all that it names is written out. Few Directories that name one another
//! again and again come to more than any disk holds, so that this is counted before an archive is begun.
//!
//! 1. Each Directory is read once, however often it is named; what is kept of it is its counts, and which
//!    others it names.
//! 2. As soon as what was read comes to more than an archive may have, no more is read.

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;

use super::{
    Place,
    directory::blocking,
    read::{self, Problem, SMALL},
};
use crate::{
    digest::{Digest, DigestFunction},
    path::Component,
    proto::reapi::{self, Directory},
    scheduler::web::{Pages, format::size},
};

/// Entries of an archive.
const MOST_ENTRIES: u64 = 1_000_000;
/// Bytes of all files in it.
const MOST_BYTES: u64 = 256 << 30;
/// Directories within one another.
const DEEPEST: u32 = 250;
/// Directories that differ.
const MOST_DIRECTORIES: usize = 200_000;
/// Bytes of Directories that are read at a time.
const READ_AT_A_TIME: u64 = 16 << 20;

/// What one Directory has right in it.
#[derive(Default)]
struct DirectoryCounts {
    entries: u64,
    bytes: u64,
    /// Numbers of Directories; one that is named twice is here twice.
    directories: Vec<usize>,
}

/// What all below a Directory comes to.
#[derive(Clone, Copy, Default)]
struct Sum {
    entries: u64,
    bytes: u64,
    depth: u32,
}

/// All Directories below one, by numbers in the order in which they were found.
struct Expansion {
    function: DigestFunction,
    numbers: HashMap<Digest, usize>,
    counts: Vec<DirectoryCounts>,
    entries: u64,
}

/// Refuses a directory whose archive would have too much in it, or what leads out of it.
pub(super) async fn check(pages: &Pages, place: &Place, root: &Digest) -> Result<(), Problem> {
    let _permit = pages.large.acquire().await;
    let mut expansion = Expansion {
        function: root.function(),
        numbers: HashMap::from([(*root, 0)]),
        counts: Vec::new(),
        entries: 0,
    };
    let mut found = vec![*root];
    while !found.is_empty() {
        let mut bytes = 0;
        let fits = |digest: &&Digest| {
            bytes += digest.size();
            bytes <= READ_AT_A_TIME
        };
        let count = found.iter().take_while(fits).count().max(1);
        let rest = found.split_off(count.min(found.len()));
        let messages = read::many(pages, place, &found, SMALL).await?;
        let new;
        (expansion, new) = blocking(move || {
            let new = expansion.add_all(&messages)?;
            Ok((expansion, new))
        })
        .await?;
        found = rest;
        found.extend(new);
    }
    blocking(move || expansion.sum().check()).await
}

fn malformed(error: impl ToString) -> Problem {
    Problem::Malformed {
        kind: "Directory",
        error: error.to_string(),
    }
}

fn too_many_entries() -> Problem {
    Problem::NoArchive(format!(
        "all that it names comes to more than {MOST_ENTRIES} files and directories"
    ))
}

impl Expansion {
    /// Takes the Directories that come next by number; the digests of those that they name first.
    fn add_all(&mut self, messages: &[Bytes]) -> Result<Vec<Digest>, Problem> {
        let mut new = Vec::new();
        for message in messages {
            let directory = Directory::decode(message.clone()).map_err(malformed)?;
            self.add(&directory, &mut new)?;
        }
        Ok(new)
    }

    fn add(&mut self, directory: &Directory, new: &mut Vec<Digest>) -> Result<(), Problem> {
        let function = self.function;
        let parse = |digest: Option<&reapi::Digest>| {
            Digest::parse_required(Some(function), digest).map_err(malformed)
        };
        let names = directory.files.iter().map(|node| &node.name);
        let names = names.chain(directory.directories.iter().map(|node| &node.name));
        for name in names.chain(directory.symlinks.iter().map(|node| &node.name)) {
            Component::parse(name).map_err(malformed)?;
        }
        let mut counts = DirectoryCounts::default();
        let own = directory.files.len() + directory.directories.len() + directory.symlinks.len();
        counts.entries = own as u64;
        for file in &directory.files {
            let size = parse(file.digest.as_ref())?.size();
            counts.bytes = counts.bytes.saturating_add(size);
        }
        for child in &directory.directories {
            let digest = parse(child.digest.as_ref())?;
            let next = self.numbers.len();
            let number = *self.numbers.entry(digest).or_insert_with(|| {
                new.push(digest);
                next
            });
            counts.directories.push(number);
        }
        self.counts.push(counts);
        // Each of them is in the archive once at least.
        self.entries += own as u64;
        if self.entries > MOST_ENTRIES {
            return Err(too_many_entries());
        }
        if self.numbers.len() > MOST_DIRECTORIES {
            return Err(Problem::NoArchive(format!(
                "it has more than {MOST_DIRECTORIES} directories that differ"
            )));
        }
        Ok(())
    }

    /// What the first one comes to. Directories that are within themselves, which no digest allows, come to too
    /// much.
    fn sum(&self) -> Sum {
        let mut sums: Vec<Option<Sum>> = vec![None; self.counts.len()];
        // Directories within one another, and how many of their own were looked at.
        let mut path = vec![(0, 0)];
        while let Some((number, looked_at)) = path.last_mut() {
            let Some(counts) = self.counts.get(*number) else {
                break;
            };
            if let Some(child) = counts.directories.get(*looked_at) {
                *looked_at += 1;
                if sums.get(*child).is_some_and(Option::is_none) {
                    if path.len() > DEEPEST as usize {
                        return Sum {
                            depth: u32::MAX,
                            ..Sum::default()
                        };
                    }
                    path.push((*child, 0));
                }
                continue;
            }
            let mut sum = Sum {
                entries: counts.entries,
                bytes: counts.bytes,
                depth: 1,
            };
            for child in &counts.directories {
                let of_child = sums.get(*child).copied().flatten().unwrap_or_default();
                sum.entries = sum.entries.saturating_add(of_child.entries);
                sum.bytes = sum.bytes.saturating_add(of_child.bytes);
                sum.depth = sum.depth.max(of_child.depth + 1);
            }
            if let Some(place) = sums.get_mut(*number) {
                *place = Some(sum);
            }
            path.pop();
        }
        sums.first().copied().flatten().unwrap_or_default()
    }
}

impl Sum {
    fn check(self) -> Result<(), Problem> {
        let refused = |text: String| Err(Problem::NoArchive(text));
        if self.depth > DEEPEST {
            return refused(format!(
                "it has more than {DEEPEST} directories within one another"
            ));
        }
        if self.entries > MOST_ENTRIES {
            return Err(too_many_entries());
        }
        if self.bytes > MOST_BYTES {
            return refused(format!(
                "its files come to {}, of at most {}",
                size(self.bytes),
                size(MOST_BYTES)
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::reapi::{DirectoryNode, FileNode};

    fn digest(message: &Directory) -> reapi::Digest {
        let digest = DigestFunction::Sha256.digest_of(&message.encode_to_vec());
        digest.to_proto()
    }

    fn naming(child: &Directory, times: usize) -> Directory {
        let directories = (0..times).map(|number| DirectoryNode {
            name: format!("d{number}"),
            digest: Some(digest(child)),
        });
        Directory {
            directories: directories.collect(),
            ..Default::default()
        }
    }

    /// What a chain of directories comes to, each of which names the one before it.
    fn sum(mut chain: Vec<Directory>) -> Sum {
        chain.reverse();
        let root = DigestFunction::Sha256.digest_of(&chain[0].encode_to_vec());
        let mut expansion = Expansion {
            function: DigestFunction::Sha256,
            numbers: HashMap::from([(root, 0)]),
            counts: Vec::new(),
            entries: 0,
        };
        for directory in &chain {
            let message = Bytes::from(directory.encode_to_vec());
            expansion.add_all(&[message]).unwrap();
        }
        expansion.sum()
    }

    #[test]
    fn few_directories_that_come_to_a_million_millions_are_counted_without_being_written() {
        let mut chain = vec![Directory {
            files: vec![FileNode {
                name: "f".to_owned(),
                digest: Some(reapi::Digest {
                    hash: "0".repeat(64),
                    size_bytes: 1 << 30,
                }),
                ..Default::default()
            }],
            ..Default::default()
        }];
        let small = sum(chain.clone());
        assert_eq!((small.entries, small.bytes, small.depth), (1, 1 << 30, 1));
        for times in [10, 10, 10] {
            chain.push(naming(chain.last().unwrap(), times));
        }
        let middle = sum(chain.clone());
        assert_eq!(middle.entries, 10 + 100 + 1000 + 1000);
        assert_eq!((middle.bytes, middle.depth), (1000 << 30, 4));
        assert!(
            matches!(middle.check(), Err(Problem::NoArchive(text)) if text.contains("TiB") || text.contains("GiB"))
        );
        for _ in 0..9 {
            chain.push(naming(chain.last().unwrap(), 10));
        }
        let large = sum(chain.clone());
        assert!(large.entries > 1_000_000_000_000);
        assert!(matches!(large.check(), Err(Problem::NoArchive(text)) if text.contains("1000000")));
        for _ in 0..260 {
            chain.push(naming(chain.last().unwrap(), 1));
        }
        assert!(
            matches!(sum(chain).check(), Err(Problem::NoArchive(text)) if text.contains("250"))
        );
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        let mut expansion = Expansion {
            function: DigestFunction::Sha256,
            numbers: HashMap::new(),
            counts: Vec::new(),
            entries: 0,
        };
        for name in ["..", "", "a/b", "/etc"] {
            let directory = Directory {
                symlinks: vec![reapi::SymlinkNode {
                    name: name.to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            };
            let added = expansion.add(&directory, &mut Vec::new());
            assert!(matches!(added, Err(Problem::Malformed { .. })), "{name}");
        }
    }
}
