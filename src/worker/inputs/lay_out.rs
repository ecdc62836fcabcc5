//! Performing a plan.
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
    plan::{self, Child, EntrySource, LayOutPlan, NewDirectory, Origin, Rewrite},
    root_pool::{RootPool, StashedTree},
    root_record::{self, DirectoryFd, DirectoryRecord, RootRecord},
};

/// From so many links on a second thread helps.
const WORTH_A_THREAD: usize = 500;

/// Why a plan could not be performed.
pub(super) enum LayOutError {
    /// Gone from the cache.
    MissingFiles(Vec<FileKey>),
    /// At this name.
    Disk(String, io::Error),
}

pub(super) fn at(name: &str) -> impl FnOnce(rustix::io::Errno) -> LayOutError {
    move |error| LayOutError::Disk(name.to_owned(), error.into())
}

/// A directory some of whose children are yet to come.
struct PartialDirectory {
    kept: DirectoryRecord,
    children: Vec<LaidOutChild>,
}

enum LaidOutChild {
    Whole(DirectoryRecord),
    Partial(Box<PartialDirectory>),
    /// Which of those that are made.
    Pending(u32),
}

/// A directory between removals and additions.
struct PrunedDirectory {
    kept: DirectoryRecord,
    rewrite: Rewrite,
    children: Vec<PrunedChild>,
}

enum PrunedChild {
    Unchanged(DirectoryRecord),
    Pruned(Box<PrunedDirectory>),
    New(Origin),
}

/// What a root is laid out with.
#[derive(Clone, Copy)]
pub(super) struct LayOutContext<'a> {
    pub root_pool: &'a RootPool,
    pub cache: &'a Arc<FileCache>,
    pub threads: usize,
    /// The root's, and so of what is taken out of it: that may be older than what invalidated all.
    pub generation: u64,
}

pub(super) struct LayOut<'a> {
    pub context: LayOutContext<'a>,
    /// Whether the root is kept, and so what is made is remembered.
    keep: bool,
    pub create_mode: CreateMode,
    pub inodes: Mutex<InodeAllocator>,
    /// Taken from before the index of the cache is locked.
    pub pinned: Mutex<PinnedFiles>,
    made: Vec<NewDirectory>,
    pub taken: Mutex<Vec<Option<StashedTree>>>,
    pub dropped: Mutex<Vec<Option<StashedTree>>>,
    pub queue: Mutex<JobQueue>,
    changed: Condvar,
    /// For each of `made`.
    results: Mutex<Vec<Option<PartialDirectory>>>,
}

/// A thread that may yet add jobs. Whoever waits for some learns when it is no more, also by a panic: else
/// the others would wait for ever, and the panic would be told nobody.
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

#[derive(Default)]
pub(super) struct JobQueue {
    /// The last first: so only the ancestors of what is worked on must be open.
    jobs: Vec<(Arc<DirectoryFd>, u32, String)>,
    /// Threads that may yet add jobs.
    working: usize,
    pub missing: Vec<FileKey>,
    failed: Option<LayOutError>,
}

impl<'a> LayOutContext<'a> {
    /// Turns a root into another one. What was dropped goes to the idle roots. When not to `keep`, no
    /// model comes back, and no more directories are open than must be.
    pub(super) fn perform(
        &self,
        root: RootRecord,
        mut plan: LayOutPlan<StashedTree>,
        pinned: PinnedFiles,
        keep: bool,
        create_mode: CreateMode,
    ) -> Result<Option<RootRecord>, LayOutError> {
        let Some(rewrite) = plan.rewrite.take() else {
            return Ok(keep.then_some(root));
        };
        let (moved, links) = (std::mem::take(&mut plan.moved), plan.links.len());
        let RootRecord { top, inodes, .. } = root;
        let lay_out = LayOut::new(*self, plan, pinned, inodes, keep, create_mode);
        let result = lay_out.run(top, rewrite, &moved, links);
        let LayOut {
            inodes,
            taken,
            dropped,
            ..
        } = lay_out;
        let dropped = dropped.into_inner().into_iter().flatten();
        self.root_pool.add_stashed(dropped);
        // After an error: it may have been changed.
        for stashed in taken.into_inner().into_iter().flatten() {
            self.root_pool.delete_stashed(stashed);
        }
        let kept = result?.map(|top| RootRecord {
            top,
            inodes: inodes.into_inner(),
            create_mode,
        });
        Ok(kept)
    }

