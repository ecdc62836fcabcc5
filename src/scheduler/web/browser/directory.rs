//! Directories and Trees: what is in them, page by page.
//!
//! A directory that a Tree has is found by its path: at each step, among the children, by its digest.

use bytes::Bytes;
use maud::{Markup, html};
use prost::Message;

use super::{
    Place,
    fields::Fields,
    read::{self, LARGE, Problem},
};
use crate::{
    digest::{Digest, DigestFunction},
    proto::reapi::{self, DirectoryNode, FileNode, SymlinkNode},
    scheduler::web::{
        Pages,
        format::{count, encode, name, size},
        layout::{self, Page, Section},
    },
};

/// Entries of a page.
const ROWS: usize = 500;

/// Fields of a Directory (REAPI), and of a Tree.
const FILES: u32 = 1;
const DIRECTORIES: u32 = 2;
const SYMLINKS: u32 = 3;
const TREE_ROOT: u32 = 1;
const TREE_CHILDREN: u32 = 2;

/// Some entries of a directory, and how many there are.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub directories: Vec<DirectoryNode>,
    pub files: Vec<FileNode>,
    pub symlinks: Vec<SymlinkNode>,
    pub from: usize,
    pub total: usize,
    /// Of the files right in it.
    pub file_bytes: u64,
}

fn malformed(error: impl ToString) -> Problem {
    Problem::Malformed {
        kind: "Directory",
        error: error.to_string(),
    }
}

/// Entries of an encoded Directory, from one on: directories, files, symlinks.
fn list(message: &Bytes, from: usize, rows: usize) -> Result<Listing, Problem> {
    let mut listing = Listing {
        from,
        ..Listing::default()
    };
    for wanted in [DIRECTORIES, FILES, SYMLINKS] {
        for field in Fields::of(message.clone()) {
            let (number, data) = field.map_err(malformed)?;
            if number != wanted {
                continue;
            }
            let is_shown = (from..from + rows).contains(&listing.total);
            listing.total += 1;
            match number {
                FILES => {
                    // All of them are decoded, one at a time, for what they come to.
                    let node = FileNode::decode(data).map_err(malformed)?;
                    let bytes = node.digest.as_ref().map_or(0, |digest| digest.size_bytes);
                    listing.file_bytes += u64::try_from(bytes).unwrap_or_default();
                    if is_shown {
                        listing.files.push(node);
                    }
                }
                _ if !is_shown => {}
                DIRECTORIES => {
                    let node = DirectoryNode::decode(data).map_err(malformed)?;
                    listing.directories.push(node);
                }
                _ => listing
                    .symlinks
                    .push(SymlinkNode::decode(data).map_err(malformed)?),
            }
        }
    }
    Ok(listing)
}

/// Away from the threads that serve, as it may be a million entries.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let done = crate::daemon::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Problem::Failed(error.to_string())))
}

async fn read_large(pages: &Pages, place: &Place, digest: &Digest) -> Result<Bytes, Problem> {
    read::bytes(pages, place, digest, LARGE).await
}

/// Entries of a Directory.
pub(super) async fn entries(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    from: usize,
) -> Result<Listing, Problem> {
    let _permit = pages.large.acquire().await;
    let message = read_large(pages, place, digest).await?;
    blocking(move || list(&message, from, ROWS)).await
}

pub(super) async fn page(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    from: Option<&str>,
) -> Result<Page<'static>, Problem> {
    let from = from.and_then(|from| from.parse().ok()).unwrap_or(0);
    let listing = entries(pages, place, digest, from).await?;
    let own = place.address("directory", digest);
    let content = html! {
        h1 { "Directory" }
        p { a href={ (own) "?format=tar" } { "Download as a tar archive" } }
        (show(&listing, place, &own, |node| child_address(place, node)))
    };
    Ok(Page {
        section: Section::None,
        title: "Directory",
        is_live: false,
        content,
    })
}

fn parse(function: DigestFunction, digest: Option<&reapi::Digest>) -> Option<Digest> {
    Digest::parse_required(Some(function), digest).ok()
}

/// Of a directory that a Directory names; `None` when its digest is none.
fn child_address(place: &Place, node: &DirectoryNode) -> Option<String> {
    let digest = parse(place.function, node.digest.as_ref())?;
    Some(place.address("directory", &digest))
}

/// A table of entries, with links to further ones.
pub(super) fn show(
    listing: &Listing,
    place: &Place,
    own: &str,
    address: impl Fn(&DirectoryNode) -> Option<String>,
) -> Markup {
    let shown = listing.directories.len() + listing.files.len() + listing.symlinks.len();
    let end = listing.from + shown;
    html! {
        p.quiet {
            (count(listing.total as u64)) " entries, " (size(listing.file_bytes)) " in files right here"
            @if shown < listing.total && shown > 0 {
                "; from " (count(listing.from as u64 + 1)) " to " (count(end as u64))
            }
        }
        @if shown == 0 { p.empty { "Nothing is in it." } } @else {
            (layout::table("Entries", None, html! {
                th scope="col" { "Name" }
                th scope="col" { "Kind" }
                th.number scope="col" { "Size" }
            }, html! {
                @for node in &listing.directories {
                    tr {
                        th scope="row" {
                            @match address(node) {
                                Some(address) => a href=(address) { (name(&node.name)) "/" },
                                None => { (name(&node.name)) "/" }
                            }
                        }
                        td { "directory" }
                        td {}
                    }
                }
                @for node in &listing.files {
                    tr {
                        th scope="row" { (file_link(place, node)) }
                        td { @if node.is_executable { "program" } @else { "file" } }
                        td.number {
                            @let bytes = node.digest.as_ref().map_or(0, |digest| digest.size_bytes);
                            (size(u64::try_from(bytes).unwrap_or_default()))
                        }
                    }
                }
                @for node in &listing.symlinks {
                    tr {
                        th scope="row" { (name(&node.name)) }
                        td { "link to " code { (name(&node.target)) } }
                        td {}
                    }
                }
            }))
        }
        nav.pager aria-label="Further entries" {
            @if listing.from > 0 { a href=(own) { "First entries" } }
            @if end < listing.total && shown > 0 { a rel="next" href={ (own) "?from=" (end) } { "Next entries" } }
        }
    }
}

