//! Output directories: read level by level into a Tree.

use std::{
    collections::HashSet,
    os::fd::{AsFd, OwnedFd},
};

use bytes::Bytes;
use prost::Message;
use rustix::{
    fs::{AtFlags, Dir, FileType},
    io::Errno,
};

use super::collector::{Blobs, Collector, read_link, unreadable};
use crate::{
    digest::Digest,
    proto::reapi,
    storage::Content,
    text::shorten,
    worker::{
        beneath, command::CommandOutput, fault::Fault, inputs::directory_message::MAXIMUM_DEPTH,
    },
};

/// One level of an output directory.
struct DirectoryLevel {
    directory: OwnedFd,
    /// In the level above.
    name: String,
    /// Directories yet to enter, the first name last.
    rest: Vec<String>,
    message: reapi::Directory,
}

impl<S: FnMut(Blobs)> Collector<'_, S> {
    pub fn output_directory(
        &mut self,
        output: &CommandOutput,
        directory: OwnedFd,
    ) -> Result<(), Fault> {
        let (tree, root) = self.tree(directory, &shorten(&output.text))?;
        let tree = Bytes::from(tree.encode_to_vec());
        let tree_digest = self.function.digest_of(&tree);
        self.bounds.add_file(tree_digest.size(), &output.text)?;
        let found = reapi::OutputDirectory {
            path: output.text.clone(),
            tree_digest: Some(tree_digest.to_proto()),
            is_topologically_sorted: true,
            root_directory_digest: self.store_directories.then(|| root.to_proto()),
        };
        self.bounds.add_to_lists(found.encoded_len())?;
        self.add(tree_digest, Content::Bytes(tree));
        self.found.directories.push(found);
        Ok(())
    }

    /// A directory as a Tree, root and parents first, each distinct Directory once; and the digest
    /// of its root. Not recursive: depth is the command's.
    fn tree(&mut self, directory: OwnedFd, output: &str) -> Result<(reapi::Tree, Digest), Fault> {
        let mut seen = HashSet::new();
        // In the order in which they were finished: children before their parents.
        let mut finished = Vec::new();
        let mut level = self.enter(directory, String::new(), output)?;
        let mut above: Vec<DirectoryLevel> = Vec::new();
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
                    Err(fault) if self.bounds.are_exceeded() => return Err(fault),
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
            let node = reapi::DirectoryNode {
                name: level.name,
                digest: Some(digest.to_proto()),
            };
            self.bounds.add_to_directory(node.encoded_len())?;
            parent.message.directories.push(node);
            if seen.insert(digest) {
                finished.push(level.message);
            }
            level = parent;
        }
    }

    /// Everything of one directory but the directories in it.
    fn enter(
        &mut self,
        directory: OwnedFd,
        name: String,
        output: &str,
    ) -> Result<DirectoryLevel, Fault> {
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
        let mut message = reapi::Directory {
            node_properties: self.properties_at(&directory, ".")?,
            ..Default::default()
        };
        for name in files {
            match self.file(directory.as_fd(), &name, &format!("{output}/…/{name}")) {
                Ok((digest, is_executable)) => {
                    let node = reapi::FileNode {
                        node_properties: self.properties_at(&directory, &name)?,
                        name,
                        digest: Some(digest.to_proto()),
                        is_executable,
                    };
                    self.bounds.add_to_directory(node.encoded_len())?;
                    message.files.push(node);
                }
                Err(fault) if self.bounds.are_exceeded() => return Err(fault),
                Err(fault) => self.fail(fault),
            }
        }
        for name in symlinks {
            match read_link(directory.as_fd(), &name, &format!("{output}/…/{name}")) {
                Ok(target) => {
                    let node = reapi::SymlinkNode {
                        node_properties: self.properties_at(&directory, &name)?,
                        name,
                        target,
                    };
                    self.bounds.add_to_directory(node.encoded_len())?;
                    message.symlinks.push(node);
                }
                Err(fault) => self.fail(fault),
            }
        }
        Ok(DirectoryLevel {
            directory,
            name,
            rest,
            message,
        })
    }

    /// Of one entry, where any are asked for.
    fn properties_at(
        &self,
        directory: &OwnedFd,
        name: &str,
    ) -> Result<Option<reapi::NodeProperties>, Fault> {
        if !self.properties.are_wanted() {
            return Ok(None);
        }
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|error| unreadable(name, error))?;
        Ok(self.properties.of(&stat))
    }

    /// The entries of a directory, with their types.
    pub fn list(
        &mut self,
        directory: &OwnedFd,
        output: &str,
    ) -> Result<Vec<(String, FileType)>, Fault> {
        self.bounds.check_time()?;
        let mut names = Vec::new();
        let read = |error: Errno| unreadable(output, error);
        let mut entries = Dir::read_from(directory).map_err(read)?;
        while let Some(entry) = entries.read() {
            let entry = entry.map_err(read)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.bounds.add_entry()?;
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
}
