//! Performs a plan: turns one directory tree on disk into another one.
//!
//! 1. Removals come first, everywhere in the root; then a directory's own changes, then its
//!    baseline (I6 Baseline), then what is below.
//! 2. On any error the whole root is given up (I7 Errors discard): nothing here undoes anything.
//! 3. Directories that are made are worked on by several threads when that pays (`WorkerBuildDirectory::set_threads`).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, Mode};

use super::{
    file_cache::{CreateMode, FileCache, FileKey, InputFileKind, PinnedFiles},
    inode_allocator::InodeAllocator,
    merkle_tree::Tree,
    plan::{self, DirectorySource, EntrySource, LayOutPlan, NewDirectory, Rewrite, SubtreeSource},
    root_pool::RootPool,
    root_record::{self, DirectoryFd, DirectoryRecord, RootRecord},
    subtree_stash::StashedSubtree,
};

/// From so many files to create on, a second thread helps.
const WORTH_A_THREAD: usize = 500;

/// Why a plan could not be performed.
pub(super) enum LayOutError {
    /// These files should be in the cache, and are gone from it.
    MissingFiles(Vec<FileKey>),
    /// The error came up at the entry with this name.
    Disk(String, io::Error),
}

/// Turns an error number into the error of an entry.
pub(super) fn error_at(name: &str) -> impl FnOnce(rustix::io::Errno) -> LayOutError {
    move |error| LayOutError::Disk(name.to_owned(), error.into())
}

/// A directory that is laid out, but not all of its subdirectories.
struct PartialDirectory {
    record: DirectoryRecord,
    children: Vec<LaidOutChild>,
}

/// How far a subdirectory is laid out.
enum LaidOutChild {
    Whole(DirectoryRecord),
    Partial(Box<PartialDirectory>),
    /// A directory that is made, and still empty: an index of `LayOut::new_directories`.
    Pending(u32),
}

/// A directory that stays, when all that is not wanted is removed and nothing is added yet.
struct PrunedDirectory {
    record: DirectoryRecord,
    rewrite: Rewrite,
    children: Vec<PrunedDirectorySource>,
}

/// A `DirectorySource`, with the records of the directories that stay.
enum PrunedDirectorySource {
    Unchanged(DirectoryRecord),
    Pruned(Box<PrunedDirectory>),
    New(SubtreeSource),
}

/// What laying out roots needs of the build directory.
#[derive(Clone, Copy)]
pub(super) struct LayOutContext<'a> {
    pub root_pool: &'a RootPool,
    pub cache: &'a Arc<FileCache>,
    pub threads: usize,
    /// The generation of the root, with which subtrees that are taken out of it are stashed. When everything was
    /// invalidated since the root was made, they are thrown away instead.
    pub generation: u64,
}

/// A plan that is being performed.
pub(super) struct LayOut<'a> {
    pub context: LayOutContext<'a>,
    /// Whether the root is kept after its action, so that a record of it is needed.
    keep: bool,
    pub create_mode: CreateMode,
    /// Which inodes of cached files the root links.
    pub inodes: Mutex<InodeAllocator>,
    /// The cached files that the plan needs. This lock is taken before that of the cache's index.
    pub pinned: Mutex<PinnedFiles>,
    new_directories: Vec<NewDirectory>,
    /// The subtrees that the plan takes out of the stash; `None` once one is in its place.
    pub unstashed: Mutex<Vec<Option<StashedSubtree>>>,
    /// The subtrees that the plan drops, by `DroppedSubtree::dropped_index`; `None` before one is taken out of the
    /// root, when it was empty, and when it is in another place of the root again.
    pub dropped: Mutex<Vec<Option<StashedSubtree>>>,
    pub queue: Mutex<JobQueue>,
    changed: Condvar,
    /// What is laid out of each of `new_directories`.
    results: Mutex<Vec<Option<PartialDirectory>>>,
}

/// Counts a thread that may yet add jobs. Whoever waits for jobs learns when it is done, also by a panic: else the
/// others would wait for ever, and nobody would be told of the panic.
struct WorkingGuard<'a, 'b>(&'a LayOut<'b>);

impl<'a, 'b> WorkingGuard<'a, 'b> {
    fn new(lay_out: &'a LayOut<'b>, queue: &mut JobQueue) -> Self {
        queue.working += 1;
        WorkingGuard(lay_out)
    }
}

