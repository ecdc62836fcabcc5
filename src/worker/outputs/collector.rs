//! What the collecting of one action's outputs goes through.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    os::fd::BorrowedFd,
    sync::Arc,
};

use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::{
    bounds::{Bounds, OutputLimits},
    node_properties::{InodeId, OutputProperties},
};
use crate::{
    digest::{Digest, DigestFunction},
    proto::reapi,
    storage::Content,
    worker::{command::NodePropertyKeys, fault::Fault, inputs::file_cache::FileCache},
};

pub(super) type Blobs = Vec<(Digest, Content)>;

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
    pub adopted_output_inodes: Vec<u64>,
}

/// What a client wants to be told of outputs, beside what everybody is.
#[derive(Clone, Copy, Debug)]
pub struct ToldOfOutputs {
    /// Of output directories, each Directory is stored as a blob too.
    pub directories: bool,
    pub node_properties: NodePropertyKeys,
}

/// Reads outputs, and hands blobs to `send` in batches.
pub struct Collector<'a, S> {
    pub(super) function: DigestFunction,
    pub(super) cache: &'a FileCache,
    /// Of output directories, store each Directory as a blob too.
    pub(super) store_directories: bool,
    pub(super) bounds: Bounds<'a>,
    pub(super) send: S,
    pub(super) found: CollectedOutputs,
    pub(super) batch: Blobs,
    pub(super) batch_bytes: usize,
    pub(super) batch_files: usize,
    pub(super) sent: HashSet<Digest>,
    pub(super) buffer: Vec<u8>,
    /// Whether one output is, or lies in, another.
    pub(super) overlapping: bool,
    /// Digests of files that may be met again, and whether they are executable.
    pub(super) read: HashMap<InodeId, (Digest, bool)>,
    pub(super) properties: OutputProperties,
    /// Large files that are open and hashed already.
    pub(super) ahead: HashMap<InodeId, (OpenedOutput, Digest)>,
}

/// A regular file, before it is read.
pub(super) struct OpenedOutput {
    pub file: Arc<File>,
    pub inode: InodeId,
    pub size: u64,
    pub executable: bool,
    /// It may be met again, under another name or as part of another output.
    pub may_return: bool,
    /// Nobody can make it differ from its digest any more.
    pub is_owned: bool,
}

impl<'a, S: FnMut(Blobs)> Collector<'a, S> {
    pub fn new(
        function: DigestFunction,
        cache: &'a FileCache,
        told: ToldOfOutputs,
        limits: OutputLimits,
        cancel: &'a CancellationToken,
        send: S,
    ) -> Self {
        Collector {
            function,
            cache,
            store_directories: told.directories,
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
            properties: OutputProperties::new(told.node_properties),
            ahead: HashMap::new(),
        }
    }

    pub(super) fn fail(&mut self, fault: Fault) {
        self.found.fault.get_or_insert(fault);
    }
}

pub(super) fn unreadable(output: &str, error: Errno) -> Fault {
    match error {
        Errno::ACCESS | Errno::PERM => Fault::Precondition(format!(
            "could not read output {output:?}: {error}; the command must leave it readable, or the worker needs CAP_DAC_READ_SEARCH"
        )),
        error => Fault::of_disk(format!("read output {output:?}"), error),
    }
}

pub(super) fn read_link(
    directory: BorrowedFd<'_>,
    name: &str,
    text: &str,
) -> Result<String, Fault> {
    let target = rustix::fs::readlinkat(directory, name, Vec::new())
        .map_err(|error| unreadable(text, error))?;
    target.into_string().map_err(|target| {
        Fault::Invalid(format!(
            "output {text:?} is a symbolic link to a path that is not UTF-8: {:?}",
            target.into_cstring()
        ))
    })
}
