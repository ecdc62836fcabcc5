//! No action takes the disk from the others of its worker: one that has more than its share is ended while they still
//! have room, and is told that it is at fault.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use bb_remote_execution::proto::{reapi::ExecuteResponse, rpc::Code};

use crate::harness::{Farm, Task, is_ok, is_root, parts::FileSystem};

const MINIMUM_FREE: &str = "64MiB";

/// A farm whose worker has a small disk, until it is dropped.
struct SmallDisk {
    farm: Farm,
    _disk: FileSystem,
    _place: tempfile::TempDir,
}

/// `options` are mkfs.ext4(8)'s. `None` where there can be none.
async fn small_disk(options: &[&str]) -> Option<SmallDisk> {
    if !is_root() {
        return None;
    }
    let place = tempfile::tempdir().unwrap();
    // Actions pass through to their directories.
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let disk = FileSystem::mount("ext4", 1200, place.path(), options)?;
    let store =
        "storage.embedded.maximum_size = \"16MiB\"\nstorage.embedded.minimum_free = \"1MiB\"\n";
    let cache = format!("cache.minimum_free = \"{MINIMUM_FREE}\"\n");
    let farm = Farm::start_with_worker(&disk.at, 2, store, &cache).await;
    Some(SmallDisk {
        farm,
        _disk: disk,
        _place: place,
    })
}

fn refused_for_its_share(response: &ExecuteResponse) -> bool {
    let status = response.status.clone().unwrap_or_default();
    status.code == Code::InvalidArgument as i32
        && ["the action had written", MINIMUM_FREE, "larger disk"]
            .iter()
            .all(|part| status.message.contains(part))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_fills_the_disk_is_ended_and_its_neighbours_are_not() {
    let Some(small) = small_disk(&[]).await else {
        return;
    };
    let client = small.farm.client();
    let mut neighbour = Task::shell(
        "i=0; while [ $i -lt 40 ]; do head -c 100k /dev/zero >> o || exit 1; sleep 0.5; i=$((i + 1)); done",
    );
    neighbour.command.output_paths = vec!["o".to_owned()];
    // Fast until 128 MiB are left, and then so slowly that also on a busy host it is noticed before the disk is full.
    let hog = "i=0; while [ $(stat -f -c %a .) -gt 32768 ]; do head -c 4M /dev/zero > f$i; i=$((i + 1)); done; \
               while head -c 128k /dev/zero > f$i; do i=$((i + 1)); sleep 0.02; done; sleep 60";
    let hog = Task::shell(hog);
    let (neighbour, hog) = tokio::join!(client.run(&neighbour), client.run(&hog));
    assert!(refused_for_its_share(&hog), "{hog:?}");
    assert!(is_ok(&neighbour), "{neighbour:?}");
    // What it left goes, so that the next one starts.
    let next = client.run(&Task::shell("head -c 16M /dev/zero > o")).await;
    assert!(is_ok(&next), "{next:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_done_as_soon_as_it_has_filled_the_disk_is_at_fault_too() {
    let Some(small) = small_disk(&[]).await else {
        return;
    };
    let client = small.farm.client();
    let hog = client
        .run(&Task::shell("head -c 2G /dev/zero > f; exit 0"))
        .await;
    assert!(refused_for_its_share(&hog), "{hog:?}");
    let next = client.run(&Task::shell("head -c 16M /dev/zero > o")).await;
    assert!(is_ok(&next), "{next:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_takes_all_inodes_is_ended() {
    let Some(small) = small_disk(&["-N", "6000"]).await else {
        return;
    };
    let client = small.farm.client();
    let hog = Task::shell("i=0; while : > f$i; do i=$((i + 1)); done; sleep 60");
    let hog = tokio::time::timeout(Duration::from_secs(50), client.run(&hog)).await;
    let hog = hog.expect("it is ended long before it ends by itself");
    assert!(refused_for_its_share(&hog), "{hog:?}");
    let next = client.run(&Task::shell("touch a b c")).await;
    assert!(is_ok(&next), "{next:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_blamed_for_what_another_one_hides() {
    let Some(small) = small_disk(&[]).await else {
        return;
    };
    let client = small.farm.client();
    // More than what it is to find, but not what fills the disk.
    let honest = Task::shell("head -c 80M /dev/zero > o; sleep 6");
    // A file that has no name any more.
    let hider = Task::shell(
        "sleep 2; exec 3> f; rm f; i=0; while [ $i -lt 400 ]; do head -c 4M /dev/zero >&3 || break; \
         i=$((i + 1)); sleep 0.01; done; sleep 3",
    );
    let (honest, hider) = tokio::join!(client.run(&honest), client.run(&hider));
    for response in [&honest, &hider] {
        // It may run again, here or elsewhere; the store, which is on that disk too, may have let go of its inputs.
        let code = response.status.as_ref().map_or(0, |status| status.code);
        assert_ne!(code, Code::InvalidArgument as i32, "{response:?}");
    }
}