fn file_link(place: &Place, node: &FileNode) -> Markup {
    html! {
        @match parse(place.function, node.digest.as_ref()) {
            Some(digest) => a href={ (place.file_address(&digest, &node.name)) "?format=view" } { (name(&node.name)) },
            None => (name(&node.name))
        }
    }
}

/// The encoded directory of a path in an encoded Tree.
fn descend(tree: &Bytes, function: DigestFunction, path: &[String]) -> Result<Bytes, Problem> {
    let mut children = Vec::new();
    let mut root = None;
    for field in Fields::of(tree.clone()) {
        let (number, data) = field.map_err(|error| Problem::Malformed {
            kind: "Tree",
            error,
        })?;
        match number {
            TREE_ROOT => root = Some(data),
            TREE_CHILDREN => children.push(data),
            _ => {}
        }
    }
    let mut directory = root.ok_or_else(|| Problem::Malformed {
        kind: "Tree",
        error: "it has no root".to_owned(),
    })?;
    for component in path {
        let mut wanted = None;
        for field in Fields::of(directory.clone()) {
            let (number, data) = field.map_err(malformed)?;
            if number == DIRECTORIES {
                let node = DirectoryNode::decode(data).map_err(malformed)?;
                if node.name == *component {
                    wanted = parse(function, node.digest.as_ref());
                    break;
                }
            }
        }
        let wanted = wanted.ok_or(Problem::NoSuchPath)?;
        directory = children
            .iter()
            .find(|child| {
                child.len() as u64 == wanted.size() && function.digest_of(child) == wanted
            })
            .cloned()
            .ok_or(Problem::NoSuchPath)?;
    }
    Ok(directory)
}

pub(super) async fn tree(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    path: &[String],
    from: Option<&str>,
) -> Result<Page<'static>, Problem> {
    let from: usize = from.and_then(|from| from.parse().ok()).unwrap_or(0);
    let listing = {
        let _permit = pages.large.acquire().await;
        let message = read_large(pages, place, digest).await?;
        let (function, path) = (place.function, path.to_vec());
        blocking(move || {
            let directory = descend(&message, function, &path)?;
            list(&directory, from, ROWS)
        })
        .await?
    };
    let mut own = place.address("tree", digest);
    for component in path {
        own.push_str(&encode(component));
        own.push('/');
    }
    let content = html! {
        h1 { "Output directory" }
        p {
            @if path.is_empty() { "Its root" } @else {
                code { @for component in path { (name(component)) "/" } }
                " · " a href=(place.address("tree", digest)) { "Root" }
            }
        }
        (show(&listing, place, &own, |node| Some(format!("{own}{}/", encode(&node.name)))))
    };
    Ok(Page {
        section: Section::None,
        title: "Output directory",
        is_live: false,
        content,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::reapi::{Directory, Tree};

    fn node(name: &str, directory: &Directory) -> DirectoryNode {
        let digest = DigestFunction::Sha256.digest_of(&directory.encode_to_vec());
        DirectoryNode {
            name: name.to_owned(),
            digest: Some(digest.to_proto()),
        }
    }

    #[test]
    fn a_directory_of_a_tree_is_found_by_its_path() {
        let leaf = Directory {
            files: vec![FileNode {
                name: "f".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let middle = Directory {
            directories: vec![node("b", &leaf)],
            ..Default::default()
        };
        let root = Directory {
            directories: vec![node("a", &middle)],
            ..Default::default()
        };
        let tree = Tree {
            root: Some(root),
            children: vec![leaf, middle],
        };
        let data = Bytes::from(tree.encode_to_vec());
        let find = |path: &[&str]| {
            let path: Vec<String> = path.iter().map(|name| (*name).to_owned()).collect();
            descend(&data, DigestFunction::Sha256, &path)
                .and_then(|directory| list(&directory, 0, 10))
        };
        assert_eq!(find(&[]).unwrap().directories[0].name, "a");
        assert_eq!(find(&["a", "b"]).unwrap().files[0].name, "f");
        assert!(matches!(find(&["a", "x"]), Err(Problem::NoSuchPath)));
        let none = descend(
            &Bytes::from_static(b"\xff\xff"),
            DigestFunction::Sha256,
            &[],
        );
        assert!(matches!(none, Err(Problem::Malformed { .. })));
    }

    #[test]
    fn a_directory_of_a_million_entries_is_shown_in_part() {
        let files = (0..1_000_000).map(|number| FileNode {
            name: format!("{number:07}"),
            digest: Some(reapi::Digest {
                size_bytes: 2,
                ..Default::default()
            }),
            ..Default::default()
        });
        let directory = Directory {
            files: files.collect(),
            ..Default::default()
        };
        let listing = list(&directory.encode_to_vec().into(), 999_990, ROWS).unwrap();
        assert_eq!((listing.files.len(), listing.total), (10, 1_000_000));
        assert_eq!(listing.file_bytes, 2_000_000);
        assert_eq!(listing.files[0].name, "0999990");
    }
}
