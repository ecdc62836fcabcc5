//! The files: death, damage, eviction, and a full disk.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bb_remote_execution::{
    daemon::Failure,
    digest::Digest,
    proto::reapi::{ActionResult, OutputFile},
    storage::{
        Content, Error,
        embedded::{self, Store},
        grpc::{Client, Options},
    },
};

use super::{ANYWHERE, GIB, StoreProcess, content, instance, sha256};

use crate::harness::{
    self,
    parts::{FileSystem, open_again},
};

const MIB: u64 = 1 << 20;

fn open(directory: &Path, size: u64) -> Store {
    open_again(|| Store::open(directory, size))
}

fn put(store: &Store, data: &[u8]) -> Result<Digest, Error> {
    let digest = sha256(data);
    store.put(&[(digest, data.to_vec().into())]).remove(0)?;
    Ok(digest)
}

fn on_disk(directory: &Path) -> u64 {
    walkdir::WalkDir::new(directory)
        .into_iter()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(|metadata| metadata.is_file())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

fn files(directory: &Path) -> Vec<PathBuf> {
    walkdir::WalkDir::new(directory)
        .into_iter()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().is_file())
        .map(walkdir::DirEntry::into_path)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9_and_nothing_torn_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let name = instance("");
    let mut acknowledged: BTreeMap<Digest, Vec<u8>> = BTreeMap::new();
    let mut tried = Vec::new();
    for round in 0..5u64 {
        let child = StoreProcess::start(directory.path(), ANYWHERE, GIB);
        let client = Client::connect(&child.endpoint(), &child.endpoint(), Options::default());
        let (sender, mut done) = tokio::sync::mpsc::unbounded_channel();
        let mut writers = Vec::new();
        for writer in 0..8u64 {
            let (client, name, sender) = (client.clone(), name.clone(), sender.clone());
            writers.push(tokio::spawn(async move {
                for i in 0.. {
                    let size = [10, 1000, 50_000, 100_000, 1 << 20][i as usize % 5];
                    let data = content(round << 40 | writer << 32 | i, size);
                    let digest = sha256(&data);
                    let blobs = vec![(digest, Content::Bytes(data.clone().into()))];
                    let _ = sender.send((digest, data, false));
                    if client.upload(&name, blobs).await.is_err() {
                        return;
                    }
                    let _ = sender.send((digest, Vec::new(), true));
                }
            }));
        }
        drop(sender);
        tokio::time::sleep(Duration::from_millis(150 + 50 * round)).await;
        drop(child);
        for writer in writers {
            writer.abort();
            let _ = writer.await;
        }
        let mut sent = BTreeMap::new();
        while let Some((digest, data, is_acknowledged)) = done.recv().await {
            if is_acknowledged {
                acknowledged.insert(digest, sent.remove(&digest).unwrap());
            } else {
                sent.insert(digest, data);
            }
        }
        tried.extend(sent);
        let store = open(directory.path(), GIB);
        for (digest, data) in &acknowledged {
            assert_eq!(&store.read(digest, GIB).unwrap(), data, "{digest}");
        }
        // Those whose writers saw no answer are there as a whole or not at all.
        for (digest, data) in &tried {
            match store.read(digest, GIB) {
                Ok(read) => assert_eq!(&read, data, "{digest}"),
                Err(error) => assert!(matches!(error, Error::Missing(_)), "{error}"),
            }
        }
        assert_eq!(
            files(&directory.path().join("uploads")),
            Vec::<PathBuf>::new()
        );
    }
    assert!(acknowledged.len() > 50, "{}", acknowledged.len());
}

#[test]
fn a_flipped_bit_is_never_served_and_the_blob_can_be_uploaded_again() {
    for (size, position) in [(3000, 0), (3000, 2999), (300_000, 0), (300_000, 299_999)] {
        let directory = tempfile::tempdir().unwrap();
        let data = content(1, size);
        let store = open(directory.path(), GIB);
        let digest = put(&store, &data).unwrap();
        assert_eq!(store.read(&digest, GIB).unwrap(), data);
        // While the store is open.
        let all = files(directory.path());
        let found = all.iter().find_map(|path| {
            let bytes = fs::read(path).unwrap();
            let at = bytes.windows(20).position(|window| window == &data[..20])?;
            Some((path, at))
        });
        let (path, at) = found.unwrap();
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, (at + position) as u64)
            .unwrap();
        file.write_all_at(&[byte[0] ^ 4], (at + position) as u64)
            .unwrap();
        let error = store.read(&digest, GIB).unwrap_err();
        assert!(matches!(error, Error::Missing(missing) if missing == [digest]));
        assert_eq!(store.find_missing(&[digest]), [digest]);
        drop(store);
        let store = open(directory.path(), GIB);
        assert!(!store.contains(&digest));
        put(&store, &data).unwrap();
        assert_eq!(store.read(&digest, GIB).unwrap(), data);
        drop(store);
        let store = open(directory.path(), GIB);
        assert_eq!(store.read(&digest, GIB).unwrap(), data);
    }
}

