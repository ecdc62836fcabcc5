//! Files of the cache whose content is not what it was: no action is given them for long, and nobody
//! has to look after that.

use std::{
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use bb_remote_execution::{
    config::worker::Inputs,
    proto::{reapi::ExecuteResponse, rpc::Code},
    worker::inputs::file_cache::{Portion, Verifier},
};

use super::{
    farm::{Farm, Settings},
    results::code,
};

const FILES: [(&str, &str); 3] = [("a", "first"), ("b/c", "second"), ("b/d", "second")];
/// The root's names do not matter.
const SCRIPT: &str = "cat a b/c b/d";

async fn run(farm: &Farm, round: &str) -> ExecuteResponse {
    farm.shell(&format!("{SCRIPT} # {round}"), &FILES, &[])
        .await
}

async fn is_good(farm: &Farm, response: ExecuteResponse) {
    assert_eq!(code(&response), Code::Ok, "{response:?}");
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(out, b"firstsecondsecond");
}

/// Files of the cache with this content.
fn cached(farm: &Farm, content: &str) -> Vec<PathBuf> {
    let cache = walkdir::WalkDir::new(farm.directory.path().join("cache")).min_depth(2);
    let files = cache.into_iter().map(|entry| entry.unwrap().into_path());
    files
        .filter(|path| fs::read_to_string(path).is_ok_and(|text| text == content))
        .collect()
}

/// Writes by way of another name, which nobody watches. With the mtime put back, only the content
/// tells.
fn rot(farm: &Farm, path: &Path, puts_mtime_back: bool) {
    let other = farm.directory.path().join("other name");
    fs::hard_link(path, &other).unwrap();
    let before = fs::metadata(&other).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o644)).unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(&other).unwrap();
    file.write_all(b"F").unwrap();
    if puts_mtime_back {
        let times = fs::FileTimes::new().set_modified(before.modified().unwrap());
        file.set_times(times).unwrap();
    }
    drop(file);
    fs::set_permissions(&other, before.permissions()).unwrap();
    fs::remove_file(&other).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rots_in_the_cache_is_found_by_reading_it_in_the_background() {
    let farm = Farm::start().await;
    is_good(&farm, run(&farm, "cold").await).await;
    let mut verifier = Verifier::new(&farm.cache);
    while verifier.portion(6_000) != Portion::Last {}
    let verified = farm.cache.verified();
    assert_eq!(verified.wrong.load(Ordering::Relaxed), 0);
    // One for each inode.
    let inodes = cached(&farm, "first").len() + cached(&farm, "second").len();
    assert_eq!(verified.files.load(Ordering::Relaxed), inodes as u64);
    let before = farm.cache.poll_modifications();
    for (round, content) in ["first", "second"].into_iter().enumerate() {
        let rotten = cached(&farm, content).pop().unwrap();
        let inode = fs::metadata(&rotten).unwrap().ino();
        rot(&farm, &rotten, true);
        assert_eq!(farm.cache.poll_modifications(), before + round as u64);
        while verifier.portion(1 << 20) != Portion::Last {}
        assert_eq!(verified.wrong.load(Ordering::Relaxed), 1 + round as u64);
        assert_eq!(farm.cache.poll_modifications(), before + 1 + round as u64);
        assert!(fs::metadata(&rotten).is_err());
        // Also not by way of a root that was kept.
        is_good(&farm, run(&farm, &format!("after {inode}")).await).await;
    }
    while verifier.portion(1 << 20) != Portion::Last {}
    assert_eq!(verified.wrong.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rots_while_no_worker_runs_is_found_before_it_is_used() {
    let mut farm = Farm::start().await;
    is_good(&farm, run(&farm, "cold").await).await;
    rot(&farm, &cached(&farm, "first").pop().unwrap(), true);
    farm.restart(Settings::default()).await;
    let before = farm.cache.poll_modifications();
    is_good(&farm, run(&farm, "restarted").await).await;
    let verified = farm.cache.verified();
    assert_eq!(verified.wrong.load(Ordering::Relaxed), 1);
    let read = verified.files.load(Ordering::Relaxed);
    assert_eq!(read, 2);
    // It was nobody's yet, and is read once.
    assert_eq!(farm.cache.poll_modifications(), before);
    is_good(&farm, run(&farm, "again").await).await;
    assert_eq!(verified.files.load(Ordering::Relaxed), read);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mode_that_somebody_gives_to_an_extra_inode_is_noticed_like_that_of_the_first() {
    let settings = Settings {
        inputs: Inputs::HardLinks,
        ..Default::default()
    };
    let farm = Farm::start_with(settings).await;
    is_good(&farm, run(&farm, "cold").await).await;
    let before = farm.cache.poll_modifications();
    let mut inodes = cached(&farm, "second");
    inodes.sort_unstable();
    let [_, extra] = &inodes[..] else {
        panic!("{inodes:?}");
    };
    let made = fs::metadata(extra).unwrap().permissions();
    fs::set_permissions(extra, made).unwrap();
    assert_eq!(farm.cache.poll_modifications(), before);
    fs::set_permissions(extra, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(farm.cache.poll_modifications(), before + 1);
    assert_eq!(cached(&farm, "second"), Vec::<PathBuf>::new());
    is_good(&farm, run(&farm, "again").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_through_another_name_is_found_when_it_is_used_in_another_root() {
    for inputs in [Inputs::Shared, Inputs::HardLinks] {
        let settings = Settings {
            inputs,
            ..Default::default()
        };
        let farm = Farm::start_with(settings).await;
        is_good(&farm, run(&farm, "cold").await).await;
        let before = farm.cache.poll_modifications();
        rot(&farm, &cached(&farm, "first").pop().unwrap(), false);
        let files = [("x/y", "first"), ("x/z", "second")];
        let response = farm.shell("cat x/y x/z", &files, &[]).await;
        assert_eq!(code(&response), Code::Ok, "{response:?}");
        let out = farm.read(&response.result.unwrap().stdout_digest).await;
        assert_eq!(out, b"firstsecond");
        assert_eq!(farm.cache.poll_modifications(), before + 1);
        is_good(&farm, run(&farm, "again").await).await;
    }
}
