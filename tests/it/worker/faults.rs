//! Disks that are full, out of inodes, read-only or broken, and a cache that somebody else changes: one
//! action fails, and says why; the next one goes on; no root and no output is ever wrong.
//!
//! Disks are ext4 in files, which root may mount; without root these tests are left out.

use std::{
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use bb_remote_execution::proto::{reapi, rpc::Code};

use super::{
    farm::{FUNCTION, Farm, Settings, shell},
    results::{code, text},
};
use crate::harness::parts::FileSystem;

/// The file system goes last.
struct Disk {
    mounted: FileSystem,
    directory: tempfile::TempDir,
}

impl Disk {
    fn new(megabytes: u64, options: &[&str]) -> Option<Self> {
        let memory = Path::new("/dev/shm");
        if !nix::unistd::geteuid().is_root() || !memory.is_dir() {
            crate::harness::skip("only root can mount a small file system");
            return None;
        }
        let directory = tempfile::tempdir_in(memory).unwrap();
        let mounted = FileSystem::mount("ext4", megabytes, directory.path(), options)?;
        Some(Disk { mounted, directory })
    }

    fn at(&self) -> &Path {
        &self.mounted.at
    }

    /// What lies beyond so many bytes can be neither read nor written any more (EIO).
    fn cut(&self, size: u64) {
        let image = fs::OpenOptions::new()
            .write(true)
            .open(self.directory.path().join("ext4.image"));
        image.unwrap().set_len(size).unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let at = self.at().to_str().unwrap();
        let mut lines = mounts.lines().map(|line| line.split(' '));
        let device = lines.find_map(|mut words| {
            let device = words.next()?;
            (words.next()? == at).then_some(device)
        });
        let mut command = Command::new("losetup");
        let status = command.arg("--set-capacity").arg(device.unwrap()).status();
        assert!(status.unwrap().success(), "losetup");
    }

    fn remount(&self, how: &str) {
        let mut mount = Command::new("mount");
        let status = mount.args(["-o", how]).arg(self.at()).status();
        assert!(status.unwrap().success(), "mount -o {how}");
    }
}

/// What a client is told.
fn tell(response: &reapi::ExecuteResponse) {
    println!("{:?}: {}", code(response), text(response));
}

fn is_ok(response: &reapi::ExecuteResponse) -> bool {
    let exit_code = response.result.as_ref().map(|result| result.exit_code);
    response.status.is_none() && exit_code == Some(0)
}

/// Nothing but time is needed until `files` can be had again.
async fn recovers(farm: &Farm, files: &[(&str, &str)]) {
    let mut last = String::new();
    for _ in 0..100 {
        let response = farm.shell("cat *", files, &[]).await;
        if is_ok(&response) {
            let out = farm.read(&response.result.unwrap().stdout_digest).await;
            let expected: String = files.iter().map(|(_, content)| *content).collect();
            assert!(out == expected.as_bytes(), "another content");
            return;
        }
        last = text(&response).to_owned();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it does not recover: {last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_too_full_to_fetch_costs_one_action_and_no_other() {
    let Some(disk) = Disk::new(96, &[]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), Settings::default()).await;
    recovers(&farm, &[("a", "b")]).await;
    let ballast = disk.at().join("ballast");
    // Whatever fits of it.
    let _ = fs::write(&ballast, vec![1; 80 << 20]);
    // Inputs that are streamed, and such that come in batches.
    for size in [32 << 20, 900 << 10] {
        let parts: Vec<(String, String)> = (0..(36 << 20) / size)
            .map(|n| (format!("f{n}"), format!("{n}{}", "x".repeat(size))))
            .collect();
        let files: Vec<(&str, &str)> = parts.iter().map(|(n, c)| (&**n, &**c)).collect();
        // Meanwhile another slot works with what it has.
        let (response, other) = tokio::join!(
            farm.shell("true", &files, &[]),
            farm.shell("cat a # 2", &[("a", "b")], &[])
        );
        tell(&response);
        assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
        assert!(text(&response).contains("make room"), "{}", text(&response));
        assert!(is_ok(&other), "{}", text(&other));
        recovers(&farm, &[("a", "b")]).await;
    }
    fs::remove_file(&ballast).unwrap();
    let large = "y".repeat(32 << 20);
    recovers(&farm, &[("big", &large)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_fills_the_disk_costs_one_action_and_no_other() {
    let Some(disk) = Disk::new(96, &[]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), Settings::default()).await;
    let fill = "dd if=/dev/zero of=out bs=1M count=200 2> /dev/null || exit 3";
    let response = farm.shell(fill, &[("a", "b")], &["out"]).await;
    // What the command said of it counts, and what it left is uploaded.
    assert_eq!(response.status, None, "{}", text(&response));
    let result = response.result.unwrap();
    assert_eq!((result.exit_code, result.output_files.len()), (3, 1));
    let large = "y".repeat(32 << 20);
    recovers(&farm, &[("big", &large)]).await;
}

/// A worker that leaves something free.
fn leaving(minimum_free: u64) -> Settings {
    let mut settings = Settings::default();
    settings.limits.minimum_free = minimum_free;
    settings
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_to_a_full_disk_is_no_result_whoever_filled_it() {
    let Some(disk) = Disk::new(96, &[]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), leaving(24 << 20)).await;
    let root = farm.root(&[]).await;
    for script in [
        // At the end.
        "dd if=/dev/zero of=o bs=1M count=200 2> /dev/null || :",
        // Meanwhile.
        "dd if=/dev/zero of=x bs=1M count=200 2> /dev/null || :; sleep 1; rm x; echo x > o",
        // A failure may be due to it, too.
        "dd if=/dev/zero of=o bs=1M count=200 2> /dev/null || exit 3",
    ] {
        let task = farm.task(&shell(script, &["o"]), root.clone()).await;
        let response = farm.execute(task.clone()).await;
        tell(&response);
        assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
        let place = farm.directory.path().display().to_string();
        for part in ["cache.minimum_free", "24MiB", &place] {
            assert!(text(&response).contains(part), "{}", text(&response));
        }
        assert!(farm.action_result(&task).await.is_none());
        // The next one waits for what is being removed, and has all that it wrote.
        let script = format!("head -c 16M /dev/zero > o # {}", script.len());
        let mut response = farm.shell(&script, &[], &["o"]).await;
        // On a host that is overloaded that may take longer than it waits.
        while code(&response) == Code::Unavailable {
            response = farm.shell(&script, &[], &["o"]).await;
        }
        assert!(is_ok(&response), "{}", text(&response));
        let output = &response.result.unwrap().output_files[0];
        assert_eq!(output.digest.as_ref().unwrap().size_bytes, 16 << 20);
    }
    assert_eq!(farm.executor.availability.trouble(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_removes_while_the_command_runs_is_no_result() {
    let farm = Farm::start().await;
    let root = farm.root(&[]).await;
    for script in [
        "echo x; rm ../stdout",
        "echo x > o; rm ../stderr",
        "echo x > o; cd ..; rm -r root",
        "echo x > o; cd ..; mv root other; mkdir root",
        "echo x > o; rm -r \"$(cd .. && pwd)\"",
    ] {
        let task = farm.task(&shell(script, &["o"]), root.clone()).await;
        let response = farm.execute(task.clone()).await;
        tell(&response);
        assert_eq!(
            code(&response),
            Code::Unavailable,
            "{script}: {}",
            text(&response)
        );
        assert!(text(&response).contains("removed"), "{}", text(&response));
        assert!(farm.action_result(&task).await.is_none());
        recovers(&farm, &[("a", script)]).await;
    }
    assert_eq!(farm.executor.availability.trouble(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_cache_was_emptied_says_what_to_do() {
    let farm = Farm::start().await;
    recovers(&farm, &[("a", "b")]).await;
    let cache = farm.directory.path().join("cache");
    for entry in fs::read_dir(&cache).unwrap() {
        let entry = entry.unwrap().path();
        let _ = match entry.is_dir() {
            true => fs::remove_dir_all(entry),
            false => fs::remove_file(entry),
        };
    }
    let ready = format!("{:?}", farm.executor.check_readiness(0).await);
    assert!(ready.contains("restart bb_worker"), "{ready}");
    let response = farm.shell("cat in", &[("in", "new")], &[]).await;
    assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
    assert!(
        text(&response).contains("restart bb_worker"),
        "{}",
        text(&response)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_command_starts_on_a_disk_with_less_free_than_must_be() {
    let Some(disk) = Disk::new(96, &[]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), leaving(24 << 20)).await;
    recovers(&farm, &[("a", "b")]).await;
    let ballast = disk.at().join("ballast");
    let _ = fs::write(&ballast, vec![1; 70 << 20]);
    let response = farm.shell("touch ran", &[], &["ran"]).await;
    tell(&response);
    assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
    assert!(text(&response).contains("24MiB"), "{}", text(&response));
    assert!(response.result.unwrap().output_files.is_empty());
    let ready = farm.executor.check_readiness(0).await;
    assert!(
        format!("{ready:?}").contains("cache.minimum_free"),
        "{ready:?}"
    );
    fs::remove_file(&ballast).unwrap();
    farm.executor.check_readiness(0).await.unwrap();
    recovers(&farm, &[("c", "d")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_are_kept_leave_free_what_must_be() {
    let Some(disk) = Disk::new(160, &[]) else {
        return;
    };
    let minimum_free = 64 << 20;
    let farm = Farm::start_in(disk.at(), leaving(minimum_free)).await;
    for round in 0..6 {
        let script = format!("yes {round} | head -c 24M > o");
        let response = farm.shell(&script, &[], &["o"]).await;
        assert!(is_ok(&response), "round {round}: {}", text(&response));
    }
    // Room is found for each action, so that what was kept goes in time.
    farm.executor.check_readiness(0).await.unwrap();
    let free = rustix::fs::statvfs(disk.at()).unwrap();
    assert!(free.f_bavail * free.f_frsize >= minimum_free);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_inodes_costs_one_action_and_no_other() {
    let Some(disk) = Disk::new(64, &["-N", "1024"]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), Settings::default()).await;
    let many = reapi::Directory {
        directories: (0..2_000)
            .map(|n| reapi::DirectoryNode {
                name: format!("d{n}"),
                digest: Some(FUNCTION.empty().to_proto()),
            })
            .collect(),
        ..Default::default()
    };
    let many = farm.upload_message(&many).await;
    for _ in 0..3 {
        let task = farm.task(&shell("true", &[]), many.clone()).await;
        let response = farm.execute(task).await;
        tell(&response);
        assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
        recovers(&farm, &[("a", "b")]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_read_only_for_a_while_leaves_no_wrong_root() {
    let Some(disk) = Disk::new(64, &[]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), Settings::default()).await;
    recovers(&farm, &[("a", "b")]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    disk.remount("remount,ro");
    for files in [&[("a", "b"), ("c", "d")][..], &[("c", "d")]] {
        let response = farm.shell("cat *", files, &[]).await;
        tell(&response);
        assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
        assert!(text(&response).contains("Read-only"), "{}", text(&response));
    }
    disk.remount("remount,rw");
    recovers(&farm, &[("a", "b"), ("c", "d")]).await;
    recovers(&farm, &[("c", "d")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_disk_makes_no_wrong_output() {
    let Some(disk) = Disk::new(64, &["-b", "4096"]) else {
        return;
    };
    let farm = Farm::start_in(disk.at(), Settings::default()).await;
    let large = "z".repeat(8 << 20);
    let files = [("in", large.as_str())];
    recovers(&farm, &files).await;
    let cached = cached_files(&farm).pop().unwrap();
    let file = fs::File::open(&cached).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    disk.cut(first_block(&file) * 4096 + 4096);
    // The command learns of it, and so does a worker that must read the file.
    let response = farm.shell("cat in > /dev/null", &files, &[]).await;
    let exit_code = response.result.as_ref().map(|result| result.exit_code);
    assert!(
        response.status.is_some() || exit_code == Some(1),
        "{response:?}"
    );
    let response = farm.shell("true # 2", &files, &["in"]).await;
    tell(&response);
    assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
    assert!(response.result.unwrap().output_files.is_empty());
}

/// Where on its device a file begins (FIBMAP).
fn first_block(file: &fs::File) -> u64 {
    use std::os::fd::AsRawFd;
    let mut block: libc::c_int = 0;
    // SAFETY: reads and writes one number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 1, &mut block) };
    assert_eq!(result, 0, "FIBMAP");
    block as u64
}

fn cached_files(farm: &Farm) -> Vec<PathBuf> {
    let cache = farm.directory.path().join("cache");
    let entries = walkdir::WalkDir::new(cache).min_depth(2);
    let files = entries.into_iter().map(Result::unwrap);
    let files = files.filter(|entry| entry.file_type().is_file());
    files.map(walkdir::DirEntry::into_path).collect()
}

/// In place, with the same size, and nothing to see of it.
fn alter(path: &Path) {
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let before = file.metadata().unwrap();
    file.write_all(b"evil").unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    let after = fs::metadata(path).unwrap();
    assert_eq!((before.size(), before.mode()), (after.size(), after.mode()));
}

/// As an editor does.
fn replace(path: &Path) {
    let other = path.with_file_name("other");
    fs::write(&other, "evil").unwrap();
    fs::rename(&other, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_file_that_somebody_changes_is_not_used() {
    let farm = Farm::start().await;
    for (round, change) in [alter, replace, alter].into_iter().enumerate() {
        let content = format!("good{round}");
        let files = [("d/in", content.as_str())];
        let script = "cat d/in; cat x/in 2> /dev/null || :";
        assert!(is_ok(&farm.shell(script, &files, &[]).await));
        // Kept now, as an unchanged root.
        tokio::time::sleep(Duration::from_millis(200)).await;
        for path in cached_files(&farm) {
            change(&path);
        }
        // In the same place, where its link may be kept, and in another.
        for place in ["d/in", "x/in"] {
            let files = [(place, content.as_str())];
            let response = farm
                .shell(&format!("cat {place} # {round}"), &files, &[])
                .await;
            assert_eq!(response.status, None, "{}", text(&response));
            let out = farm.read(&response.result.unwrap().stdout_digest).await;
            assert_eq!(
                String::from_utf8(out).unwrap(),
                content,
                "round {round}, {place}"
            );
        }
    }
    assert_eq!(farm.cache.poll_modifications(), 2);
    // Modes count, but not that one is set again.
    for path in cached_files(&farm) {
        fs::set_permissions(&path, fs::metadata(&path).unwrap().permissions()).unwrap();
    }
    assert_eq!(farm.cache.poll_modifications(), 2);
    for path in cached_files(&farm) {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    }
    assert_eq!(farm.cache.poll_modifications(), 3);
    assert_eq!(cached_files(&farm), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_whose_inputs_somebody_changes_meanwhile_has_no_result() {
    let farm = Arc::new(Farm::start().await);
    let root = farm.root(&[("in", "good"), ("other", "x")]).await;
    let command = shell("touch started; sleep 2; cat in", &[]);
    let task = farm.task(&command, root).await;
    let running = tokio::spawn({
        let (farm, task) = (farm.clone(), task.clone());
        async move { farm.execute(task).await }
    });
    let started = || {
        let build = farm.directory.path().join("build");
        let mut entries = walkdir::WalkDir::new(build).into_iter().flatten();
        entries.any(|entry| entry.file_name() == "started")
    };
    while !started() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for path in cached_files(&farm) {
        if fs::read(&path).unwrap() == b"good" {
            alter(&path);
        }
    }
    let response = running.await.unwrap();
    tell(&response);
    assert_eq!(code(&response), Code::Unavailable, "{}", text(&response));
    assert!(
        text(&response).contains("somebody changed"),
        "{}",
        text(&response)
    );
    assert!(farm.action_result(&task).await.is_none());
    let response = farm.execute(task.clone()).await;
    assert_eq!(response.status, None, "{}", text(&response));
    let out = farm.read(&response.result.unwrap().stdout_digest).await;
    assert_eq!(out, b"good");
}