impl Drop for WorkingGuard<'_, '_> {
    fn drop(&mut self) {
        self.0.queue.lock().working -= 1;
        self.0.changed.notify_all();
    }
}

/// New directories that are made, and are to be filled.
#[derive(Default)]
pub(super) struct JobQueue {
    /// The parent of each directory, its index in `LayOut::new_directories`, and its name. The last job is done first:
    /// so only the ancestors of what is worked on must be open.
    jobs: Vec<(Arc<DirectoryFd>, u32, String)>,
    /// How many threads may yet add jobs.
    working: usize,
    /// Files that are gone from the cache.
    pub missing: Vec<FileKey>,
    /// The first error that was no missing file.
    failed: Option<LayOutError>,
}

impl<'a> LayOutContext<'a> {
    /// Turns a root into another one, and stashes what is dropped from it. Unless the root is to be kept (`keep`), no
    /// record comes back, and no more directories are open than must be.
    pub(super) fn perform(
        &self,
        root: RootRecord,
        mut plan: LayOutPlan<StashedSubtree>,
        pinned: PinnedFiles,
        keep: bool,
        create_mode: CreateMode,
    ) -> Result<Option<RootRecord>, LayOutError> {
        let Some(rewrite) = plan.rewrite.take() else {
            return Ok(keep.then_some(root));
        };
        let (moved, files) = (std::mem::take(&mut plan.moved), plan.files_to_create.len());
        let RootRecord { top, inodes, .. } = root;
        let lay_out = LayOut::new(*self, plan, pinned, inodes, keep, create_mode);
        let result = lay_out.run(top, rewrite, &moved, files);
        let LayOut {
            inodes,
            unstashed,
            dropped,
            ..
        } = lay_out;
        let dropped = dropped.into_inner().into_iter().flatten();
        self.root_pool.add_stashed(dropped);
        // What is still here after an error may have been changed.
        for stashed in unstashed.into_inner().into_iter().flatten() {
            self.root_pool.delete_stashed(stashed);
        }
        let record = result?.map(|top| RootRecord {
            top,
            inodes: inodes.into_inner(),
            create_mode,
        });
        Ok(record)
    }

    /// Makes a whole subtree at a name that is free, because an action removed what the root had there, or the worker
    /// did, since the directory was oversized.
    pub(super) fn make_subtree(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        node: &Tree,
        inodes: &mut InodeAllocator,
        create_mode: CreateMode,
    ) -> Result<DirectoryRecord, LayOutError> {
        let plan = plan::plan_from_empty(node);
        let pinned = self.cache.pin(&plan.files_to_create);
        let pinned = pinned.map_err(|error| LayOutError::Disk(name.to_owned(), error))?;
        // On an error the whole root is given up.
        let inodes_before = std::mem::take(inodes);
        let lay_out = LayOut::new(*self, plan, pinned, inodes_before, true, create_mode);
        make_directory(parent, name)?;
        let fd = self
            .root_pool
            .open_directory(parent, name)
            .map_err(error_at(name))?;
        let mut buffer = String::new();
        lay_out.fill_directory(0, Arc::new(fd), &mut buffer)?;
        lay_out.work(&mut buffer);
        lay_out.outcome()?;
        *inodes = lay_out.inodes.into_inner();
        Ok(assemble_new(0, &mut lay_out.results.into_inner()))
    }
}

fn make_directory(parent: BorrowedFd<'_>, name: &str) -> Result<(), LayOutError> {
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o777)).map_err(error_at(name))
}

impl<'a> LayOut<'a> {
    fn new(
        context: LayOutContext<'a>,
        plan: LayOutPlan<StashedSubtree>,
        pinned: PinnedFiles,
        inodes: InodeAllocator,
        keep: bool,
        create_mode: CreateMode,
    ) -> Self {
        LayOut {
            context,
            keep,
            create_mode,
            inodes: Mutex::new(inodes),
            pinned: Mutex::new(pinned),
            unstashed: Mutex::new(plan.unstashed.into_iter().map(Some).collect()),
            dropped: Mutex::new((0..plan.dropped_count).map(|_| None).collect()),
            queue: Mutex::default(),
            changed: Condvar::new(),
            results: Mutex::new(plan.new_directories.iter().map(|_| None).collect()),
            new_directories: plan.new_directories,
        }
    }

