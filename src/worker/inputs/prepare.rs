//! The whole way from a task to its input root, in order.

use std::{collections::BTreeSet, io, sync::Arc};

use bytes::Bytes;
use prost::Message;
use rustix::fs::Mode;

use super::{
    directory_cache::{DirectoryCache, DirectoryWalk},
    file_cache::{FileCache, FileKey, PinnedFiles},
    input_root::InputRoot,
    merkle_tree::Tree,
    planned_root::{PlannedRoot, PlannedRootError},
    worker_build_directory::WorkerBuildDirectory,
};
use crate::{
    config::worker::Inputs,
    digest::Digest,
    path::RelativePath,
    proto::reapi,
    storage::{self, Backend},
    worker::{blocking::blocking, command::Command, fault::Fault, task::AssignedTask},
};

/// How often laying out is tried again when files vanish from the cache; more often, a disk is broken.
const LAY_OUT_RETRIES: u32 = 3;

/// Makes the input roots of one runner's actions.
pub struct InputRoots {
    pub storage: Backend,
    pub cache: Arc<FileCache>,
    pub directories: Arc<DirectoryCache>,
    pub build_directory: Arc<WorkerBuildDirectory>,
    pub inputs: Inputs,
    /// The group to which an action's directory is opened (`runners.group`).
    pub group: Option<u32>,
}

/// How far a root could be laid out with the files that are in the cache.
enum LayOutAttempt {
    LaidOut(Box<InputRoot>),
    /// A root is chosen, but some of its files must be fetched first.
    Incomplete(Box<PlannedRoot>, PinnedFiles),
}

impl InputRoots {
    /// Fetches the command of a task, and makes a root that has all inputs of it.
    pub async fn prepare(&self, task: &AssignedTask) -> Result<(Command, InputRoot), Fault> {
        let (command, tree) = self.fetch(task).await?;
        let parents = Arc::new(command.output_parents());
        let mut attempts = 0;
        loop {
            match self.try_prepare(task, &tree, &parents).await {
                Ok(root) => return Ok((command, root)),
                Err(PlannedRootError::Fault(fault)) => return Err(fault),
                Err(PlannedRootError::MissingFiles(keys)) if attempts < LAY_OUT_RETRIES => {
                    attempts += 1;
                    self.restore(task, keys).await?;
                }
                Err(PlannedRootError::MissingFiles(keys)) => {
                    return Err(Fault::Unavailable(format!(
                        "could not keep {} files in the cache in {}: something removes them",
                        keys.len(),
                        self.cache.path().display()
                    )));
                }
            }
        }
    }

    /// Makes an empty root, and a directory beside it, whose path in the build directory is returned: a runner that
    /// looks for actions' directories in the same place finds it.
    pub async fn prepare_readiness_check(&self) -> Result<(InputRoot, String), Fault> {
        let (build_directory, group) = (self.build_directory.clone(), self.group);
        let make = move || {
            build_directory.await_free_space()?;
            build_directory.cache.require_directory()?;
            let no_directory = |error| no_directory(&build_directory, error);
            let mut root = InputRoot::empty(&build_directory).map_err(no_directory)?;
            let (name, mode) = ("check_readiness", Mode::from_raw_mode(0o777));
            rustix::fs::mkdirat(root.directory(), name, mode)
                .map_err(|error| no_directory(error.into()))?;
            grant_group_access(&mut root, group)?;
            let path = format!("{}/{name}", root.name());
            Ok((root, path))
        };
        blocking("make an action's directory", make).await?
    }

    /// Fetches the command and all Directories. When some are missing, the fault tells all that is missing at once.
    async fn fetch(&self, task: &AssignedTask) -> Result<(Command, Tree), Fault> {
        let digest = |field: &str, digest: Option<&reapi::Digest>| {
            Digest::parse_required(Some(task.function), digest)
                .map_err(|error| Fault::Invalid(format!("{field} of the action is wrong: {error}")))
        };
        let command_digest = digest("command_digest", task.action.command_digest.as_ref())?;
        let root = digest("input_root_digest", task.action.input_root_digest.as_ref())?;
        let walk = self
            .directories
            .walk(&task.instance, root, command_digest)
            .await?;
        let command = match &walk.command_blob {
            Ok(data) => Some(parse_command(&command_digest, data)?),
            Err(storage::Error::Missing(_)) => None,
            Err(error) => {
                let what = format!("obtain command {command_digest}");
                return Err(Fault::of_storage(what, error.clone()));
            }
        };
        match (command, &walk.tree) {
            (Some(command), Some(tree)) => Ok((command, tree.clone())),
            (None, _) => Err(self.missing(task, &walk, Some(command_digest)).await),
            (Some(_), None) => Err(self.missing(task, &walk, None).await),
        }
    }