#[test]
fn files_cut_or_filled_with_zeros_as_by_a_loss_of_power_are_not_served() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), GIB);
    let blobs: Vec<Vec<u8>> = (0..40).map(|i| content(i, 100 << (i % 12))).collect();
    let digests: Vec<Digest> = blobs
        .iter()
        .map(|data| put(&store, data).unwrap())
        .collect();
    drop(store);
    for (i, path) in files(directory.path()).into_iter().enumerate() {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "lock" || name == "format" {
            continue;
        }
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        match i % 3 {
            0 => file.set_len(length / 2).unwrap(),
            1 => file
                .write_all_at(&vec![0; length as usize / 2], length / 2)
                .unwrap(),
            _ => file.write_all_at(&[0xa5; 700], length / 3).unwrap(),
        }
    }
    let store = open(directory.path(), GIB);
    for (digest, data) in digests.iter().zip(&blobs) {
        match store.read(digest, GIB) {
            Ok(read) => assert_eq!(&read, data),
            Err(error) => assert!(matches!(error, Error::Missing(_)), "{error}"),
        }
        put(&store, data).unwrap();
        assert_eq!(&store.read(digest, GIB).unwrap(), data);
    }
}

#[test]
fn the_size_is_kept_and_what_was_used_lately_stays() {
    let size = 64 * MIB;
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), size);
    let asked = put(&store, &content(1 << 40, 5000)).unwrap();
    let asked_large = put(&store, &content(2 << 40, 500_000)).unwrap();
    let read = put(&store, &content(3 << 40, 5000)).unwrap();
    let output = put(&store, &content(4 << 40, 5000)).unwrap();
    let forgotten = put(&store, &content(5 << 40, 5000)).unwrap();
    let forgotten_large = put(&store, &content(6 << 40, 500_000)).unwrap();
    let action = sha256(b"action");
    let result = ActionResult {
        output_files: vec![OutputFile {
            digest: Some(output.to_proto()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let name = instance("");
    store.update_action_result(&name, &action, &result).unwrap();
    // Somebody reads what is about to be evicted.
    let held = store.blob(&forgotten_large).unwrap();
    let mut written = 0;
    for i in 0.. {
        let length = [700, 20_000, 3000, 400_000, 65_536][i as usize % 5];
        put(&store, &content(i, length)).unwrap();
        written += length as u64;
        if i % 100 == 0 {
            assert!(
                on_disk(directory.path()) <= size,
                "{}",
                on_disk(directory.path())
            );
            assert_eq!(store.find_missing(&[asked, asked_large]), []);
            store.read(&read, MIB).unwrap();
            assert_eq!(
                store.action_result(&name, &action).unwrap(),
                Some(result.clone())
            );
        }
        if written > 6 * size {
            break;
        }
    }
    assert!(store.contains(&output));
    assert!(!store.contains(&forgotten));
    assert!(!store.contains(&forgotten_large));
    assert_eq!(held.read(0, MIB).unwrap(), content(6 << 40, 500_000));
    // It does not throw away more than it must.
    assert!(store.used() > size / 4 * 3, "{}", store.used());
    let used = store.used();
    let actual = on_disk(directory.path());
    assert!(actual.abs_diff(used) < size / 20, "{used} {actual}");
    // A start makes room where an upload was about to; and then there is none to be made.
    drop(store);
    let store = open(directory.path(), size);
    assert!(store.used() > size / 4 * 3, "{}", store.used());
    let count = store.count();
    drop(store);
    let store = open(directory.path(), size);
    assert!(store.count() >= count, "{} of {count}", store.count());
    assert!(store.contains(&asked));
}

#[test]
fn the_order_of_use_survives_a_restart() {
    let size = 16 * MIB;
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), size);
    let first: Vec<Digest> = (0..40)
        .map(|i| put(&store, &content(i, 100_000)).unwrap())
        .collect();
    let second: Vec<Digest> = (40..80)
        .map(|i| put(&store, &content(i, 100_000)).unwrap())
        .collect();
    // The older half is used once more, after something else was written.
    put(&store, &content(1000, 100_000)).unwrap();
    assert_eq!(store.find_missing(&first), []);
    drop(store);
    let store = open(directory.path(), size);
    for i in 2000..2080 {
        put(&store, &content(i, 100_000)).unwrap();
    }
    let gone = |digests: &[Digest]| digests.iter().filter(|d| !store.contains(d)).count();
    assert_eq!(gone(&first), 0);
    assert!(gone(&second) > 10, "{}", gone(&second));
}

#[test]
fn a_store_that_may_hold_less_than_before_shrinks_when_it_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), 256 * MIB);
    let digests: Vec<Digest> = (0..1000)
        .map(|i| put(&store, &content(i, 50_000 + i as usize * 20)).unwrap())
        .collect();
    drop(store);
    let store = open(directory.path(), 32 * MIB);
    assert!(store.used() < 32 * MIB, "{}", store.used());
    assert!(on_disk(directory.path()) <= 32 * MIB);
    assert!(store.contains(digests.last().unwrap()));
    for digest in &digests {
        if store.contains(digest) {
            store.read(digest, MIB).unwrap();
        }
    }
}