    fn run(
        &self,
        root: DirectoryRecord,
        rewrite: Rewrite,
        moved: &[u32],
        files_to_create: usize,
    ) -> Result<Option<DirectoryRecord>, LayOutError> {
        let pruned = self.remove(root, rewrite)?;
        let mut buffer = String::new();
        self.resolve_inode_conflicts(moved, &mut buffer)?;
        let more_threads = match files_to_create >= WORTH_A_THREAD {
            true => self.context.threads.saturating_sub(1),
            false => 0,
        };
        let adding = WorkingGuard::new(self, &mut self.queue.lock());
        let partial = std::thread::scope(|scope| {
            for _ in 0..more_threads {
                scope.spawn(|| self.work(&mut String::new()));
            }
            let partial = self.add(pruned, &mut buffer);
            if partial.is_err() {
                self.queue.lock().jobs.clear();
            }
            drop(adding);
            self.work(&mut buffer);
            partial
        })?;
        self.outcome()?;
        Ok(self
            .keep
            .then(|| assemble(partial, &mut self.results.lock())))
    }

    /// Whether all jobs went well.
    fn outcome(&self) -> Result<(), LayOutError> {
        let mut queue = self.queue.lock();
        if let Some(error) = queue.failed.take() {
            return Err(error);
        }
        match queue.missing.is_empty() {
            true => Ok(()),
            false => Err(LayOutError::MissingFiles(std::mem::take(
                &mut queue.missing,
            ))),
        }
    }

    /// Unlinks and stashes what is not wanted, in the whole root.
    fn remove(
        &self,
        mut record: DirectoryRecord,
        mut rewrite: Rewrite,
    ) -> Result<PrunedDirectory, LayOutError> {
        let directory = record.node.directory.clone();
        let fd = record.fd.clone();
        for &i in &rewrite.dropped_files {
            if let InputFileKind::HardLink(file, inode_index) = record.files.list[i as usize].kind()
            {
                self.inodes.lock().free(file, inode_index);
            }
            let name = directory.files[i as usize].name.as_str();
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(error_at(name))?;
        }
        for &i in &rewrite.dropped_symlinks {
            let name = directory.symlinks[i as usize].0.as_str();
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(error_at(name))?;
        }
        let mut children: Vec<Option<DirectoryRecord>> = std::mem::take(&mut record.children)
            .into_iter()
            .map(Some)
            .collect();
        for dropped in &rewrite.dropped_children {
            let i = dropped.child as usize;
            let name = directory.directories[i].0.as_str();
            let Some(child) = children[i].take() else {
                continue;
            };
            if child.node.entries == 0 {
                rustix::fs::unlinkat(&*fd, name, AtFlags::REMOVEDIR).map_err(error_at(name))?;
                continue;
            }
            let stashed = self
                .context
                .root_pool
                .detach_subtree(
                    fd.as_fd(),
                    name,
                    child,
                    self.create_mode,
                    self.context.generation,
                )
                .map_err(error_at(name))?;
            self.dropped.lock()[dropped.dropped_index as usize] = Some(stashed);
        }
        let stale = |name: &str| LayOutError::Disk(name.to_owned(), io::ErrorKind::NotFound.into());
        let mut pruned = Vec::with_capacity(rewrite.children.len());
        for (child, entry) in std::mem::take(&mut rewrite.children)
            .into_iter()
            .zip(&rewrite.node.directory.directories)
        {
            let mut take = |i: u32| {
                children[i as usize]
                    .take()
                    .ok_or_else(|| stale(entry.0.as_str()))
            };
            pruned.push(match child {
                DirectorySource::Unchanged(i) => PrunedDirectorySource::Unchanged(take(i)?),
                DirectorySource::Rewritten(i, rewrite) => {
                    PrunedDirectorySource::Pruned(Box::new(self.remove(take(i)?, *rewrite)?))
                }
                DirectorySource::New(source) => PrunedDirectorySource::New(source),
            });
        }
        Ok(PrunedDirectory {
            record,
            rewrite,
            children: pruned,
        })
    }

