//! Outputs: what a command left at the places that it declared.
//!
//! Runs after the last process of the action is gone, so nothing changes under it. What it finds
//! is hostile all the same: links, FIFOs, depth, names.
//!
//! 1. Nothing outside of the root is read (`beneath`).
//! 2. The first fault is kept, and the rest collected nevertheless.
//! 3. Blobs leave in batches of bounded size while collecting goes on.
//! 4. Each file is read once; small ones are uploaded from memory, large ones that lie together are
//!    hashed by several threads.
//!
//! Long, since all of it reads one hostile directory into one result and one batch.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;
use rustix::{
    fs::{AtFlags, Dir, FileType, Stat},
    io::Errno,
};
use tokio_util::sync::CancellationToken;

use super::{
    beneath,
    cache::{self, Cache, Key},
    command::{Command, Output, OutputKind},
    directories::{MAXIMUM_DEPTH, MAXIMUM_ENTRIES},
    fault::Fault,
    hashing,
};
use crate::{
    digest::{Digest, DigestFunction, shorten},
    proto::reapi,
    storage::Content,
};

/// Two files of this size are worth a thread.
const LARGE: i64 = 4 << 20;
/// Of one batch.
const BATCH_BYTES: usize = 8 << 20;
const BATCH_FILES: usize = 64;

pub type Blobs = Vec<(Digest, Content)>;

/// What goes into the ActionResult.
#[derive(Default)]
pub struct Found {
    pub files: Vec<reapi::OutputFile>,
    pub directories: Vec<reapi::OutputDirectory>,
    pub symlinks: Vec<reapi::OutputSymlink>,
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
    pub function: DigestFunction,
    pub cache: &'a Cache,
    /// Of output directories, store each Directory as a blob too.
    pub store_directories: bool,
    pub cancel: &'a CancellationToken,
    pub send: S,
    pub found: Found,
    batch: Blobs,
    batch_bytes: usize,
    batch_files: usize,
    sent: HashSet<Digest>,
    entries: u64,
    buffer: Vec<u8>,
    /// Large files that are open and, but for errors, hashed already; by device and inode number.
    ahead: HashMap<(u64, u64), (Opened, Option<Digest>)>,
}

/// A regular file, before it is read.
struct Opened {
    file: Arc<File>,
    executable: bool,
    /// Nobody can make it differ from its digest any more.
    sealed: bool,
}

/// One level of an output directory.
struct Level {
    directory: OwnedFd,
    /// In the level above.
    name: String,
    /// Directories yet to enter, the first name last.
    rest: Vec<String>,
    message: reapi::Directory,
}

impl<'a, S: FnMut(Blobs)> Collector<'a, S> {
    pub fn new(
        function: DigestFunction,
        cache: &'a Cache,
        store_directories: bool,
        cancel: &'a CancellationToken,
        send: S,
    ) -> Self {
        Collector {
            function,
            cache,
            store_directories,
            cancel,
            send,
            found: Found::default(),
            batch: Vec::new(),
            batch_bytes: 0,
            batch_files: 0,
            sent: HashSet::new(),
            entries: 0,
            buffer: Vec::new(),
            ahead: HashMap::new(),
        }
    }

    /// `gate` has `stdout`, `stderr` and `server_logs`; `root` is the input root.
    pub fn collect(
        mut self,
        gate: BorrowedFd<'_>,
        root: BorrowedFd<'_>,
        command: &Command,
    ) -> Found {
        self.found.stdout = self.log(gate, "stdout");
        self.found.stderr = self.log(gate, "stderr");
        self.hash_outputs_ahead(root, &command.outputs);
        for output in &command.outputs {
            if let Err(fault) = self.output(root, output, command.reports_in_old_lists) {
                self.fail(fault);
            }
        }
        self.server_logs(gate);
        if !self.batch.is_empty() {
            (self.send)(std::mem::take(&mut self.batch));
        }
        self.found
    }

    fn fail(&mut self, fault: Fault) {
        self.found.fault.get_or_insert(fault);
    }

