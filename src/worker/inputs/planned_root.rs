//! A root that is chosen for an action, with the plan of what must be done to it.

use std::{
    collections::BTreeSet,
    io,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::{
    file_cache::{CreateMode, FileKey, PinnedFiles},
    input_root::InputRoot,
    lay_out::LayOutError,
    merkle_tree::Tree,
    plan::LayOutPlan,
    root_pool::IdleRoot,
    root_record::{self, DirectoryRecord},
    set_node_properties,
    subtree_stash::StashedSubtree,
    worker_build_directory::WorkerBuildDirectory,
};
use crate::{
    config::worker::Inputs,
    path::RelativePath,
    worker::{beneath, blocking::in_background, fault::Fault},
};

/// A root that is chosen for an action, but not changed yet. Goes back to the idle ones when it is dropped.
pub struct PlannedRoot {
    build_directory: Arc<WorkerBuildDirectory>,
    tree: Tree,
    /// The root and its plan; `None` only while the plan is performed, or this is dropped.
    work: Option<(IdleRoot, LayOutPlan<StashedSubtree>)>,
    /// Whether the root is kept after its action.
    keep: bool,
    create_mode: CreateMode,
    /// `FileCache::poll_modifications` before the root was chosen.
    modifications: u64,
    /// The time that planning took.
    spent: Duration,
}

/// Why an input root could not be laid out.
#[derive(Debug)]
pub enum PlannedRootError {
    /// These files must be restored to the cache; then another attempt may succeed.
    MissingFiles(Vec<FileKey>),
    Fault(Fault),
}

impl Drop for PlannedRoot {
    fn drop(&mut self) {
        if let Some((root, plan)) = self.work.take() {
            let build_directory = self.build_directory.clone();
            in_background(move || {
                build_directory.root_pool.add_stashed(plan.unstashed);
                build_directory.root_pool.return_root(root);
            });
        }
    }
}

impl From<Fault> for PlannedRootError {
    fn from(fault: Fault) -> Self {
        PlannedRootError::Fault(fault)
    }
}

impl PlannedRoot {
    /// Chooses a root for `tree` and plans what must be done to it. Blocks until there is a root.
    pub fn new(
        build_directory: &Arc<WorkerBuildDirectory>,
        tree: &Tree,
        inputs: Inputs,
    ) -> io::Result<Self> {
        let modifications = build_directory.invalidate_if_cache_modified();
        let create_mode = match tree.has_properties {
            true => CreateMode::Copy,
            false => build_directory.cache.create_mode(inputs),
        };
        let keep = build_directory.keeps(tree, create_mode);
        let root = build_directory.take_root(keep.then_some((create_mode, tree)))?;
        let began = Instant::now();
        let plan = build_directory
            .root_pool
            .plan(&root.record.top.node, tree, create_mode, keep);
        Ok(PlannedRoot {
            build_directory: build_directory.clone(),
            tree: tree.clone(),
            keep: keep
                && build_directory
                    .root_pool
                    .make_room_for_directories(plan.new_directories.len() as u64),
            work: Some((root, plan)),
            create_mode,
            modifications,
            spent: began.elapsed(),
        })
    }

    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Pins those of the files to create that are in the cache. Blocks.
    pub fn pin(&self) -> Result<PinnedFiles, Fault> {
        let files = self
            .work
            .as_ref()
            .map_or(&[][..], |(_, plan)| &plan.files_to_create);
        self.build_directory
            .cache
            .check_occurrences(files, self.create_mode)?;
        let pinned = self.build_directory.cache.pin(files);
        pinned.map_err(|error| Fault::of_disk("read the input files that are in the cache", error))
    }

    /// Performs the plan, and makes the directories `parents` in the root. Blocks.
    pub fn lay_out(
        mut self,
        pinned: PinnedFiles,
        parents: &BTreeSet<RelativePath>,
    ) -> Result<InputRoot, PlannedRootError> {
        let began = Instant::now();
        let build_directory = self.build_directory.clone();
        let (root, plan) = self.work.take().expect("present until performed");
        let IdleRoot {
            action_directory,
            record,
            generation,
        } = root;
        let mut input_root = InputRoot::new(
            &build_directory,
            action_directory,
            generation,
            self.modifications,
        );
        build_directory.lay_out_counts.add(&self.tree, &plan);
        let (linked, made, unstashed) = (
            plan.files_to_create.len(),
            plan.new_directories.len(),
            plan.unstashed.len(),
        );
        // An error drops the root without its record: it is thrown away (I7 Errors discard).
        let context = build_directory.context(generation);
        let performed = context.perform(record, plan, pinned, self.keep, self.create_mode);
        input_root.record = performed.map_err(|error| match error {
            LayOutError::MissingFiles(keys) => PlannedRootError::MissingFiles(keys),
            LayOutError::Disk(name, error) => {
                let what = format!("make {name:?} of the input root");
                PlannedRootError::Fault(build_directory.disk_fault(&what, error))
            }
        })?;
        for parent in parents {
            self.make_parent(&mut input_root, parent)?;
        }
        if self.tree.has_properties {
            let set = set_node_properties::set_all(input_root.root(), &self.tree);
            set.map_err(|(name, error)| {
                let what = format!("set the mode and time of {name:?} of the input root");
                build_directory.disk_fault(&what, error.into())
            })?;
        }
        input_root.has_private_files = self.create_mode == CreateMode::Copy;
        let found = build_directory.await_free_space()?;
        input_root
            .begin(found)
            .map_err(|error| build_directory.disk_fault("open the action's directory", error))?;
        let spent = self.spent + began.elapsed();
        tracing::debug!(
            input_root = %self.tree.digest,
            entries = self.tree.entries,
            linked,
            made,
            unstashed,
            microseconds = spent.as_micros() as u64,
            "laid out an input root"
        );
        build_directory.lay_out_counts.add_time(spent);
        Ok(input_root)
    }

    fn make_parent(&self, root: &mut InputRoot, parent: &RelativePath) -> Result<(), Fault> {
        let made = match &mut root.record {
            Some(record) => make_below(&mut record.top, parent),
            None => beneath::make_directories(root.root(), parent)
                .map_err(|(component, error)| (component.as_str().to_owned(), error)),
        };
        made.map_err(|(component, error)| match error {
            Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG => Fault::Invalid(format!(
                "could not make directory {parent}, which declared outputs lie in: {component} is no directory in the input root"
            )),
            error => {
                let what = format!("make directory {parent}");
                self.build_directory.disk_fault(&what, error.into())
            }
        })
    }
}

/// Makes the directories of a path that the tree of a root does not have. They are found and removed after the action,
/// since the directory above them has no baseline any more.
fn make_below(root: &mut DirectoryRecord, path: &RelativePath) -> Result<(), (String, Errno)> {
    let mut at = root;
    let mut components = path.components().iter();
    let mut rest = path.components();
    while let Some(component) = components.next() {
        let directories = &at.node.directory.directories;
        let found = directories.binary_search_by(|entry| entry.0.cmp(component));
        let Ok(found) = found else { break };
        at = &mut at.children[found];
        rest = components.as_slice();
    }
    if rest.is_empty() {
        return Ok(());
    }
    let rest: RelativePath = rest
        .iter()
        .cloned()
        .fold(RelativePath::root(), |path, name| path.join(name));
    at.baseline = None;
    let fd = at.fd.clone();
    let made = beneath::make_directories(fd.as_fd(), &rest);
    made.map_err(|(component, error)| (component.as_str().to_owned(), error))?;
    root_record::set_mtime(fd.as_fd()).map_err(|error| (path.to_string(), error))
}