    /// Adds what is wanted to directories that stay, and makes jobs of the new ones in them.
    fn add(
        &self,
        pruned: PrunedDirectory,
        buffer: &mut String,
    ) -> Result<PartialDirectory, LayOutError> {
        let PrunedDirectory {
            mut record,
            rewrite,
            children: sources,
        } = pruned;
        let fd = record.fd.clone();
        let directory = rewrite.node.directory.clone();
        let new = |source: &EntrySource| *source == EntrySource::New;
        let new_entries = directory.files.iter().zip(&rewrite.files);
        let new_entries = new_entries
            .filter(|(_, source)| new(source))
            .map(|(entry, _)| entry);
        let keys = new_entries.clone().map(|entry| entry.key);
        let mut new_files = self.take_files(rewrite.first_file, keys)?;
        for (entry, file) in new_entries.zip(&mut new_files.list) {
            self.create_file(fd.as_fd(), &entry.key, entry.name.as_str(), file, buffer)?;
        }
        let mut added = std::mem::take(&mut new_files.list).into_iter();
        let old = std::mem::take(&mut record.files.list);
        let files = rewrite.files.iter().filter_map(|source| match source {
            EntrySource::Unchanged(i) => old.get(*i as usize).copied(),
            EntrySource::New => added.next(),
        });
        let gone = rewrite.dropped_files.iter().map(|i| old[*i as usize]);
        record.files.replace(gone, files.collect());
        let mut symlinks = Vec::with_capacity(directory.symlinks.len());
        for ((name, target), source) in directory.symlinks.iter().zip(&rewrite.symlinks) {
            symlinks.push(match source {
                EntrySource::Unchanged(i) => record.symlinks[*i as usize],
                EntrySource::New => create_symlink(fd.as_fd(), name.as_str(), target)?,
            });
        }
        record.symlinks = symlinks.into();
        record.node = rewrite.node;
        let mut children = Vec::with_capacity(sources.len());
        let mut below = Vec::new();
        for (source, (name, _)) in sources.into_iter().zip(&directory.directories) {
            let name = name.as_str();
            match source {
                PrunedDirectorySource::Unchanged(record) => {
                    children.push(LaidOutChild::Whole(record))
                }
                PrunedDirectorySource::New(source) => {
                    children.push(self.place_subtree(&fd, name, source)?)
                }
                PrunedDirectorySource::Pruned(pruned) => {
                    below.push((children.len(), pruned));
                    // A place for it.
                    children.push(LaidOutChild::Pending(u32::MAX));
                }
            }
        }
        let (_, baseline) = root_record::finalize_directory(fd.as_fd()).map_err(error_at("."))?;
        record.baseline = Some(baseline);
        self.enqueue(&fd, &directory.directories, &children);
        for (i, pruned) in below {
            children[i] = LaidOutChild::Partial(Box::new(self.add(*pruned, buffer)?));
        }
        Ok(PartialDirectory { record, children })
    }

    /// Moves a subtree to its place, or makes its directory there.
    fn place_subtree(
        &self,
        fd: &DirectoryFd,
        name: &str,
        source: SubtreeSource,
    ) -> Result<LaidOutChild, LayOutError> {
        let stashed = match source {
            SubtreeSource::NewDirectory(i) => {
                make_directory(fd.as_fd(), name)?;
                return Ok(LaidOutChild::Pending(i));
            }
            SubtreeSource::Stashed(i) => self.unstashed.lock()[i as usize].take(),
            SubtreeSource::Moved(i) => self.dropped.lock()[i as usize].take(),
        };
        let lost = || LayOutError::Disk(name.to_owned(), io::ErrorKind::NotFound.into());
        let stashed = stashed.ok_or_else(lost)?;
        let record = self
            .context
            .root_pool
            .attach_subtree(stashed, fd.as_fd(), name)
            .map_err(error_at(name))?;
        Ok(LaidOutChild::Whole(record))
    }

    /// Makes jobs of those children of a directory that are to be filled.
    fn enqueue(
        &self,
        fd: &Arc<DirectoryFd>,
        names: &[(crate::path::Component, crate::digest::Digest)],
        children: &[LaidOutChild],
    ) {
        let mut jobs: Vec<_> = children
            .iter()
            .zip(names)
            .filter_map(|(child, (name, _))| match child {
                LaidOutChild::Pending(i) if *i != u32::MAX => {
                    Some((fd.clone(), *i, name.as_str().to_owned()))
                }
                _ => None,
            })
            .collect();
        if !jobs.is_empty() {
            self.queue.lock().jobs.append(&mut jobs);
            self.changed.notify_all();
        }
    }