    fn log(&mut self, gate: BorrowedFd<'_>, name: &str) -> Option<Digest> {
        let (file, stat) = match beneath::open_file(gate, name) {
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
        match self.digest(&Arc::new(file)) {
            Ok(digest) => Some(digest),
            Err(fault) => {
                self.fail(fault);
                None
            }
        }
    }

    fn output(
        &mut self,
        root: BorrowedFd<'_>,
        output: &Output,
        old_lists: bool,
    ) -> Result<(), Fault> {
        let text = shorten(&output.text);
        let unreadable = |error: Errno| unreadable(&text, error);
        let wrong = |is: &str, declared: &str| {
            Fault::Precondition(format!(
                "the command made output {text:?} a {is}, but the client declared it as a {declared}"
            ))
        };
        let Some((parent, name)) = output.path.split_last() else {
            if output.kind == OutputKind::File {
                return Err(wrong("directory", "file"));
            }
            let directory = beneath::open_listing(root, ".").map_err(unreadable)?;
            return self.output_directory(output, directory);
        };
        let parent = match beneath::open_directory(root, &parent) {
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
                self.found.files.push(reapi::OutputFile {
                    path: output.text.clone(),
                    digest: Some(digest.to_proto()),
                    is_executable: executable,
                    ..Default::default()
                });
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
                match (old_lists, kind) {
                    (true, OutputKind::File) => self.found.file_symlinks.push(symlink.clone()),
                    (true, OutputKind::Directory) => {
                        self.found.directory_symlinks.push(symlink.clone());
                    }
                    _ => {}
                }
                self.found.symlinks.push(symlink);
                Ok(())
            }
            _ => Err(Fault::Invalid(format!(
                "output {text:?} is neither a file, nor a directory, nor a symbolic link"
            ))),
        }
    }

    fn output_directory(&mut self, output: &Output, directory: OwnedFd) -> Result<(), Fault> {
        let (tree, root) = self.tree(directory, &shorten(&output.text))?;
        let tree = Bytes::from(tree.encode_to_vec());
        let tree_digest = self.function.digest_of(&tree);
        self.add(tree_digest, Content::Bytes(tree));
        self.found.directories.push(reapi::OutputDirectory {
            path: output.text.clone(),
            tree_digest: Some(tree_digest.to_proto()),
            is_topologically_sorted: true,
            root_directory_digest: self.store_directories.then(|| root.to_proto()),
        });
        Ok(())
    }

    /// A directory as a Tree, root and parents first, each distinct Directory once; and the digest
    /// of its root. Not recursive: depth is the command's.
    fn tree(&mut self, directory: OwnedFd, output: &str) -> Result<(reapi::Tree, Digest), Fault> {
        let mut seen = HashSet::new();
        // In the order in which they were finished: children before their parents.
        let mut finished = Vec::new();
        let mut level = self.enter(directory, String::new(), output)?;
        let mut above: Vec<Level> = Vec::new();
        loop {
            if let Some(name) = level.rest.pop() {
                let opened = match above.len() as u32 >= MAXIMUM_DEPTH {
                    true => Err(Fault::Invalid(format!(
                        "output directory {output:?} has more than {MAXIMUM_DEPTH} directories below one another"
                    ))),
                    false => beneath::open_listing(level.directory.as_fd(), &name)
                        .map_err(|error| unreadable(&format!("{output}/…/{name}"), error)),
                };
                match opened.and_then(|directory| self.enter(directory, name, output)) {
                    Ok(entered) => above.push(std::mem::replace(&mut level, entered)),
                    Err(fault) => self.fail(fault),
                }
                continue;
            }
            let data = Bytes::from(level.message.encode_to_vec());
            let digest = self.function.digest_of(&data);
            if self.store_directories {
                self.add(digest, Content::Bytes(data));
            }
            let Some(mut parent) = above.pop() else {
                finished.reverse();
                let tree = reapi::Tree {
                    root: Some(level.message),
                    children: finished,
                };
                return Ok((tree, digest));
            };
            parent.message.directories.push(reapi::DirectoryNode {
                name: level.name,
                digest: Some(digest.to_proto()),
            });
            if seen.insert(digest) {
                finished.push(level.message);
            }
            level = parent;
        }
    }

