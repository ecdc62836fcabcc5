//! Opening a store: the lock, the layout's version, and what is there.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::{Mutex, RwLock};
use rustix::fs::FlockOperation;

use super::{
    active_segment::ActiveSegment,
    ceiling::Ceiling,
    file,
    index::{Index, IndexEntry, Location},
    instance_limits::InstanceLimits,
    recency,
    segment::{self, Records, Segment},
    space::{AbandonUpload, Space, segment_capacity},
};
use crate::{
    config::{Size, scheduler::Embedded},
    daemon::{
        Failure,
        disk::{blocking_path, nearest_directory},
    },
};

const DIRECTORY_KEY: &str = "storage.embedded.directory";
const SIZE_KEY: &str = "storage.embedded.maximum_size";
const FORMAT: &str = "bb_scheduler storage 1\n";

/// What would keep the store from being opened, or from holding as much as it may. Changes nothing.
pub fn probe(directory: &Path, maximum_size: u64) -> Vec<Failure> {
    if let Some(file) = blocking_path(directory) {
        return vec![failure(format!(
            "{} is no directory; choose another path",
            file.display()
        ))];
    }
    // The directory, or where it would be created.
    let existing = nearest_directory(directory);
    let mut failures = Vec::new();
    if rustix::fs::access(&existing, rustix::fs::Access::WRITE_OK).is_err() {
        failures.push(failure(format!(
            "this user may not write in {}; change its owner, or choose another path",
            existing.display()
        )));
    }
    if existing == directory {
        match check_format(directory) {
            Ok(_) => {}
            Err(error) => failures.push(error),
        }
        if let Ok(file) = File::open(directory.join("lock"))
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
        {
            failures.push(in_use(directory));
        }
    }
    match (rustix::fs::statvfs(&existing), taken(directory)) {
        (Ok(stat), taken) if stat.f_bavail * stat.f_frsize + taken < maximum_size => {
            failures.push(Failure::Configuration {
                key: SIZE_KEY,
                message: format!(
                    "it is {}, but the file system of {} has only {} left for this store; lower it, or free space there",
                    Size(maximum_size),
                    directory.display(),
                    Size((stat.f_bavail * stat.f_frsize + taken) >> 20 << 20),
                ),
            });
        }
        (Ok(_), _) => {}
        (Err(error), _) => failures.push(failure(format!(
            "could not read the free space of {}: {error}",
            existing.display()
        ))),
    }
    failures
}