    /// Makes a directory that an action removed, with all that is in it.
    pub(super) fn make_again(
        &self,
        parent: BorrowedFd<'_>,
        name: &str,
        node: &Tree,
        inodes: &mut InodeAllocator,
        create_mode: CreateMode,
    ) -> Result<DirectoryRecord, LayOutError> {
        let plan = plan::fresh(node);
        let pinned = self.cache.pin(&plan.links);
        let pinned = pinned.map_err(|error| LayOutError::Disk(name.to_owned(), error))?;
        // On an error the whole root is given up.
        let inodes_before = std::mem::take(inodes);
        let lay_out = LayOut::new(*self, plan, pinned, inodes_before, true, create_mode);
        make(parent, name)?;
        let fd = self
            .root_pool
            .open_directory(parent, name)
            .map_err(at(name))?;
        let mut buffer = String::new();
        lay_out.fill(0, Arc::new(fd), &mut buffer)?;
        lay_out.work(&mut buffer);
        lay_out.outcome()?;
        *inodes = lay_out.inodes.into_inner();
        Ok(assemble_made(0, &mut lay_out.results.into_inner()))
    }
}

fn make(parent: BorrowedFd<'_>, name: &str) -> Result<(), LayOutError> {
    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o777)).map_err(at(name))
}