    /// The fault of a task whose command or Directories are missing. It tells of missing files too, none of which is
    /// fetched.
    async fn missing(
        &self,
        task: &AssignedTask,
        walk: &DirectoryWalk,
        command: Option<Digest>,
    ) -> Fault {
        let mut missing = walk.missing.clone();
        missing.extend(command);
        let absent = self.cache.absent(walk.files());
        if !absent.is_empty() {
            match self.storage.find_missing(&task.instance, &absent).await {
                Ok(found) => missing.extend(found),
                Err(error) => {
                    return Fault::of_storage("find out which input files are missing", error);
                }
            }
        }
        Fault::of_storage(
            "obtain the action's inputs",
            storage::Error::Missing(missing),
        )
    }

    /// Chooses a root, fetches the files that it lacks, then lays it out. Where nothing is to be fetched, one thread
    /// does all of it.
    async fn try_prepare(
        &self,
        task: &AssignedTask,
        tree: &Tree,
        parents: &Arc<BTreeSet<RelativePath>>,
    ) -> Result<InputRoot, PlannedRootError> {
        let (build_directory, inputs, group) =
            (self.build_directory.clone(), self.inputs, self.group);
        let (tree, all_parents) = (tree.clone(), parents.clone());
        let attempt = blocking("lay out the input root", move || {
            let planned = PlannedRoot::new(&build_directory, &tree, inputs);
            let planned = planned.map_err(|error| no_directory(&build_directory, error))?;
            let pinned = planned.pin()?;
            match pinned.is_complete() {
                true => perform(planned, pinned, &all_parents, group)
                    .map(|root| LayOutAttempt::LaidOut(Box::new(root))),
                false => Ok(LayOutAttempt::Incomplete(Box::new(planned), pinned)),
            }
        });
        let (planned, mut pinned) = match attempt.await?? {
            LayOutAttempt::LaidOut(root) => return Ok(*root),
            LayOutAttempt::Incomplete(planned, pinned) => (planned, pinned),
        };
        self.cache
            .fetch(&task.instance, &mut pinned)
            .await
            .map_err(|fault| with_path(fault, planned.tree()))?;
        let parents = parents.clone();
        let perform = move || perform(*planned, pinned, &parents, group);
        blocking("lay out the input root", perform).await?
    }

    /// Brings files into the cache again that should have been there.
    async fn restore(&self, task: &AssignedTask, missing: Vec<FileKey>) -> Result<(), Fault> {
        tracing::warn!(
            files = missing.len(),
            "files are missing in the cache; fetching them again"
        );
        // Whoever removed them may have changed others.
        let build_directory = self.build_directory.clone();
        blocking("delete what is kept", move || {
            build_directory.invalidate_all()
        })
        .await?;
        self.cache.restore(&task.instance, missing).await
    }
}

fn perform(
    planned: PlannedRoot,
    pinned: PinnedFiles,
    parents: &BTreeSet<RelativePath>,
    group: Option<u32>,
) -> Result<InputRoot, PlannedRootError> {
    let mut root = planned.lay_out(pinned, parents)?;
    grant_group_access(&mut root, group)?;
    Ok(root)
}

fn grant_group_access(root: &mut InputRoot, group: Option<u32>) -> Result<(), Fault> {
    match group {
        Some(group) => root.grant_group_access(group),
        None => Ok(()),
    }
}

fn no_directory(build_directory: &WorkerBuildDirectory, error: io::Error) -> Fault {
    let what = format!(
        "make an action directory in {}",
        build_directory.path().display()
    );
    Fault::of_disk(what, error)
}

fn parse_command(digest: &Digest, data: &Bytes) -> Result<Command, Fault> {
    let message = reapi::Command::decode(data.clone())
        .map_err(|error| Fault::Invalid(format!("blob {digest} is no Command: {error}")))?;
    Command::parse(message)
        .map_err(|error| Fault::Invalid(format!("could not run command: {error}")))
}

/// Adds to a fault where the first missing file would be in the root.
fn with_path(fault: Fault, tree: &Tree) -> Fault {
    match fault {
        Fault::Missing { text, digests } => {
            let path = digests.first().and_then(|digest| tree.path_of(digest));
            Fault::Missing {
                text: match path {
                    Some(path) => format!("{text}, which is {path:?}"),
                    None => text,
                },
                digests,
            }
        }
        other => other,
    }
}
