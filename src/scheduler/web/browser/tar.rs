//! An input root as a tar archive (POSIX, pax interchange format), with a script that runs the command.
//!
//! 1. It is written piece by piece, as it is read: in memory are the directories between the root and what
//!    is written now, and a few pieces of content.
//! 2. Nothing is written of what would come to too much, or has a name that leads out of the archive's own
//!    directory (`expansion`). What fails later ends the archive without its end, so that it does not unpack.
//! 3. A reader that takes nothing gives way to those who wait (`archives`).

use std::{
    pin::pin,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use maud::{Markup, html};
use tokio::sync::mpsc;

use super::{
    Place,
    archives::Turn,
    command, expansion,
    read::{self, Problem, SMALL},
};
use crate::{
    digest::Digest,
    instance::InstanceName,
    path::Component,
    proto::reapi::{self, Action, Command, Directory},
    scheduler::web::Pages,
    storage::Backend,
};

/// Pieces between the storage and the connection, and bytes of one: so small that a slow reader is seen to
/// take them.
const PIECES: usize = 4;
const LARGEST_PIECE: usize = 64 << 10;
/// Bytes of paths of directories that outputs are to be in, each as often as an output is in it.
const MOST_PARENTS: usize = 16 << 20;
const BLOCK: usize = 512;

pub(super) fn link(place: &Place, digest: &Digest) -> Markup {
    html! {
        p {
            a href={ (place.address("action", digest)) "?format=tar" } { "Download to run it by hand" }
            " " span.quiet { "tar archive; then: tar xf …, and run.sh in it" }
        }
    }
}

/// The input root and the script.
pub(super) async fn of_action(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    caller: &str,
) -> Response {
    let action = read::message::<Action>(pages, place, digest, "Action").await;
    let action = match action {
        Ok(action) => action,
        Err(problem) => return problem.page(place, digest),
    };
    let parse = |digest: Option<&reapi::Digest>| {
        let parsed = Digest::parse_required(Some(place.function), digest);
        parsed.map_err(|error| Problem::Malformed {
            kind: "Action",
            error: error.to_string(),
        })
    };
    let digests = parse(action.command_digest.as_ref())
        .and_then(|command| Ok((command, parse(action.input_root_digest.as_ref())?)));
    let (command_digest, root) = match digests {
        Ok(digests) => digests,
        Err(problem) => return problem.page(place, digest),
    };
    let command = read::message::<Command>(pages, place, &command_digest, "Command").await;
    let command = match command {
        Ok(command) => command,
        Err(problem) => return problem.page(place, &command_digest),
    };
    let hash = digest.hash_hex();
    let top = format!("action-{}", hash.get(..12).unwrap_or_default());
    archive(pages, place, root, caller, &top, Some(command)).await
}

/// A directory and all below it.
pub(super) async fn of_directory(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
    caller: &str,
) -> Response {
    let hash = digest.hash_hex();
    let top = format!("directory-{}", hash.get(..12).unwrap_or_default());
    archive(pages, place, *digest, caller, &top, None).await
}

async fn archive(
    pages: &Pages,
    place: &Place,
    root: Digest,
    caller: &str,
    top: &str,
    command: Option<Command>,
) -> Response {
    let Some(turn) = pages.archives.turn(caller).await else {
        return Problem::Busy.page(place, &root);
    };
    if let Err(problem) = expansion::check(pages, place, &root).await {
        return problem.page(place, &root);
    }
    let (sender, receiver) = mpsc::channel(PIECES);
    let mut writer = Writer {
        storage: pages.storage.clone(),
        instance: place.instance.clone(),
        sender,
        taken: 0,
        turn,
    };
    let (name, directory) = (top.to_owned(), top.to_owned());
    let failure = Arc::new(OnceLock::new());
    let failed = failure.clone();
    tokio::spawn(async move {
        if let Err(error) = writer.write_all(&directory, root, command).await {
            tracing::debug!(error, "an archive was cut short");
            let _ = failed.set(error);
        }
    });
    let pieces = stream::unfold(receiver, move |mut receiver| {
        let failure = failure.clone();
        async move {
            let piece = match receiver.recv().await {
                Some(piece) => Ok(piece),
                // The connection ends without the end of the body, so that nobody takes it for whole.
                None => Err(std::io::Error::other(failure.get()?.clone())),
            };
            Some((piece, receiver))
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/x-tar".to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}.tar\""),
        ),
    ];
    (headers, Body::from_stream(pieces)).into_response()
}

struct Writer {
    storage: Backend,
    instance: InstanceName,
    sender: mpsc::Sender<Bytes>,
    /// Bytes that the reader has taken, but for the last pieces.
    taken: u64,
    turn: Turn,
}

/// What is still to be written of a directory.
struct OpenDirectory {
    path: String,
    left: Directory,
}

impl Writer {
    async fn send(&mut self, data: impl Into<Bytes>) -> Result<(), String> {
        let mut data = data.into();
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(LARGEST_PIECE));
            self.send_piece(piece).await?;
        }
        Ok(())
    }

    async fn send_piece(&mut self, piece: Bytes) -> Result<(), String> {
        const ROUND: Duration = Duration::from_secs(1);
        let (begun, length) = (Instant::now(), piece.len() as u64);
        let mut sending = pin!(self.sender.send(piece));
        loop {
            match tokio::time::timeout(ROUND, sending.as_mut()).await {
                Ok(Ok(())) => break,
                Ok(Err(_)) => return Err("its reader is gone".to_owned()),
                Err(_) if self.turn.is_over(self.taken, begun.elapsed()) => {
                    return Err("its reader took it too slowly, while others wait".to_owned());
                }
                Err(_) => {}
            }
        }
        self.taken += length;
        Ok(())
    }

    async fn entry(&mut self, entry: &TarEntry<'_>) -> Result<(), String> {
        self.send(entry.header()).await
    }

    async fn write_all(
        &mut self,
        top: &str,
        root: Digest,
        command: Option<Command>,
    ) -> Result<(), String> {
        self.entry(&TarEntry::directory(&format!("{top}/"))).await?;
        let mut path = top.to_owned();
        let mut extra = Vec::new();
        if let Some(command) = &command {
            let script = command::shell_script(command);
            let name = format!("{top}/run.sh");
            let size = script.len() as u64;
            self.entry(&TarEntry {
                path: &name,
                kind: Kind::File {
                    size,
                    is_executable: true,
                },
            })
            .await?;
            self.send(padded(script.into_bytes())).await?;
            path = format!("{top}/root");
            self.entry(&TarEntry::directory(&format!("{path}/")))
                .await?;
            // As a worker does: directories that outputs are to be in.
            extra = parents_of_outputs(command);
        }
        let root_path = path.clone();
        self.write_tree(path, root).await?;
        for directory in extra {
            self.entry(&TarEntry::directory(&format!("{root_path}/{directory}/")))
                .await?;
        }
        self.send(vec![0; 2 * BLOCK]).await
    }

    async fn read(&self, digest: &Digest) -> Result<Directory, String> {
        let read = self.storage.read(&self.instance, digest, SMALL).await;
        let data = read.map_err(|error| error.to_string())?;
        prost::Message::decode(data).map_err(|error| error.to_string())
    }

    async fn write_tree(&mut self, path: String, root: Digest) -> Result<(), String> {
        let function = root.function();
        let parse = |digest: Option<&reapi::Digest>| {
            Digest::parse_required(Some(function), digest).map_err(|error| error.to_string())
        };
        let mut open = vec![OpenDirectory {
            path,
            left: self.read(&root).await?,
        }];
        while let Some(top) = open.last_mut() {
            if let Some(file) = top.left.files.pop() {
                let path = below(&top.path, &file.name)?;
                let digest = parse(file.digest.as_ref())?;
                let kind = Kind::File {
                    size: digest.size(),
                    is_executable: file.is_executable,
                };
                self.entry(&TarEntry { path: &path, kind }).await?;
                self.copy(&digest).await?;
            } else if let Some(link) = top.left.symlinks.pop() {
                let path = below(&top.path, &link.name)?;
                self.entry(&TarEntry {
                    path: &path,
                    kind: Kind::Symlink(&link.target),
                })
                .await?;
            } else if let Some(directory) = top.left.directories.pop() {
                let path = below(&top.path, &directory.name)?;
                self.entry(&TarEntry::directory(&format!("{path}/")))
                    .await?;
                let left = self.read(&parse(directory.digest.as_ref())?).await?;
                open.push(OpenDirectory { path, left });
            } else {
                open.pop();
            }
        }
        Ok(())
    }

    async fn copy(&mut self, digest: &Digest) -> Result<(), String> {
        if digest.size() > 0 {
            let opened = self
                .storage
                .stream(&self.instance, digest, 0, digest.size());
            let mut pieces = opened.await.map_err(|error| error.to_string())?;
            while let Some(piece) = pieces.next().await {
                self.send(piece.map_err(|error| error.to_string())?).await?;
            }
        }
        let rest = usize::try_from(digest.size() % BLOCK as u64).unwrap_or_default();
        match rest {
            0 => Ok(()),
            rest => self.send(vec![0; BLOCK - rest]).await,
        }
    }
}

