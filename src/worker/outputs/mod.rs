//! Outputs: what a command left at the places that it declared.
//!
//! Runs after the last process of the action is gone, so nothing changes under it. What it finds
//! is hostile all the same: links, FIFOs, depth, names, sizes, numbers.
//!
//! 1. Nothing outside of the root is read (`beneath`).
//! 2. The first fault is kept, and the rest collected nevertheless, unless a bound is reached
//!    (`bounds`).
//! 3. Blobs leave in batches of bounded size while collecting goes on.
//! 4. Each inode is read once; small files are uploaded from memory, large ones that lie together are
//!    hashed by several threads (`files`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd},
};

use prost::Message;
use rustix::{
    fs::{AtFlags, FileType},
    io::Errno,
};
use tokio_util::sync::CancellationToken;

use self::{
    bounds::Bounds,
    files::{InodeId, OpenedOutput},
};
use super::{
    beneath,
    command::{Command, Output, OutputKind},
    fault::Fault,
    inputs::file_cache::FileCache,
};
use crate::{
    digest::{Digest, DigestFunction},
    proto::reapi,
    storage::Content,
    text::shorten,
};

mod bounds;
mod directory;
mod files;
mod hashing;

pub use bounds::{OutputLimits, ReadDeadline, late};

pub type Blobs = Vec<(Digest, Content)>;

/// What goes into the ActionResult.
#[derive(Default)]
pub struct CollectedOutputs {
    pub files: Vec<reapi::OutputFile>,
    pub directories: Vec<reapi::OutputDirectory>,
    pub symlinks: Vec<reapi::OutputSymlink>,
    /// The same ones again, each in one of two lists, for clients of REAPI 2.0.
    pub file_symlinks: Vec<reapi::OutputSymlink>,
    pub directory_symlinks: Vec<reapi::OutputSymlink>,
    pub stdout: Option<Digest>,
    pub stderr: Option<Digest>,
    pub server_logs: BTreeMap<String, reapi::LogFile>,
    /// The first one.
    pub fault: Option<Fault>,
    /// Something was made by root or by the worker's own user, so that the action could have changed
    /// anything.
    pub by_a_privileged_user: bool,
    /// Inode numbers of files that were the action's, and may be the worker's now.
    pub taken_over: Vec<u64>,
}

/// Reads outputs, and hands blobs to `send` in batches.
pub struct Collector<'a, S> {
    function: DigestFunction,
    cache: &'a FileCache,
    /// Of output directories, store each Directory as a blob too.
    store_directories: bool,
    bounds: Bounds<'a>,
    send: S,
    found: CollectedOutputs,
    batch: Blobs,
    batch_bytes: usize,
    batch_files: usize,
    sent: HashSet<Digest>,
    buffer: Vec<u8>,
    /// Whether one output is, or lies in, another.
    overlapping: bool,
    /// Digests of files that may be met again, and whether they are executable.
    read: HashMap<InodeId, (Digest, bool)>,
    /// Large files that are open and hashed already.
    ahead: HashMap<InodeId, (OpenedOutput, Digest)>,
}

impl<'a, S: FnMut(Blobs)> Collector<'a, S> {
    pub fn new(
        function: DigestFunction,
        cache: &'a FileCache,
        store_directories: bool,
        limits: OutputLimits,
        cancel: &'a CancellationToken,
        send: S,
    ) -> Self {
        Collector {
            function,
            cache,
            store_directories,
            bounds: Bounds::new(limits, cancel),
            send,
            found: CollectedOutputs::default(),
            batch: Vec::new(),
            batch_bytes: 0,
            batch_files: 0,
            sent: HashSet::new(),
            buffer: Vec::new(),
            overlapping: false,
            read: HashMap::new(),
            ahead: HashMap::new(),
        }
    }

    /// The action's directory has `stdout`, `stderr` and `server_logs`; `root` is the input root.
    pub fn collect(
        mut self,
        action_directory: BorrowedFd<'_>,
        root: BorrowedFd<'_>,
        command: &Command,
    ) -> CollectedOutputs {
        self.found.stdout = self.log(action_directory, "stdout");
        self.found.stderr = self.log(action_directory, "stderr");
        self.overlapping = command.outputs_overlap();
        self.hash_outputs_ahead(root, &command.outputs);
        for output in &command.outputs {
            if self.bounds.are_exceeded() {
                break;
            }
            if let Err(fault) = self.output(root, output) {
                self.fail(fault);
            }
        }
        self.server_logs(action_directory);
        if !self.batch.is_empty() {
            (self.send)(std::mem::take(&mut self.batch));
        }
        self.found
    }

    fn fail(&mut self, fault: Fault) {
        self.found.fault.get_or_insert(fault);
    }

    fn log(&mut self, action_directory: BorrowedFd<'_>, name: &str) -> Option<Digest> {
        let (file, stat) = match beneath::open_file(action_directory, name) {
            Ok(opened) => opened,
            // The command was not started.
            Err(Errno::NOENT) => return None,
            Err(error) => {
                self.fail(Fault::of_disk(format!("read {name} of the command"), error));
                return None;
            }
        };
        if stat.st_size == 0 {
            return None;
        }
        match self.log_file(file, &stat, name) {
            Ok(digest) => Some(digest),
            Err(fault) => {
                self.fail(fault);
                None
            }
        }
    }

