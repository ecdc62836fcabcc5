//! What a command finds that says nothing about its environment: a path, a home, a name; and how much
//! it may have of what the kernel counts.

use bb_remote_execution::config::runner::{Demand, Root};

use super::*;

impl Farm {
    /// Without any environment.
    async fn bare(&self, slot: &Slot, script: &str) -> Ended {
        let mut request = slot.request(&["sh", "-c", script]);
        request.environment_variables = BTreeMap::new();
        self.send(request, slot).await.unwrap()
    }
}

/// Prints everything that names the user, but not its number.
const WHO: &str = "set -e; id -un; id -gn; whoami; getent passwd $(id -u) | cut -d: -f 1,5-; \
     getent passwd build | cut -d: -f 3 | grep -qx $(id -u); getent group build | cut -d: -f 1; \
     python3 -c 'import os, pwd; \
     print(os.path.expanduser(\"~build\"), pwd.getpwuid(os.getuid()).pw_name)'; \
     echo $PATH; echo $HOME; echo $TZ; cd; ls -A; test -w . ; mkdir -p .cache/x; echo y > .cache/x/y";

#[tokio::test(flavor = "multi_thread")]
async fn the_actions_user_has_one_name_and_an_empty_home_in_every_slot() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let build = farm.build();
    let home = build.join("home");
    let home = home.display();
    let expected = format!(
        "build\nbuild\nbuild\nbuild:Build action:{home}:/bin/sh\nbuild\n{home} build\n\
         /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n{home}\nUTC\n"
    );
    let mut users = Vec::new();
    for _ in 0..3 {
        let slot = farm.slot();
        let ended = farm.bare(&slot, &format!("{WHO}; id -u >&2")).await;
        assert_eq!(ended.stdout, expected, "{ended:?}");
        // Beside the input root, and so removed with it.
        assert!(slot.path.join("home/.cache/x/y").exists());
        users.push(ended.stderr);
    }
    assert_ne!(users[0], users[1]);
    // The host's own are there too, and nobody can add one.
    let slot = farm.slot();
    let script = "getent passwd root | cut -d: -f 1,3; getent group root | cut -d: -f 1,3; \
                  tail -n +2 /etc/passwd | sha256sum; (echo x >> /etc/passwd); rm -f /etc/group";
    let ended = farm.bare(&slot, script).await;
    let host = fs::read("/etc/passwd").unwrap();
    let mut lines = ended.stdout.lines();
    assert_eq!(
        (lines.next(), lines.next()),
        (Some("root:0"), Some("root:0"))
    );
    let sum = bb_remote_execution::digest::DigestFunction::Sha256.digest_of(&host);
    assert_eq!(lines.next(), Some(&*format!("{}  -", sum.hash_hex())));
    assert_eq!(ended.stderr.lines().count(), 2, "{ended:?}");
    assert_eq!(fs::read("/etc/passwd").unwrap(), host);
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_leaves_the_environment_as_it_was_sent() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| {
        config.set_default_environment_variables = false;
        config.set_tmpdir_environment_variable = false;
    })
    .await;
    let slot = farm.slot();
    let mut request = slot.request(&["/usr/bin/env"]);
    request.environment_variables = BTreeMap::from([("A".to_owned(), "b c".to_owned())]);
    let ended = farm.send(request, &slot).await.unwrap();
    assert_eq!(ended.stdout, "A=b c\n");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_mounts_there_is_still_a_path_and_a_home() {
    if !is_root() {
        return;
    }
    let farm = Farm::start_in("/tmp", |config| config.containment.mounts = Demand::Off).await;
    let slot = farm.slot();
    let script = "echo $PATH; echo $HOME; cd; ls -A; echo x > y; id -un 2>&1 | grep -c build";
    let ended = farm.bare(&slot, script).await;
    let home = slot.path.join("home");
    let expected = format!(
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n{}\n0\n",
        home.display()
    );
    assert_eq!(ended.stdout, expected, "{ended:?}");
    assert!(home.join("y").exists());
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_users_gets_none_and_one_that_changes_is_seen() {
    if !is_root() {
        return;
    }
    let Ok(shell) = fs::read("/bin/busybox") else {
        crate::harness::skip("install busybox-static");
        return;
    };
    let image = tempfile::tempdir_in("/srv").unwrap();
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let farm = Farm::start_in("/srv", |config| {
        for directory in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir(image.path().join(directory)).unwrap();
        }
        let build = config.build_directory.strip_prefix("/").unwrap();
        fs::create_dir_all(image.path().join(build)).unwrap();
        let program = image.path().join("bin/sh");
        fs::write(&program, &shell).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        config.root = Root::Image(image.path().to_owned());
    })
    .await;
    let show = "cut -d : -f 1 /etc/passwd; ls -A $HOME";
    let ended = farm.bare(&farm.slot(), show).await;
    assert_eq!(ended.stdout, "", "{ended:?}");
    for name in ["first", "second"] {
        let new = image.path().join("etc/new");
        fs::write(&new, format!("{name}:x:1:1::/:/bin/sh\n")).unwrap();
        fs::rename(&new, image.path().join("etc/passwd")).unwrap();
        // Those that were made ahead of the first one know of no such file.
        for _ in 0..8 {
            farm.bare(&farm.slot(), "true").await;
        }
        let ended = farm.bare(&farm.slot(), show).await;
        assert_eq!(ended.stdout, format!("build\n{name}\n"), "{ended:?}");
    }
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_counts_once_for_all_is_shared_out() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let script = "ulimit -Hl; ulimit -Hr; ulimit -He; ulimit -Hi; ulimit -Hq";
    let slot = farm.slot();
    let ended = farm.run(&slot, &["/bin/bash", "-c", script]).await.unwrap();
    let most = [8192, 0, 0, 65_536, 819_200];
    assert_eq!(ended.stdout.lines().count(), most.len(), "{ended:?}");
    for (line, most) in ended.stdout.lines().zip(most) {
        assert!(line.parse::<u64>().unwrap() <= most, "{ended:?}");
    }
    let script = "import os, pty\nheld = []\ntry:\n  while len(held) < 400:\n    held.append(\
                  pty.openpty())\nexcept OSError:\n  pass\nprint(len(held))";
    let slot = farm.slot();
    let ended = farm.run(&slot, &["python3", "-c", script]).await.unwrap();
    let terminals: u32 = ended.stdout.trim().parse().unwrap();
    assert!((8..=64).contains(&terminals), "{ended:?}");
    farm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_namespaces_are_made_where_they_are_allowed() {
    if !is_root() {
        return;
    }
    // What bubblewrap and rootless tools do: mounts, a root, processes and a name of one's own.
    let script = "unshare -Ur true && unshare -Urmpfu --mount-proc sh -ec '\
                  hostname mine; mount -t tmpfs none /mnt; cd /mnt; mkdir old proc; \
                  mount -t proc none proc; pivot_root . old; ' && echo made";
    for allowed in [false, true] {
        let farm = Farm::start_in("/tmp", |config| {
            config.containment.allow_user_namespaces = allowed;
        })
        .await;
        let ended = farm.sh(script).await;
        let made = ended.code == 0 && ended.stdout == "made\n";
        assert_eq!(made, allowed, "{ended:?}");
        farm.stop().await;
    }
}

/// An executable of 32 bits (elf(5)) that says so and ends: write(1, "32\n", 3), exit(0).
#[cfg(target_arch = "x86_64")]
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    let header: u32 = 52 + 32;
    let mut code = vec![0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9];
    let text = BASE + header + 34;
    code.extend(text.to_le_bytes());
    code.extend([0xba, 3, 0, 0, 0, 0xcd, 0x80]);
    code.extend([0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80, 0x90, 0x90, 0x90]);
    code.extend(b"32\n");
    let size = header + code.len() as u32;
    let mut image = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2u16, 3] {
        image.extend(half.to_le_bytes());
    }
    for word in [1, BASE + header, 52, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [52u16, 32, 1, 40, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn programs_of_32_bits_run() {
    if !is_root() {
        return;
    }
    let farm = Farm::start().await;
    let slot = farm.slot();
    slot.input("program", &program_of_32_bits(), 0o755);
    let ended = farm.run(&slot, &["./program"]).await.unwrap();
    assert_eq!((ended.code, &*ended.stdout), (0, "32\n"), "{ended:?}");
    farm.stop().await;
}