    /// Everything of one directory but the directories in it.
    fn enter(&mut self, directory: OwnedFd, name: String, output: &str) -> Result<Level, Fault> {
        let mut files = Vec::new();
        let mut symlinks = Vec::new();
        let mut rest = Vec::new();
        for (name, kind) in self.list(&directory, output)? {
            match kind {
                FileType::RegularFile => files.push(name),
                FileType::Symlink => symlinks.push(name),
                FileType::Directory => rest.push(name),
                // Sockets, FIFOs and devices are no outputs.
                _ => {}
            }
        }
        files.sort_unstable();
        symlinks.sort_unstable();
        rest.sort_unstable_by(|a, b| b.cmp(a));
        let places = files.iter().map(|name| (directory.as_fd(), name.as_str()));
        self.hash_ahead(places.collect());
        let mut message = reapi::Directory::default();
        for name in files {
            match self.file(directory.as_fd(), &name, &format!("{output}/…/{name}")) {
                Ok((digest, is_executable)) => message.files.push(reapi::FileNode {
                    name,
                    digest: Some(digest.to_proto()),
                    is_executable,
                    node_properties: None,
                }),
                Err(Fault::Cancelled) => return Err(Fault::Cancelled),
                Err(fault) => self.fail(fault),
            }
        }
        for name in symlinks {
            match read_link(directory.as_fd(), &name, &format!("{output}/…/{name}")) {
                Ok(target) => message.symlinks.push(reapi::SymlinkNode {
                    name,
                    target,
                    node_properties: None,
                }),
                Err(fault) => self.fail(fault),
            }
        }
        Ok(Level {
            directory,
            name,
            rest,
            message,
        })
    }

