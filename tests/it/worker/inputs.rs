//! What an action finds in its root, and where it comes from.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::Duration,
};

use bb_remote_execution::{
    instance::InstanceName,
    proto::{
        reapi,
        rpc::{Code, PreconditionFailure},
        unpack,
    },
    worker::inputs::file_cache::{CacheLimits, FileKey},
};
use prost::Message;

use super::{
    farm::{FUNCTION, Farm, Settings, shell},
    results::{code, text},
};

fn missing(response: &reapi::ExecuteResponse) -> Vec<String> {
    let details = response.status.as_ref().map(|status| &status.details[..]);
    let [detail] = details.unwrap_or_default() else {
        return Vec::new();
    };
    let failure: PreconditionFailure = unpack(detail).unwrap();
    failure
        .violations
        .iter()
        .map(|violation| {
            assert_eq!(violation.r#type, "MISSING");
            violation.subject.clone()
        })
        .collect()
}

fn absent(text: &str) -> reapi::Digest {
    FUNCTION.digest_of(text.as_bytes()).to_proto()
}

fn name_of(digest: &reapi::Digest) -> String {
    format!("blobs/{}/{}", digest.hash, digest.size_bytes)
}

pub fn file(name: &str, digest: reapi::Digest) -> reapi::FileNode {
    reapi::FileNode {
        name: name.to_owned(),
        digest: Some(digest),
        ..Default::default()
    }
}

pub fn directory(name: &str, digest: reapi::Digest) -> reapi::DirectoryNode {
    reapi::DirectoryNode {
        name: name.to_owned(),
        digest: Some(digest),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_has_what_its_directories_say() {
    let farm = Farm::start().await;
    let script = "cat a/b/text; ./a/run; stat -c '%a %Y' a/b/text a/run; test -w a -a -w . -a -w a/b; \
                  readlink link; test -d empty";
    let inner = reapi::Directory {
        files: vec![file("text", farm.upload("text\n").await)],
        ..Default::default()
    };
    let outer = reapi::Directory {
        files: vec![reapi::FileNode {
            is_executable: true,
            ..file("run", farm.upload("#!/bin/sh\necho ran\n").await)
        }],
        directories: vec![directory("b", farm.upload_message(&inner).await)],
        ..Default::default()
    };
    let root = reapi::Directory {
        directories: vec![
            directory("a", farm.upload_message(&outer).await),
            directory("empty", FUNCTION.empty().to_proto()),
        ],
        symlinks: vec![reapi::SymlinkNode {
            name: "link".to_owned(),
            target: "../../anything".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let root = farm.upload_message(&root).await;
    let response = farm
        .execute(farm.task(&shell(script, &[]), root).await)
        .await;
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "text\nran\n444 946684800\n555 946684800\n../../anything\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_missing_is_told_at_once() {
    let farm = Farm::start().await;
    let present = farm.upload("present").await;
    let sub = reapi::Directory {
        files: vec![file("x", absent("x")), file("p", present)],
        ..Default::default()
    };
    let mut root = reapi::Directory {
        files: vec![file("y", absent("y")), file("z", absent("z"))],
        directories: vec![directory("sub", farm.upload_message(&sub).await)],
        ..Default::default()
    };
    let command = shell("true", &[]);
    let complete = farm.upload_message(&root).await;
    let response = farm.execute(farm.task(&command, complete).await).await;
    assert_eq!(code(&response), Code::FailedPrecondition);
    let mut expected: Vec<String> = ["x", "y", "z"].map(|t| name_of(&absent(t))).to_vec();
    expected.sort();
    let mut told = missing(&response);
    told.sort();
    assert_eq!(told, expected);
    let paths = ["\"sub/x\"", "\"y\"", "\"z\""];
    assert!(
        paths.iter().any(|path| text(&response).ends_with(path)),
        "{}",
        text(&response)
    );

    // With a directory and the command missing too.
    root.directories
        .push(directory("gone", absent("directory")));
    let incomplete = farm.upload_message(&root).await;
    let task = farm.task_of(reapi::Action {
        command_digest: Some(absent("command")),
        input_root_digest: Some(incomplete),
        ..Default::default()
    });
    let response = farm.execute(task).await;
    expected.extend(["directory", "command"].map(|t| name_of(&absent(t))));
    expected.sort();
    let mut told = missing(&response);
    told.sort();
    assert_eq!(told, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_directories_are_the_clients_fault() {
    let farm = Farm::start().await;
    let blob = farm.upload("x").await;
    let mut bad = Vec::new();
    for name in ["", ".", "..", "a/b", "/", "a\0b", &"x".repeat(256)] {
        bad.push(reapi::Directory {
            files: vec![file(name, blob.clone())],
            ..Default::default()
        });
        bad.push(reapi::Directory {
            directories: vec![directory(name, FUNCTION.empty().to_proto())],
            ..Default::default()
        });
    }
    bad.push(reapi::Directory {
        files: vec![file("same", blob.clone()), file("same", blob.clone())],
        ..Default::default()
    });
    bad.push(reapi::Directory {
        files: vec![file("same", blob.clone())],
        directories: vec![directory("same", FUNCTION.empty().to_proto())],
        ..Default::default()
    });
    bad.push(reapi::Directory {
        files: vec![reapi::FileNode {
            digest: None,
            ..file("x", blob.clone())
        }],
        ..Default::default()
    });
    bad.push(reapi::Directory {
        symlinks: vec![reapi::SymlinkNode {
            name: "l".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    });
    let command = shell("true", &[]);
    for directory in &bad {
        let root = farm.upload_message(directory).await;
        let response = farm.execute(farm.task(&command, root).await).await;
        assert_eq!(
            code(&response),
            Code::InvalidArgument,
            "{directory:?}: {}",
            text(&response)
        );
    }
    // No message at all.
    let root = farm.upload("\u{1}\u{2}\u{3}").await;
    let response = farm.execute(farm.task(&command, root).await).await;
    assert_eq!(
        code(&response),
        Code::InvalidArgument,
        "{}",
        text(&response)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bombs_are_refused_before_anything_is_laid_out() {
    let farm = Farm::start().await;
    let command = shell("true", &[]);
    // 10^9 directories in ten messages.
    let mut wide = reapi::Directory::default();
    for _ in 0..9 {
        let below = farm.upload_message(&wide).await;
        wide = reapi::Directory {
            directories: (0..10)
                .map(|i| directory(&i.to_string(), below.clone()))
                .collect(),
            ..Default::default()
        };
    }
    let root = farm.upload_message(&wide).await;
    let response = farm.execute(farm.task(&command, root).await).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    assert!(text(&response).contains("2000000"), "{}", text(&response));
    let mut deep = reapi::Directory::default();
    let mut levels = Vec::new();
    for _ in 0..1100 {
        let data = deep.encode_to_vec();
        deep = reapi::Directory {
            directories: vec![directory("d", FUNCTION.digest_of(&data).to_proto())],
            ..Default::default()
        };
        levels.push(data);
    }
    for data in levels {
        farm.upload(data).await;
    }
    let root = farm.upload_message(&deep).await;
    let response = farm.execute(farm.task(&command, root).await).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    assert!(text(&response).contains("1024"), "{}", text(&response));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_in_place_of_an_outputs_directory_is_named() {
    let farm = Farm::start().await;
    let response = farm.shell("true", &[("a/b", "file")], &["a/b/out"]).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    assert!(text(&response).contains("a/b"), "{}", text(&response));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cached_is_not_fetched_again_even_after_a_restart() {
    let mut farm = Farm::start().await;
    let large = "x".repeat(3 << 20);
    let files = [
        ("a", "one"),
        ("!b", "two"),
        ("c/d", "three"),
        ("c/e", ""),
        ("l", large.as_str()),
    ];
    let first = farm.shell("cat a b c/d c/e l | wc -c", &files, &[]).await;
    assert_eq!(first.status, None);
    assert_eq!(
        farm.read(&first.result.unwrap().stdout_digest).await,
        b"3145739\n"
    );
    let root = farm.root(&files).await;
    let usage = farm.cache.usage();
    // The empty one is made, not cached.
    assert_eq!(usage.0, 4);
    for restart in [false, true] {
        if restart {
            farm.restart(Settings::default()).await;
            assert_eq!(farm.cache.usage(), usage);
        }
        let script = format!("true # {restart}");
        let task = farm.task(&shell(&script, &[]), root.clone()).await;
        farm.shell("true # learn the server's limits", &[], &[])
            .await;
        farm.calls.take();
        assert_eq!(farm.execute(task).await.status, None);
        let calls = farm.calls.take();
        let reads = calls
            .iter()
            .filter(|call| *call == "BatchReadBlobs")
            .count();
        // The command; after the restart directories as well, in two levels.
        assert_eq!(reads, if restart { 2 } else { 1 }, "{calls:?}");
        assert!(!calls.contains(&"Read".to_owned()), "{calls:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_become_inputs_without_a_download() {
    let farm = Farm::start().await;
    let made = farm
        .shell(
            "echo out > f; echo '#!/bin/sh' > p; chmod +x p; head -c 3000000 /dev/zero > l",
            &[],
            &["f", "p", "l"],
        )
        .await;
    let files = made.result.unwrap().output_files;
    assert_eq!(farm.cache.usage().0, 3);
    let root = reapi::Directory {
        files: files
            .iter()
            .map(|output| reapi::FileNode {
                name: output.path.clone(),
                digest: output.digest.clone(),
                is_executable: output.is_executable,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    let root = farm.upload_message(&root).await;
    let command = shell("cat f; ./p; stat -c '%u %a %Y' f p l", &[]);
    let task = farm.task(&command, root).await;
    farm.calls.take();
    let response = farm.execute(task).await;
    let calls = farm.calls.take();
    // Command and root in one batch; no file.
    assert_eq!(
        calls
            .iter()
            .filter(|call| *call == "BatchReadBlobs")
            .count(),
        1,
        "{calls:?}"
    );
    assert!(!calls.contains(&"Read".to_owned()), "{calls:?}");
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    let user = nix::unistd::geteuid();
    assert_eq!(
        String::from_utf8(out).unwrap(),
        format!("out\n{user} 444 946684800\n{user} 555 946684800\n{user} 444 946684800\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_vanish_from_the_disk_are_fetched_again() {
    let farm = Farm::start().await;
    let files = [("a", "one"), ("b", "two")];
    farm.shell("true", &files, &[]).await;
    let mut removed = 0;
    for entry in walkdir::WalkDir::new(farm.directory.path().join("cache")).min_depth(2) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            fs::remove_file(entry.path()).unwrap();
            removed += 1;
        }
    }
    assert_eq!(removed, 2);
    let response = farm.shell("cat a b", &files, &[]).await;
    assert_eq!(response.status, None);
    assert_eq!(
        farm.read(&response.result.unwrap().stdout_digest).await,
        b"onetwo"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_stays_within_its_limits_and_says_when_a_root_does_not_fit() {
    let limits = CacheLimits {
        bytes: 1000,
        files: 10,
        minimum_free: 0,
    };
    let settings = Settings {
        limits,
        ..Default::default()
    };
    let mut farm = Farm::start_with(settings).await;
    for round in 0..20 {
        let contents = [0, 1, 2].map(|i| format!("{round} {i} {}", "x".repeat(100)));
        let files = [
            ("a", &*contents[0]),
            ("b", &*contents[1]),
            ("c", &*contents[2]),
        ];
        let response = farm.shell("cat a b c > /dev/null", &files, &[]).await;
        assert_eq!(response.status, None);
        let (files, bytes) = farm.cache.usage();
        assert!(
            files <= limits.files && bytes <= limits.bytes,
            "{files} {bytes}"
        );
    }
    let large = "x".repeat(600);
    let response = farm
        .shell("true", &[("a", &large), ("b", &format!("{large}!"))], &[])
        .await;
    assert_eq!(code(&response), Code::ResourceExhausted);
    assert!(
        text(&response).contains("cache.maximum_size"),
        "{}",
        text(&response)
    );
    // The index is what lies on the disk.
    let usage = farm.cache.usage();
    farm.restart(settings).await;
    assert_eq!(farm.cache.usage(), usage);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restart_cannot_trust_it_removes() {
    let mut farm = Farm::start().await;
    let files = [("a", "one"), ("b", "two"), ("c", "three"), ("d", "four")];
    farm.shell("true", &files, &[]).await;
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(farm.directory.path().join("cache")).min_depth(2) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            found.push(entry.into_path());
        }
    }
    // Cut short, made writable, renamed, and one that is as it was.
    fs::write(&found[0], "").unwrap();
    fs::set_permissions(&found[1], fs::Permissions::from_mode(0o644)).unwrap();
    fs::rename(&found[2], found[2].with_file_name("stranger")).unwrap();
    // A further inode of the last one looks right, and nobody has read it.
    let further = std::path::PathBuf::from(format!("{}.1", found[3].display()));
    let content = fs::read(&found[3]).unwrap();
    fs::write(&further, vec![b'?'; content.len()]).unwrap();
    let made = fs::metadata(&found[3]).unwrap();
    fs::set_permissions(&further, made.permissions()).unwrap();
    let opened = fs::File::open(&further).unwrap();
    opened.set_modified(made.modified().unwrap()).unwrap();
    farm.restart(Settings::default()).await;
    assert_eq!(farm.cache.usage().0, 1);
    assert!(found[3].exists() && !further.exists());
    let response = farm.shell("cat a b c d", &files, &[]).await;
    assert_eq!(
        farm.read(&response.result.unwrap().stdout_digest).await,
        b"onetwothreefour"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_of_the_host_what_was_used_last_is_fetched_again() {
    let mut farm = Farm::start().await;
    let files = [("a", "one"), ("b", "two")];
    farm.shell("true", &files, &[]).await;
    fs::write(farm.directory.path().join("cache/boot_id"), "another").unwrap();
    farm.restart(Settings::default()).await;
    assert_eq!(farm.cache.usage(), (0, 0));
    let response = farm.shell("cat a b", &files, &[]).await;
    assert_eq!(
        farm.read(&response.result.unwrap().stdout_digest).await,
        b"onetwo"
    );
    farm.restart(Settings::default()).await;
    assert_eq!(farm.cache.usage().0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_of_another_user_cannot_change_a_cached_file() {
    if !nix::unistd::geteuid().is_root() {
        crate::harness::skip("only root can become another user");
        return;
    }
    let farm = Farm::start().await;
    let directory = farm.directory.path();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    // The directory is opened by the real runner; here by the script, as root.
    let script = "chmod 755 ..; \
        setpriv --reuid 57990 --regid 57990 --clear-groups sh -c ' \
          echo evil > in; chmod 777 in; touch in; ln in mine; \
          rm -f in; echo evil > in; echo out > out; rm -f none; echo evil > none'; true";
    // An empty file is no link, so that the action may get the number of its inode.
    let files = [("in", "good"), ("none", "")];
    let response = farm.shell(script, &files, &["in", "none", "out"]).await;
    assert_eq!(response.status, None);
    let result = response.result.unwrap();
    // It may replace the file in its own root, but neither write to it nor change it.
    assert_eq!(farm.read(&result.output_files[0].digest).await, b"evil\n");
    assert_eq!(farm.read(&result.output_files[1].digest).await, b"evil\n");
    assert_eq!(farm.read(&result.output_files[2].digest).await, b"out\n");
    let response = farm
        .shell("cat in none; stat -c '%u %a' in", &files, &[])
        .await;
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(String::from_utf8(out).unwrap(), "good0 444\n");
    // What the other user made belongs to the worker now.
    for entry in walkdir::WalkDir::new(directory.join("cache")).min_depth(2) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            let metadata = entry.metadata().unwrap();
            assert_eq!(metadata.uid(), 0);
            assert_eq!(metadata.mode() & 0o222, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_slots_that_want_the_same_fetch_it_once() {
    let farm = Farm::start().await;
    let large = "y".repeat(2 << 20);
    let files = [("a", large.as_str()), ("b/c", "small"), ("b/d", "other")];
    let root = farm.root(&files).await;
    let mut tasks = Vec::new();
    for i in 0..8 {
        tasks.push(
            farm.task(
                &shell(&format!("cat a b/c b/d > /dev/null # {i}"), &[]),
                root.clone(),
            )
            .await,
        );
    }
    farm.calls.take();
    let responses =
        futures::future::join_all(tasks.into_iter().map(|task| farm.execute(task))).await;
    assert!(responses.iter().all(|response| response.status.is_none()));
    let calls = farm.calls.take();
    let count = |name: &str| calls.iter().filter(|call| *call == name).count();
    assert_eq!(count("Read"), 1, "{calls:?}");
    // The commands, at most each by itself; the directories and the files once.
    assert!(count("BatchReadBlobs") <= 8 + 3, "{calls:?}");
}

/// Two who write the same file would have different inodes of it, one of which the cache does not know.
#[test]
fn a_fetch_that_is_given_up_holds_its_keys_until_its_files_are_written() {
    let others = tokio::runtime::Runtime::new().unwrap();
    let farm = others.block_on(Farm::start());
    others.block_on(farm.upload("content"));
    let key = FileKey {
        digest: FUNCTION.digest_of(b"content"),
        executable: false,
    };
    let instance = InstanceName::parse("").unwrap();
    // Files are written by its only thread that may block.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let a_while = Duration::from_millis(300);
        let (release, held) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || held.recv());
        let mut pinned = farm.cache.pin(&[key]).unwrap();
        let given_up = farm.cache.fetch(&instance, &mut pinned);
        assert!(tokio::time::timeout(a_while, given_up).await.is_err());
        let mut pinned = farm.cache.pin(&[key]).unwrap();
        let mut second = Box::pin(farm.cache.fetch(&instance, &mut pinned));
        assert!(tokio::time::timeout(a_while, &mut second).await.is_err());
        drop(release);
        second.await.unwrap();
    });
    assert_eq!(farm.cache.uses().fetched_bytes.get(), key.digest.size());
}