/// The path of an entry; an error for a name that is none.
fn below(path: &str, name: &str) -> Result<String, String> {
    let name = Component::parse(name).map_err(|error| error.to_string())?;
    Ok(format!("{path}/{}", name.as_str()))
}

/// Directories of declared outputs, as far as their paths stay below the root.
fn parents_of_outputs(command: &Command) -> Vec<String> {
    let mut found = std::collections::BTreeSet::new();
    let mut room = MOST_PARENTS;
    for output in command::declared_outputs(command) {
        let full = format!("{}/{output}", command.working_directory);
        let parts: Vec<&str> = full.split('/').filter(|part| !part.is_empty()).collect();
        let Some((_, parents)) = parts.split_last() else {
            continue;
        };
        if parents.iter().any(|part| Component::parse(part).is_err()) {
            continue;
        }
        let mut path = String::new();
        for parent in parents {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(parent);
            // Whoever declares more of them makes these by hand.
            let Some(left) = room.checked_sub(path.len()) else {
                return found.into_iter().collect();
            };
            room = left;
            found.insert(path.clone());
        }
    }
    found.into_iter().collect()
}

fn padded(mut data: Vec<u8>) -> Vec<u8> {
    data.resize(data.len().next_multiple_of(BLOCK), 0);
    data
}