impl<'a> LayOut<'a> {
    fn new(
        context: LayOutContext<'a>,
        plan: LayOutPlan<StashedTree>,
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
            taken: Mutex::new(plan.taken.into_iter().map(Some).collect()),
            dropped: Mutex::new((0..plan.dropped).map(|_| None).collect()),
            queue: Mutex::default(),
            changed: Condvar::new(),
            results: Mutex::new(plan.made.iter().map(|_| None).collect()),
            made: plan.made,
        }
    }

    fn run(
        &self,
        root: DirectoryRecord,
        rewrite: Rewrite,
        moved: &[u32],
        links: usize,
    ) -> Result<Option<DirectoryRecord>, LayOutError> {
        let pruned = self.remove(root, rewrite)?;
        let mut buffer = String::new();
        self.resolve_inode_conflicts(moved, &mut buffer)?;
        let helpers = match links >= WORTH_A_THREAD {
            true => self.context.threads.saturating_sub(1),
            false => 0,
        };
        let adding = WorkingGuard::new(self, &mut self.queue.lock());
        let partial = std::thread::scope(|scope| {
            for _ in 0..helpers {
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
        mut kept: DirectoryRecord,
        mut rewrite: Rewrite,
    ) -> Result<PrunedDirectory, LayOutError> {
        let directory = kept.node.directory.clone();
        let fd = kept.fd.clone();
        for &i in &rewrite.dropped_files {
            if let InputFileKind::HardLink(file, number) = kept.files.list[i as usize].kind() {
                self.inodes.lock().free(file, number);
            }
            let name = directory.files[i as usize].name.as_str();
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(at(name))?;
        }
        for &i in &rewrite.dropped_symlinks {
            let name = directory.symlinks[i as usize].0.as_str();
            rustix::fs::unlinkat(&*fd, name, AtFlags::empty()).map_err(at(name))?;
        }
        let mut children: Vec<Option<DirectoryRecord>> = std::mem::take(&mut kept.children)
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
                rustix::fs::unlinkat(&*fd, name, AtFlags::REMOVEDIR).map_err(at(name))?;
                continue;
            }
            let stashed = self
                .context
                .root_pool
                .stash(
                    fd.as_fd(),
                    name,
                    child,
                    self.create_mode,
                    self.context.generation,
                )
                .map_err(at(name))?;
            self.dropped.lock()[dropped.number as usize] = Some(stashed);
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
                Child::Unchanged(i) => PrunedChild::Unchanged(take(i)?),
                Child::Rewritten(i, rewrite) => {
                    PrunedChild::Pruned(Box::new(self.remove(take(i)?, *rewrite)?))
                }
                Child::New(origin) => PrunedChild::New(origin),
            });
        }
        Ok(PrunedDirectory {
            kept,
            rewrite,
            children: pruned,
        })
    }

    /// Adds what is wanted to directories that were there, and makes jobs of the others.
    fn add(
        &self,
        pruned: PrunedDirectory,
        buffer: &mut String,
    ) -> Result<PartialDirectory, LayOutError> {
        let PrunedDirectory {
            mut kept,
            rewrite,
            children,
        } = pruned;
        let fd = kept.fd.clone();
        let directory = rewrite.node.directory.clone();
        let new = |source: &EntrySource| *source == EntrySource::New;
        let wanted = directory.files.iter().zip(&rewrite.files);
        let wanted = wanted
            .filter(|(_, source)| new(source))
            .map(|(file, _)| file);
        let keys = wanted.clone().map(|file| file.key);
        let mut fresh = self.take_files(rewrite.first_link, keys)?;
        for (file, link) in wanted.zip(&mut fresh.list) {
            self.link(fd.as_fd(), &file.key, file.name.as_str(), link, buffer)?;
        }
        let mut added = std::mem::take(&mut fresh.list).into_iter();
        let old = std::mem::take(&mut kept.files.list);
        let files = rewrite.files.iter().filter_map(|source| match source {
            EntrySource::Unchanged(i) => old.get(*i as usize).copied(),
            EntrySource::New => added.next(),
        });
        let gone = rewrite.dropped_files.iter().map(|i| old[*i as usize]);
        kept.files.replace(gone, files.collect());
        let mut symlinks = Vec::with_capacity(directory.symlinks.len());
        for ((name, target), source) in directory.symlinks.iter().zip(&rewrite.symlinks) {
            symlinks.push(match source {
                EntrySource::Unchanged(i) => kept.symlinks[*i as usize],
                EntrySource::New => make_symlink(fd.as_fd(), name.as_str(), target)?,
            });
        }
        kept.symlinks = symlinks.into();
        kept.node = rewrite.node;
        let mut stays = Vec::with_capacity(children.len());
        let mut below = Vec::new();
        for (child, (name, _)) in children.into_iter().zip(&directory.directories) {
            let name = name.as_str();
            match child {
                PrunedChild::Unchanged(kept) => stays.push(LaidOutChild::Whole(kept)),
                PrunedChild::New(origin) => stays.push(self.place_subtree(&fd, name, origin)?),
                PrunedChild::Pruned(pruned) => {
                    below.push((stays.len(), pruned));
                    // A place for it.
                    stays.push(LaidOutChild::Pending(u32::MAX));
                }
            }
        }
        let (_, baseline) = root_record::record_baseline(fd.as_fd()).map_err(at("."))?;
        kept.baseline = Some(baseline);
        self.enqueue(&fd, &directory.directories, &stays);
        for (i, pruned) in below {
            stays[i] = LaidOutChild::Partial(Box::new(self.add(*pruned, buffer)?));
        }
        Ok(PartialDirectory {
            kept,
            children: stays,
        })
    }

    /// A subtree comes to its place, or at least its directory.
    fn place_subtree(
        &self,
        fd: &DirectoryFd,
        name: &str,
        origin: Origin,
    ) -> Result<LaidOutChild, LayOutError> {
        let stashed = match origin {
            Origin::NewDirectory(i) => {
                make(fd.as_fd(), name)?;
                return Ok(LaidOutChild::Pending(i));
            }
            Origin::Stashed(i) => self.taken.lock()[i as usize].take(),
            Origin::Moved(i) => self.dropped.lock()[i as usize].take(),
        };
        let lost = || LayOutError::Disk(name.to_owned(), io::ErrorKind::NotFound.into());
        let stashed = stashed.ok_or_else(lost)?;
        let kept = self
            .context
            .root_pool
            .unstash(stashed, fd.as_fd(), name)
            .map_err(at(name))?;
        Ok(LaidOutChild::Whole(kept))
    }

    fn enqueue(
        &self,
        fd: &Arc<DirectoryFd>,
        names: &[(crate::path::Component, crate::digest::Digest)],
        stays: &[LaidOutChild],
    ) {
        let mut jobs: Vec<_> = stays
            .iter()
            .zip(names)
            .filter_map(|(stay, (name, _))| match stay {
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

    fn work(&self, buffer: &mut String) {
        loop {
            let (_working, (parent, made, name)) = {
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
                .map_err(at(&name))
                .and_then(|fd| self.fill(made, Arc::new(fd), buffer));
            match filled {
                Ok(()) => {}
                Err(LayOutError::MissingFiles(keys)) => self.queue.lock().missing.extend(keys),
                Err(error) => {
                    self.queue.lock().failed.get_or_insert(error);
                }
            }
        }
    }

    /// Everything of one directory that was just made, but what is below.
    fn fill(
        &self,
        made: u32,
        fd: Arc<DirectoryFd>,
        buffer: &mut String,
    ) -> Result<(), LayOutError> {
        let NewDirectory {
            node,
            first_link,
            children,
        } = &self.made[made as usize];
        let directory = &node.directory;
        let mut stays = Vec::with_capacity(children.len());
        for (origin, (name, _)) in children.iter().zip(&directory.directories) {
            stays.push(self.place_subtree(&fd, name.as_str(), *origin)?);
        }
        let keys = directory.files.iter().map(|file| file.key);
        let mut files = match self.take_files(*first_link, keys) {
            Ok(files) => files,
            Err(error) => {
                self.enqueue(&fd, &directory.directories, &stays);
                return Err(error);
            }
        };
        for (file, link) in directory.files.iter().zip(&mut files.list) {
            self.link(fd.as_fd(), &file.key, file.name.as_str(), link, buffer)?;
        }
        let mut symlinks = Vec::with_capacity(directory.symlinks.len());
        for (name, target) in &directory.symlinks {
            symlinks.push(make_symlink(fd.as_fd(), name.as_str(), target)?);
        }
        let (inode, baseline) = root_record::record_baseline(fd.as_fd()).map_err(at("."))?;
        self.enqueue(&fd, &directory.directories, &stays);
        if self.keep {
            let kept = DirectoryRecord {
                node: node.clone(),
                fd,
                inode,
                baseline: Some(baseline),
                files,
                symlinks: symlinks.into(),
                children: Vec::new(),
            };
            self.results.lock()[made as usize] = Some(PartialDirectory {
                kept,
                children: stays,
            });
        }
        Ok(())
    }
}

/// Returns its inode number.
pub(super) fn make_symlink(
    directory: BorrowedFd<'_>,
    name: &str,
    target: &str,
) -> Result<u64, LayOutError> {
    rustix::fs::symlinkat(target, directory, name).map_err(at(name))?;
    let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    Ok(stat.map_err(at(name))?.st_ino)
}

fn assemble(
    partial: PartialDirectory,
    results: &mut [Option<PartialDirectory>],
) -> DirectoryRecord {
    let PartialDirectory { mut kept, children } = partial;
    kept.children = children
        .into_iter()
        .map(|stay| match stay {
            LaidOutChild::Whole(kept) => kept,
            LaidOutChild::Partial(partial) => assemble(*partial, results),
            LaidOutChild::Pending(i) => assemble_made(i, results),
        })
        .collect();
    kept
}

fn assemble_made(made: u32, results: &mut [Option<PartialDirectory>]) -> DirectoryRecord {
    let partial = results[made as usize].take().expect("every job ended well");
    assemble(partial, results)
}