    /// The entries of a directory, with their types.
    fn list(
        &mut self,
        directory: &OwnedFd,
        output: &str,
    ) -> Result<Vec<(String, FileType)>, Fault> {
        let mut names = Vec::new();
        let read = |error: Errno| unreadable(output, error);
        let mut entries = Dir::read_from(directory).map_err(read)?;
        while let Some(entry) = entries.read() {
            let entry = entry.map_err(read)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.entries += 1;
            if self.entries > MAXIMUM_ENTRIES {
                return Err(Fault::Invalid(format!(
                    "the outputs have more than {MAXIMUM_ENTRIES} files, directories and symbolic links"
                )));
            }
            let Ok(name) = name.to_str() else {
                self.fail(Fault::Invalid(format!(
                    "output directory {output:?} has an entry whose name is not UTF-8: {:?}",
                    name.to_string_lossy()
                )));
                continue;
            };
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
                    FileType::from_raw_mode(stat.map_err(read)?.st_mode)
                }
                kind => kind,
            };
            names.push((name.to_owned(), kind));
        }
        Ok(names)
    }

    /// A regular file: its digest, and whether anybody may execute it. It stays in the cache.
    fn file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
        text: &str,
    ) -> Result<(Digest, bool), Fault> {
        let (opened, hashed) = match self.take_ahead(directory, name) {
            Some(ahead) => ahead,
            None => {
                let opened = self.open(directory, name);
                (opened.map_err(|error| unreadable(text, error))?, None)
            }
        };
        let digest = match hashed {
            Some(digest) => {
                self.add(digest, Content::File(opened.file.clone()));
                digest
            }
            None => self.digest(&opened.file)?,
        };
        let Opened {
            file,
            executable,
            sealed,
        } = opened;
        let key = Key { digest, executable };
        self.cache.keep_output(key, &file, sealed, directory, name);
        Ok((digest, executable))
    }

    /// Opens a regular file, and takes it from the action before it is read.
    fn open(&mut self, directory: BorrowedFd<'_>, name: &str) -> Result<Opened, Errno> {
        let (file, stat) = beneath::open_file(directory, name)?;
        let executable = is_executable(&stat);
        // An input that is declared as an output is as the worker made it.
        let worker = rustix::process::geteuid().as_raw();
        if (stat.st_uid == worker || stat.st_uid == 0) && !cache::is_the_workers(&stat) {
            self.found.by_a_privileged_user = true;
        }
        if stat.st_uid != worker {
            self.found.taken_over.push(stat.st_ino);
        }
        Ok(Opened {
            sealed: cache::seal(&file, executable),
            file: Arc::new(file),
            executable,
        })
    }

    fn take_ahead(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Option<(Opened, Option<Digest>)> {
        if self.ahead.is_empty() {
            return None;
        }
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        self.ahead.remove(&(stat.st_dev, stat.st_ino))
    }

    fn hash_outputs_ahead(&mut self, root: BorrowedFd<'_>, outputs: &[Output]) {
        if outputs.len() < 2 {
            return;
        }
        let parents: Vec<(OwnedFd, &str)> = outputs
            .iter()
            .filter(|output| output.kind != OutputKind::Directory)
            .take(BATCH_FILES)
            .filter_map(|output| {
                let path = output.path.components();
                let (parent, _) = output.path.split_last()?;
                let parent = beneath::open_directory(root, &parent).ok()?;
                Some((parent, path.last()?.as_str()))
            })
            .collect();
        let places = parents.iter().map(|(parent, name)| (parent.as_fd(), *name));
        self.hash_ahead(places.collect());
    }

    /// Hashes those that are large, if there are several. What cannot be read is for later to tell.
    fn hash_ahead(&mut self, places: Vec<(BorrowedFd<'_>, &str)>) {
        if places.len() < 2 {
            return;
        }
        let mut large = Vec::new();
        for (directory, name) in places {
            let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            if let Ok(stat) = stat
                && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && stat.st_size >= LARGE
                && large.len() < BATCH_FILES
            {
                large.push((directory, name, (stat.st_dev, stat.st_ino)));
            }
        }
        if large.len() < 2 {
            return;
        }
        let mut opened = Vec::new();
        for (directory, name, inode) in large {
            // The same file under two names is read once, and then again as it is met.
            if !opened.iter().any(|(_, other)| *other == inode)
                && let Ok(file) = self.open(directory, name)
            {
                opened.push((file, inode));
            }
        }
        let files: Vec<&File> = opened.iter().map(|(opened, _)| &*opened.file).collect();
        let digests = hashing::hash_all(&files, self.function, self.cancel);
        for ((opened, inode), digest) in opened.into_iter().zip(digests) {
            self.ahead.insert(inode, (opened, digest));
        }
    }

    /// Reads a file and adds it to the batch.
    fn digest(&mut self, file: &Arc<File>) -> Result<Digest, Fault> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let hashed = hashing::hash(file, self.function, self.cancel, &mut buffer);
        let (digest, whole) = hashed?;
        let content = match whole {
            Some(length) => Content::Bytes(Bytes::copy_from_slice(&buffer[..length])),
            None => Content::File(file.clone()),
        };
        self.buffer = buffer;
        self.add(digest, content);
        Ok(digest)
    }

    fn add(&mut self, digest: Digest, content: Content) {
        // The empty blob is everywhere.
        if digest.is_empty_blob() || !self.sent.insert(digest) {
            return;
        }
        match &content {
            Content::Bytes(bytes) => self.batch_bytes += bytes.len(),
            Content::File(_) => self.batch_files += 1,
        }
        self.batch.push((digest, content));
        if self.batch_bytes >= BATCH_BYTES || self.batch_files >= BATCH_FILES {
            (self.batch_bytes, self.batch_files) = (0, 0);
            (self.send)(std::mem::take(&mut self.batch));
        }
    }

    /// Every regular file beneath `server_logs`, by its path there.
    fn server_logs(&mut self, gate: BorrowedFd<'_>) {
        const DIRECTORY: &str = "server_logs";
        let Ok(logs) = beneath::open_listing(gate, DIRECTORY) else {
            return;
        };
        let mut rest = vec![(".".to_owned(), 0)];
        while let Some((path, depth)) = rest.pop() {
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
                        let digest = beneath::open_file(directory.as_fd(), &name)
                            .map_err(|error| unreadable(&path, error))
                            .and_then(|(file, _)| self.digest(&Arc::new(file)));
                        match digest {
                            Ok(digest) => {
                                let log = reapi::LogFile {
                                    digest: Some(digest.to_proto()),
                                    human_readable: false,
                                };
                                self.found.server_logs.insert(path, log);
                            }
                            Err(fault) => self.fail(fault),
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

fn is_executable(stat: &Stat) -> bool {
    stat.st_mode & 0o111 != 0
}

fn unreadable(output: &str, error: Errno) -> Fault {
    match error {
        Errno::ACCESS | Errno::PERM => Fault::Internal(format!(
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
            "output {text:?} is a symbolic link to a path that is not UTF-8: {target:?}"
        ))
    })
}