    /// Does jobs until there are none, and no thread may add one.
    fn work(&self, buffer: &mut String) {
        loop {
            let (_working, (parent, directory_index, name)) = {
                let mut queue = self.queue.lock();
                loop {
                    if queue.failed.is_some() {
                        return;
                    }
                    if let Some(job) = queue.jobs.pop() {
                        break (WorkingGuard::new(self, &mut queue), job);
                    }
                    if queue.working == 0 {
                        return;
                    }
                    self.changed.wait(&mut queue);
                }
            };
            let filled = self
                .context
                .root_pool
                .open_directory(&*parent, &name)
                .map_err(error_at(&name))
                .and_then(|fd| self.fill_directory(directory_index, Arc::new(fd), buffer));
            match filled {
                Ok(()) => {}
                Err(LayOutError::MissingFiles(keys)) => self.queue.lock().missing.extend(keys),
                Err(error) => {
                    self.queue.lock().failed.get_or_insert(error);
                }
            }
        }
    }

    /// Makes everything in one directory that was just made, and jobs of the new directories in it.
    fn fill_directory(
        &self,
        directory_index: u32,
        fd: Arc<DirectoryFd>,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let NewDirectory {
            node,
            first_file,
            children: sources,
        } = &self.new_directories[directory_index as usize];
        let directory = &node.directory;
        let mut children = Vec::with_capacity(sources.len());
        for (source, (name, _)) in sources.iter().zip(&directory.directories) {
            children.push(self.place_subtree(&fd, name.as_str(), *source)?);
        }
        let keys = directory.files.iter().map(|file| file.key);
        let mut files = match self.take_files(*first_file, keys) {
            Ok(files) => files,
            Err(error) => {
                self.enqueue(&fd, &directory.directories, &children);
                return Err(error);
            }
        };
        for (entry, file) in directory.files.iter().zip(&mut files.list) {
            self.create_file(fd.as_fd(), &entry.key, entry.name.as_str(), file, buffer)?;
        }
        let mut symlinks = Vec::with_capacity(directory.symlinks.len());
        for (name, target) in &directory.symlinks {
            symlinks.push(create_symlink(fd.as_fd(), name.as_str(), target)?);
        }
        let (inode, baseline) =
            root_record::finalize_directory(fd.as_fd()).map_err(error_at("."))?;
        self.enqueue(&fd, &directory.directories, &children);
        if self.keep {
            let record = DirectoryRecord {
                node: node.clone(),
                fd,
                inode,
                baseline: Some(baseline),
                files,
                symlinks: symlinks.into(),
                children: Vec::new(),
            };
            let partial = PartialDirectory { record, children };
            self.results.lock()[directory_index as usize] = Some(partial);
        }
        Ok(())
    }
}

/// Creates a symbolic link; returns its inode number.
pub(super) fn create_symlink(
    directory: BorrowedFd<'_>,
    name: &str,
    target: &str,
) -> Result<u64, LayOutError> {
    rustix::fs::symlinkat(target, directory, name).map_err(error_at(name))?;
    let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    Ok(stat.map_err(error_at(name))?.st_ino)
}

/// Puts a directory that is laid out together with the results of the jobs below it.
fn assemble(
    partial: PartialDirectory,
    results: &mut [Option<PartialDirectory>],
) -> DirectoryRecord {
    let PartialDirectory {
        mut record,
        children,
    } = partial;
    record.children = children
        .into_iter()
        .map(|child| match child {
            LaidOutChild::Whole(record) => record,
            LaidOutChild::Partial(partial) => assemble(*partial, results),
            LaidOutChild::Pending(i) => assemble_new(i, results),
        })
        .collect();
    record
}

fn assemble_new(directory_index: u32, results: &mut [Option<PartialDirectory>]) -> DirectoryRecord {
    let partial = results[directory_index as usize]
        .take()
        .expect("every job ended well");
    assemble(partial, results)
}