/// Bytes that an existing store takes on disk.
fn taken(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    walkdir::WalkDir::new(directory)
        .into_iter()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

fn failure(message: String) -> Failure {
    Failure::Configuration {
        key: DIRECTORY_KEY,
        message,
    }
}

fn in_use(directory: &Path) -> Failure {
    Failure::Environment {
        message: format!(
            "another process uses {}; stop it (fuser {}/lock names it), or set {DIRECTORY_KEY} to a directory of its own",
            directory.display(),
            directory.display(),
        ),
    }
}

/// True when the store is there already.
fn check_format(directory: &Path) -> Result<bool, Failure> {
    match fs::read_to_string(directory.join("format")) {
        Ok(text) if text == FORMAT => Ok(true),
        Ok(text) => Err(failure(format!(
            "{} holds a store of another version, {:?}; empty it, or choose another directory",
            directory.display(),
            text.trim_end()
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failure(format!(
            "could not read {}: {error}",
            directory.join("format").display()
        ))),
    }
}

pub(super) fn open(
    config: &Embedded,
    abandon_upload: Box<AbandonUpload>,
) -> Result<Space, Failure> {
    let directory = &*config.directory;
    let trouble = |error: io::Error| {
        failure(format!(
            "could not open the store in {}: {error}",
            directory.display()
        ))
    };
    fs::create_dir_all(directory).map_err(trouble)?;
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("lock"))
        .map_err(trouble)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(in_use(directory)),
        Err(error) => return Err(trouble(error.into())),
    }
    if !check_format(directory)? {
        // Written aside first, so that it is there as a whole or not at all.
        let temporary = directory.join("format.new");
        fs::write(&temporary, FORMAT)
            .and_then(|()| fs::rename(&temporary, directory.join("format")))
            .map_err(trouble)?;
    }
    let limits = InstanceLimits::new(&config.instance_limits)?;
    read(config, limits, abandon_upload, lock).map_err(trouble)
}

/// Reads the index, and takes up the last segment where it ends.
fn read(
    config: &Embedded,
    limits: InstanceLimits,
    abandon_upload: Box<AbandonUpload>,
    lock: File,
) -> io::Result<Space> {
    let (directory, maximum_size) = (&*config.directory, config.maximum_size.0);
    let minimum_free = config.minimum_free.0;
    let segments = directory.join("segments");
    let files = directory.join("files");
    let uploads = directory.join("uploads");
    fs::create_dir_all(&segments)?;
    file::prepare(&files)?;
    if uploads.exists() {
        fs::remove_dir_all(&uploads)?;
    }
    fs::create_dir(&uploads)?;

    let recency = recency::load(directory);
    let known = |short: u64| recency.as_ref().and_then(|r| r.used.get(&short).copied());
    let space = Space {
        directory: directory.to_owned(),
        maximum_size,
        minimum_free,
        ceiling: Mutex::new(Ceiling::new(minimum_free)),
        ceiling_bytes: AtomicU64::new(u64::MAX),
        index: Index::new(),
        limits,
        segments: RwLock::new(BTreeMap::new()),
        active: Mutex::new(None),
        used: AtomicU64::new(0),
        written: AtomicU64::new(recency.as_ref().map_or(0, |recency| recency.written)),
        next_segment: AtomicU32::new(0),
        next_upload: AtomicU64::new(0),
        abandon_upload,
        reclaiming: Mutex::new(()),
        segment_request: Default::default(),
        segment_creation: Mutex::new(()),
        file_locks: std::array::from_fn(|_| Mutex::new(())),
        maintenance: Default::default(),
        counts: Default::default(),
        ages: Default::default(),
        lock,
        is_gone: AtomicBool::new(false),
    };
    let mut latest = space.now();
    for number in segment::list(&segments)? {
        space.next_segment.store(number + 1, Ordering::Relaxed);
        let segment = match Segment::open(&segments, number) {
            Ok(segment) => Arc::new(segment),
            Err(error) => {
                tracing::error!(segment = number, %error, "could not read a segment; its blobs are missing");
                continue;
            }
        };
        space.used.fetch_add(segment.disk(), Ordering::Relaxed);
        space.segments.write().insert(number, segment.clone());
        let Records { records, end, .. } = segment.records();
        for (slot, record) in records {
            latest = latest.max(record.used);
            let used = known(record.key.short()).unwrap_or(record.used);
            let place = Location::of_record(number, slot, &record);
            space.set_location(&IndexEntry {
                key: record.key,
                size: record.size,
                place,
                used,
                limit: record.limit,
            });
        }
        let previous = space.active.lock().replace(ActiveSegment { segment, end });
        if let Some(previous) = previous
            && let Ok(freed) = previous.segment.seal(previous.end)
        {
            space.used.fetch_sub(freed, Ordering::Relaxed);
        }
    }
    let clock = (u64::from(latest) + 1) * space.tick();
    space.written.fetch_max(clock, Ordering::Relaxed);
    for (key, size, limit) in file::list(&files)? {
        space
            .used
            .fetch_add(file::footprint(size), Ordering::Relaxed);
        let used = known(key.short()).unwrap_or_else(|| space.now());
        space.set_location(&IndexEntry {
            key,
            size,
            place: Location::File,
            used,
            limit,
        });
    }
    if let Some(active) = space.active.lock().as_ref()
        && active.segment.capacity() > segment_capacity(maximum_size)
    {
        tracing::debug!("the last segment is larger than new ones will be");
    }
    space.measure_free_space(Instant::now());
    // What was evicted is in its segment still, and counts again.
    for limit in space.limits.ids() {
        space.keep_limit(limit);
    }
    space.reclaim();
    Ok(space)
}
