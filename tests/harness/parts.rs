//! What tests and benchmarks of a worker's parts share: caches with and without a storage, file
//! systems in files, and numbers from a seed.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use bb_remote_execution::{
    config::Endpoint,
    daemon::Failure,
    storage::Backend,
    worker::inputs::file_cache::{CacheLimits, FileCache, FileKey},
};

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn up_to(&mut self, milliseconds: u64) -> Duration {
        Duration::from_millis(self.below(milliseconds + 1))
    }
}

/// In `place`, with limits that nothing here reaches. Its storage is nowhere, and is never asked.
pub fn open_cache(place: &Path) -> FileCache {
    // Only to connect; nobody calls.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let nowhere = Endpoint::Unix("/nonexistent/storage.sock".into());
    let client = {
        let _guard = runtime.enter();
        Backend::connect(&nowhere, &nowhere, Default::default())
    };
    open_cache_of(place, client)
}

pub fn open_cache_of(place: &Path, storage: Backend) -> FileCache {
    let limits = CacheLimits {
        bytes: 1 << 40,
        files: 1 << 24,
        minimum_free: 0,
    };
    FileCache::open(&place.join("cache"), limits, storage).unwrap()
}

/// Brings a file with this content, whose digest `key` has, into the cache; by way of `place`.
pub fn keep(cache: &FileCache, place: &Path, key: FileKey, content: &str) {
    let path = place.join("content");
    fs::write(&path, content).unwrap();
    let parent = fs::File::open(place).unwrap();
    let file = fs::File::open(&path).unwrap();
    cache.add_output(key, &file, false, parent.as_fd(), "content");
}

/// Opens what one process at a time may have open. A process that another test is just starting has our
/// files, and with them the lock, until it runs its program.
pub fn open_again<T>(open: impl Fn() -> Result<T, Failure>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match open() {
            Err(Failure::Environment { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// A file system in a file, mounted by loop; unmounted on drop.
pub struct FileSystem {
    pub at: PathBuf,
}

impl FileSystem {
    /// `None` where it cannot be made or mounted. `options` are mkfs's.
    pub fn mount(kind: &str, megabytes: u64, place: &Path, options: &[&str]) -> Option<Self> {
        let image = place.join(format!("{kind}.image"));
        let at = place.join(kind);
        fs::create_dir(&at).unwrap();
        let file = fs::File::create(&image).unwrap();
        file.set_len(megabytes << 20).unwrap();
        let quiet = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
        let mut make = Command::new(format!("mkfs.{kind}"));
        let made = quiet(make.arg("-q").args(options).arg(&image));
        let mut mount = Command::new("mount");
        let mounted = made && quiet(mount.args(["-o", "loop,noatime"]).arg(&image).arg(&at));
        if !mounted {
            super::skip(&format!("{kind} cannot be made or mounted here"));
        }
        mounted.then(|| FileSystem { at })
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // Threads that remove in the background, and what other tests start just now, have files of it
        // open a little longer; it goes with the last of them.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}