    fn output(&mut self, root: BorrowedFd<'_>, output: &Output) -> Result<(), Fault> {
        let text = shorten(&output.text);
        let unreadable = |error: Errno| unreadable(&text, error);
        let wrong = |is: &str, declared: &str| {
            Fault::Precondition(format!(
                "the command made output {text:?} a {is}, but the client declared it as a {declared}"
            ))
        };
        let Some((parent_path, name)) = output.path.split_last() else {
            if output.kind == OutputKind::File {
                return Err(wrong("directory", "file"));
            }
            let directory = beneath::open_listing(root, ".").map_err(unreadable)?;
            return self.output_directory(output, directory);
        };
        let parent = match beneath::open_directory(root, &parent_path) {
            Ok(parent) => parent,
            Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(Fault::Invalid(format!(
                    "output {text:?} cannot be read: the command replaced a directory on the way to it by something else"
                )));
            }
            Err(error) => return Err(unreadable(error)),
        };
        let stat = match rustix::fs::statat(&parent, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // An output that was not made is not listed (REAPI: ActionResult.output_files).
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(unreadable(error)),
        };
        match (FileType::from_raw_mode(stat.st_mode), output.kind) {
            (FileType::RegularFile, OutputKind::Directory) => Err(wrong("file", "directory")),
            (FileType::Directory, OutputKind::File) => Err(wrong("directory", "file")),
            (FileType::RegularFile, _) => {
                let (digest, executable) = self.file(parent.as_fd(), name.as_str(), &text)?;
                let found = reapi::OutputFile {
                    path: output.text.clone(),
                    digest: Some(digest.to_proto()),
                    is_executable: executable,
                    ..Default::default()
                };
                self.bounds.add_to_lists(found.encoded_len())?;
                self.found.files.push(found);
                Ok(())
            }
            (FileType::Directory, _) => {
                let directory =
                    beneath::open_listing(parent.as_fd(), name.as_str()).map_err(unreadable)?;
                self.output_directory(output, directory)
            }
            (FileType::Symlink, kind) => {
                let symlink = reapi::OutputSymlink {
                    path: output.text.clone(),
                    target: read_link(parent.as_fd(), name.as_str(), &text)?,
                    node_properties: None,
                };
                self.bounds.add_to_lists(2 * symlink.encoded_len() + 6)?;
                // Clients of REAPI 2.0 read only these (REAPI: ActionResult.output_symlinks).
                let to_directory = match kind {
                    OutputKind::File => false,
                    OutputKind::Directory => true,
                    OutputKind::Any => {
                        let place = parent_path.join(name.clone());
                        beneath::leads_to_directory(root, &place)
                    }
                };
                match to_directory {
                    true => self.found.directory_symlinks.push(symlink.clone()),
                    false => self.found.file_symlinks.push(symlink.clone()),
                }
                self.found.symlinks.push(symlink);
                Ok(())
            }
            _ => Err(Fault::Invalid(format!(
                "output {text:?} is neither a file, nor a directory, nor a symbolic link"
            ))),
        }
    }

    /// Every regular file beneath `server_logs`, by its path there.
    fn server_logs(&mut self, action_directory: BorrowedFd<'_>) {
        const DIRECTORY: &str = "server_logs";
        let Ok(logs) = beneath::open_listing(action_directory, DIRECTORY) else {
            return;
        };
        let mut rest = vec![(".".to_owned(), 0)];
        while let Some((path, depth)) = rest.pop() {
            if self.bounds.are_exceeded() {
                return;
            }
            let entries = beneath::open_listing(logs.as_fd(), &path)
                .map_err(|error| unreadable(DIRECTORY, error))
                .and_then(|directory| Ok((self.list(&directory, DIRECTORY)?, directory)));
            let (entries, directory) = match entries {
                Ok(entries) => entries,
                Err(fault) => {
                    self.fail(fault);
                    continue;
                }
            };
            for (name, kind) in entries {
                let path = match path.as_str() {
                    "." => name.clone(),
                    path => format!("{path}/{name}"),
                };
                match kind {
                    // What is deeper is no log of a server.
                    FileType::Directory if depth < 15 => rest.push((path, depth + 1)),
                    FileType::RegularFile => {
                        if let Err(fault) = self.server_log(directory.as_fd(), &name, path) {
                            self.fail(fault);
                            if self.bounds.are_exceeded() {
                                return;
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn server_log(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
        path: String,
    ) -> Result<(), Fault> {
        let (file, stat) =
            beneath::open_file(directory, name).map_err(|error| unreadable(&path, error))?;
        let digest = self.log_file(file, &stat, &path)?;
        let log = reapi::LogFile {
            digest: Some(digest.to_proto()),
            human_readable: false,
        };
        self.bounds
            .add_to_lists(path.len() + log.encoded_len() + 12)?;
        self.found.server_logs.insert(path, log);
        Ok(())
    }
}

fn unreadable(output: &str, error: Errno) -> Fault {
    match error {
        Errno::ACCESS | Errno::PERM => Fault::Precondition(format!(
            "could not read output {output:?}: {error}; the command must leave it readable, or the worker needs CAP_DAC_READ_SEARCH"
        )),
        error => Fault::of_disk(format!("read output {output:?}"), error),
    }
}

fn read_link(directory: BorrowedFd<'_>, name: &str, text: &str) -> Result<String, Fault> {
    let target = rustix::fs::readlinkat(directory, name, Vec::new())
        .map_err(|error| unreadable(text, error))?;
    target.into_string().map_err(|target| {
        Fault::Invalid(format!(
            "output {text:?} is a symbolic link to a path that is not UTF-8: {:?}",
            target.into_cstring()
        ))
    })
}