#[test]
fn many_writers_and_readers_at_once_lose_nothing_while_room_is_made() {
    let size = 24 * MIB;
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(open(directory.path(), size));
    std::thread::scope(|scope| {
        for writer in 0..6u64 {
            let store = &store;
            scope.spawn(move || {
                for i in 0..400u64 {
                    let length = [300, 5000, 60_000, 90_000][(i % 4) as usize];
                    let data = content(writer << 32 | i, length);
                    let before = store.counts().written.get();
                    let digest = put(store, &data).unwrap();
                    // The same blob from several writers, too.
                    put(store, &content(i, 80_000)).unwrap();
                    // What was just written is the last to go: not before the others have filled the store.
                    match store.read(&digest, MIB) {
                        Ok(read) => assert_eq!(read, data),
                        Err(Error::Missing(_)) => {
                            let since = store.counts().written.get() - before;
                            assert!(since > size / 2, "gone after {since} bytes");
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(on_disk(directory.path()) <= size);
}

#[test]
fn a_full_disk_is_named_and_the_store_goes_on() {
    if !nix::unistd::geteuid().is_root() {
        crate::harness::skip("a small file system needs root");
        return;
    }
    struct Mount(PathBuf);
    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = nix::mount::umount(&self.0);
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let none: Option<&str> = None;
    let options = Some("size=48m");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(none, directory.path(), Some("tmpfs"), flags, options).unwrap();
    let mount = Mount(directory.path().to_owned());
    let place = mount.0.join("store");
    let ballast = mount.0.join("ballast");
    fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    // Segments of a quarter MiB.
    let store = open(&place, 50 * MIB);
    for length in [10_000, 1_000_000] {
        let mut kept = Vec::new();
        let error = (0..)
            .find_map(|i| {
                let data = content(length << 20 | i, length as usize);
                match put(&store, &data) {
                    Ok(digest) => {
                        kept.push((digest, data));
                        None
                    }
                    Err(error) => Some(error),
                }
            })
            .unwrap();
        assert!(
            matches!(&error, Error::Full(text) if text.contains(place.to_str().unwrap())),
            "{error}"
        );
        for (digest, data) in &kept {
            assert_eq!(&store.read(digest, MIB).unwrap(), data);
        }
        assert_eq!(files(&place.join("uploads")), Vec::<PathBuf>::new());
        // Somebody makes room.
        if fs::remove_file(&ballast).is_ok() {
            for i in 0..3 {
                put(&store, &content(length << 21 | i, length as usize)).unwrap();
            }
        }
    }
    drop(store);
    drop(open(&place, 50 * MIB));
}

#[test]
fn a_directory_in_use_or_of_another_version_is_refused_with_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), GIB);
    let in_use = [
        Store::open(directory.path(), GIB).err().unwrap(),
        embedded::probe(directory.path(), MIB).remove(0),
    ];
    for failure in in_use {
        let Failure::Environment { message } = failure else {
            panic!("{failure}");
        };
        assert!(message.contains("stop it"), "{message}");
        assert!(
            message.contains(directory.path().to_str().unwrap()),
            "{message}"
        );
    }
    drop(store);
    assert_eq!(embedded::probe(directory.path(), MIB), []);
    let failures = embedded::probe(directory.path(), 1 << 60);
    assert!(
        matches!(
            &failures[..],
            [Failure::Configuration {
                key: "storage.embedded.maximum_size",
                ..
            }]
        ),
        "{failures:?}"
    );
    assert_eq!(
        embedded::probe(&directory.path().join("not/yet/there"), MIB),
        []
    );
    assert!(!directory.path().join("not").exists());

    fs::write(directory.path().join("format"), "something else 7\n").unwrap();
    let failure = Store::open(directory.path(), GIB).err().unwrap();
    assert!(
        failure.to_string().contains("something else 7"),
        "{failure}"
    );
    assert_eq!(embedded::probe(directory.path(), MIB), [failure]);
    let file = directory.path().join("format");
    assert!(Store::open(&file, GIB).is_err());
    assert_eq!(embedded::probe(&file, MIB).len(), 1);
}

#[test]
fn what_the_disk_cannot_give_any_more_is_missing_and_the_rest_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), GIB);
    let small = put(&store, &content(1, 50_000)).unwrap();
    let large = put(&store, &content(2, 3_000_000)).unwrap();
    // A mapping of what is cut off would be SIGBUS, as one of a bad sector is.
    for file in files(directory.path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        if name.ends_with(".data") || name.ends_with("-3000000") {
            let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
            file.set_len(0).unwrap();
        }
    }
    for digest in [small, large] {
        assert!(matches!(store.read(&digest, GIB), Err(Error::Missing(_))));
        assert_eq!(store.find_missing(&[digest]), [digest]);
    }
    let again = put(&store, &content(2, 3_000_000)).unwrap();
    assert_eq!(store.read(&again, GIB).unwrap(), content(2, 3_000_000));
}

#[test]
fn others_who_fill_the_file_system_make_the_store_smaller_before_it_is_full() {
    let place = tempfile::tempdir_in("/var/tmp").unwrap();
    if !harness::is_root() {
        return;
    }
    let Some(disk) = FileSystem::mount("ext4", 128, place.path(), &["-m", "0"]) else {
        return;
    };
    let free = || {
        let stat = rustix::fs::statvfs(&disk.at).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let minimum_free = 24 * MIB;
    let directory = disk.at.join("store");
    let store = Store::open_leaving(&directory, 100 * MIB, minimum_free).unwrap();
    for seed in 0..40 {
        put(&store, &content(seed, 1 << 20)).unwrap();
    }
    assert!(store.used() > 35 * MIB);
    let ballast = vec![0; usize::try_from(free().saturating_sub(10 * MIB)).unwrap()];
    fs::write(disk.at.join("ballast"), ballast).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while free() < minimum_free {
        assert!(std::time::Instant::now() < deadline, "{} are free", free());
        std::thread::sleep(Duration::from_millis(100));
    }
    // Blobs are taken as before, in place of older ones.
    for seed in 100..120 {
        let digest = put(&store, &content(seed, 1 << 20)).unwrap();
        assert_eq!(store.find_missing(&[digest]), []);
    }
    assert!(free() >= minimum_free / 2, "{} are free", free());
    fs::remove_file(disk.at.join("ballast")).unwrap();
    drop(store);
}

#[test]
fn a_store_that_its_file_system_makes_small_evicts_what_is_oldest_as_others_do() {
    let place = tempfile::tempdir_in("/var/tmp").unwrap();
    if !harness::is_root() {
        return;
    }
    let Some(disk) = FileSystem::mount("ext4", 640, place.path(), &["-m", "0"]) else {
        return;
    };
    // A segment of so large a store takes much of what there is.
    let store = Store::open_leaving(&disk.at.join("store"), 8 * GIB, 64 * MIB).unwrap();
    let mut last = put(&store, &content(0, 100)).unwrap();
    for seed in 1..4 {
        last = put(&store, &content(seed, 200 << 20)).unwrap();
    }
    assert_eq!(store.find_missing(&[last]), []);
    for seed in 10..120 {
        let digest = put(&store, &content(seed, 1 << 20)).unwrap();
        assert_eq!(store.find_missing(&[digest]), []);
    }
    drop(store);
}