enum Kind<'a> {
    File { size: u64, is_executable: bool },
    Directory,
    Symlink(&'a str),
}

struct TarEntry<'a> {
    path: &'a str,
    kind: Kind<'a>,
}

impl<'a> TarEntry<'a> {
    fn directory(path: &'a str) -> Self {
        TarEntry {
            path,
            kind: Kind::Directory,
        }
    }

    /// One block; a pax header comes before it, for what does not fit.
    fn header(&self) -> Vec<u8> {
        let (flag, mode, size, link) = match self.kind {
            Kind::File {
                size,
                is_executable,
            } => (b'0', if is_executable { 0o755 } else { 0o644 }, size, ""),
            Kind::Directory => (b'5', 0o755, 0, ""),
            Kind::Symlink(target) => (b'2', 0o777, 0, target),
        };
        let mut records = String::new();
        if self.path.len() > 100 || !self.path.is_ascii() {
            records.push_str(&record("path", self.path));
        }
        if link.len() > 100 || !link.is_ascii() {
            records.push_str(&record("linkpath", link));
        }
        if size >= 1 << 33 {
            records.push_str(&record("size", &size.to_string()));
        }
        let mut blocks = Vec::new();
        if !records.is_empty() {
            let length = records.len() as u64;
            blocks.extend(block(b"pax", b'x', 0o644, length, b""));
            blocks.extend(padded(records.into_bytes()));
        }
        blocks.extend(block(
            self.path.as_bytes(),
            flag,
            mode,
            size,
            link.as_bytes(),
        ));
        blocks
    }
}

/// A record of a pax header, whose length counts itself.
fn record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}")
}

fn block(path: &[u8], flag: u8, mode: u32, size: u64, link: &[u8]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    let mut put = |at: usize, text: &[u8]| {
        if let Some(place) = block.get_mut(at..at + text.len()) {
            place.copy_from_slice(text);
        }
    };
    put(0, path.get(..100).unwrap_or(path));
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", size & ((1 << 33) - 1)).as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[flag]);
    put(157, link.get(..100).unwrap_or(link));
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    if let Some(place) = block.get_mut(148..156) {
        place.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_itself() {
        assert_eq!(record("path", "x"), "9 path=x\n");
        let long = record("path", &"x".repeat(91));
        assert_eq!(long.len().to_string(), long.split(' ').next().unwrap());
        let longer = record("path", &"x".repeat(90));
        assert_eq!(longer.len().to_string(), longer.split(' ').next().unwrap());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for hostile in ["", ".", "..", "a/b", "/etc", "a\0b"] {
            assert!(below("top", hostile).is_err(), "{hostile:?}");
        }
        assert_eq!(below("top", "-rf ü"), Ok("top/-rf ü".to_owned()));
        let command = Command {
            working_directory: "w".to_owned(),
            output_paths: ["a/b", "../../x/y", "c"].map(str::to_owned).into(),
            ..Default::default()
        };
        assert_eq!(parents_of_outputs(&command), ["w", "w/a"]);
        let deep = Command {
            output_paths: vec!["a/".repeat(1_000_000) + "b"],
            ..Default::default()
        };
        let bytes: usize = parents_of_outputs(&deep).iter().map(String::len).sum();
        assert!(bytes <= MOST_PARENTS, "{bytes}");
    }

    #[test]
    fn tar_reads_what_was_written() {
        let long = format!("top/{}", "n".repeat(200));
        let mut archive = Vec::new();
        for (path, kind) in [
            ("top/", Kind::Directory),
            (
                long.as_str(),
                Kind::File {
                    size: 3,
                    is_executable: true,
                },
            ),
            ("top/ü", Kind::Symlink("../elsewhere")),
        ] {
            let is_file = matches!(kind, Kind::File { .. });
            archive.extend(TarEntry { path, kind }.header());
            if is_file {
                archive.extend(padded(b"abc".to_vec()));
            }
        }
        archive.extend(vec![0; 2 * BLOCK]);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.tar"), archive).unwrap();
        let unpacked = std::process::Command::new("tar")
            .args(["xf", "a.tar"])
            .current_dir(directory.path())
            .status()
            .unwrap();
        assert!(unpacked.success());
        assert_eq!(std::fs::read(directory.path().join(&long)).unwrap(), b"abc");
        let link = std::fs::read_link(directory.path().join("top/ü")).unwrap();
        assert_eq!(link.to_str(), Some("../elsewhere"));
    }
}
