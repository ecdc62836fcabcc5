//! What is collected of what a command left, and what is not.

use bb_remote_execution::{
    config::Size,
    instance::InstanceName,
    proto::{
        reapi::{self, command::OutputDirectoryFormat},
        rpc::Code,
    },
};
use prost::Message;

use super::{
    farm::{FUNCTION, Farm, Settings, shell},
    results::{code, text},
};

#[tokio::test(flavor = "multi_thread")]
async fn modes_and_times_are_told_where_they_are_asked_for() {
    let farm = Farm::start().await;
    let script = "echo f > file; chmod 640 file; touch -d @1000.5 file; mkdir dir; echo x > dir/x; \
                  chmod 751 dir/x; touch -d @2000 dir/x; ln -s x dir/link; touch -d @3000 dir; ln file other";
    let mut command = shell(script, &["file", "dir", "other"]);
    command.output_node_properties = vec!["mtime".to_owned(), "unix_mode".to_owned()];
    let task = farm.task(&command, farm.root(&[]).await).await;
    let result = farm.execute(task).await.result.unwrap();
    let told = |properties: &Option<reapi::NodeProperties>| {
        let properties = properties.clone().unwrap();
        let mtime = properties.mtime.unwrap();
        (mtime.seconds, mtime.nanos, properties.unix_mode.unwrap())
    };
    for file in &result.output_files {
        let expected = (1000, 500_000_000, 0o640);
        assert_eq!(told(&file.node_properties), expected, "{}", file.path);
    }
    assert_eq!(result.output_files.len(), 2);
    let tree = &result.output_directories[0].tree_digest;
    let root = farm.read_message::<reapi::Tree>(tree).await.root.unwrap();
    assert_eq!(told(&root.files[0].node_properties), (2000, 0, 0o751));
    assert_eq!(told(&root.node_properties).0, 3000);
    assert_eq!(told(&root.symlinks[0].node_properties).2, 0o777);
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_have_the_modes_and_times_that_a_client_gives_and_those_of_others_stay() {
    let farm = Farm::start().await;
    let given = |seconds, unix_mode| {
        Some(reapi::NodeProperties {
            mtime: Some(prost_types::Timestamp { seconds, nanos: 7 }),
            unix_mode,
            properties: Vec::new(),
        })
    };
    let content = Some(farm.upload("same").await);
    let file = |name: &str, node_properties| reapi::FileNode {
        name: name.to_owned(),
        digest: content.clone(),
        is_executable: false,
        node_properties,
    };
    let below = reapi::Directory {
        files: vec![file("deep", given(3000, None))],
        node_properties: given(4000, Some(0o700)),
        ..Default::default()
    };
    let root = reapi::Directory {
        files: vec![
            file("a", given(1000, Some(0o640))),
            file("b", given(2000, None)),
            file("c", None),
        ],
        directories: vec![reapi::DirectoryNode {
            name: "below".to_owned(),
            digest: Some(farm.upload_message(&below).await),
        }],
        symlinks: vec![reapi::SymlinkNode {
            name: "link".to_owned(),
            target: "a".to_owned(),
            node_properties: given(5000, None),
        }],
        ..Default::default()
    };
    let root = farm.upload_message(&root).await;
    let plain = [("a", "same"), ("c", "same")];
    let script = "stat -c '%n %Y %a' a c; cat a >/dev/null";
    let before = farm.shell(script, &plain, &[]).await.result.unwrap();
    let command = shell(
        "stat -c '%n %Y %a' a b c below/deep link; stat -c '%n %Y' below; cat a >out",
        &["out", "a"],
    );
    for _ in 0..2 {
        let task = farm.task(&command, root.clone()).await;
        let response = farm.execute(task).await;
        let result = response.result.unwrap();
        let stdout = stdout(&farm, &result).await;
        let lines: Vec<&str> = stdout.lines().collect();
        assert_eq!(lines[0], "a 1000 640");
        assert!(lines[1].starts_with("b 2000 "), "{stdout}");
        assert!(lines[3].starts_with("below/deep 3000 "), "{stdout}");
        assert!(lines[4].starts_with("link 5000 777"), "{stdout}");
        assert_eq!(lines[5], "below 4000");
        assert_eq!(result.output_files.len(), 2);
    }
    let after = farm.shell(script, &plain, &[]).await.result.unwrap();
    assert_eq!(stdout(&farm, &before).await, stdout(&farm, &after).await);
}

async fn stdout(farm: &Farm, result: &reapi::ActionResult) -> String {
    let raw = match &result.stdout_digest {
        Some(_) if result.stdout_raw.is_empty() => farm.read(&result.stdout_digest).await,
        _ => result.stdout_raw.to_vec(),
    };
    String::from_utf8(raw).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[expect(deprecated, reason = "clients of REAPI 2.0 use it")]
async fn each_kind_of_output_is_reported_as_what_it_is() {
    let farm = Farm::start().await;
    let script = "echo f > a/file; echo x > a/program; chmod 100 a/program; mkdir -p a/dir/empty; \
                  echo 1 > a/dir/one; ln -s one a/dir/link; mkfifo a/dir/fifo; ln -s nowhere a/link; \
                  ln -s dir a/to_dir; : > a/nothing";
    let outputs = [
        "a/file",
        "a/program",
        "a/dir",
        "a/link",
        "a/to_dir",
        "a/nothing",
        "a/missing",
        "a/./file",
        "b/c/missing",
    ];
    let response = farm.shell(script, &[], &outputs).await;
    assert_eq!(response.status, None);
    let result = response.result.unwrap();
    let files: Vec<(&str, bool)> = result
        .output_files
        .iter()
        .map(|file| (file.path.as_str(), file.is_executable))
        .collect();
    assert_eq!(
        files,
        [
            ("a/file", false),
            ("a/program", true),
            ("a/nothing", false),
            ("a/./file", false)
        ]
    );
    assert_eq!(farm.read(&result.output_files[0].digest).await, b"f\n");
    assert_eq!(farm.read(&result.output_files[1].digest).await, b"x\n");
    let links: Vec<(&str, &str)> = result
        .output_symlinks
        .iter()
        .map(|link| (link.path.as_str(), link.target.as_str()))
        .collect();
    assert_eq!(links, [("a/link", "nowhere"), ("a/to_dir", "dir")]);
    // For clients that know only these: each link in one of them.
    assert_eq!(result.output_file_symlinks, result.output_symlinks[..1]);
    assert_eq!(
        result.output_directory_symlinks,
        result.output_symlinks[1..]
    );
    let [directory] = &result.output_directories[..] else {
        panic!("{:?}", result.output_directories);
    };
    assert_eq!(directory.root_directory_digest, None);
    assert!(directory.is_topologically_sorted);
    let tree: reapi::Tree = farm.read_message(&directory.tree_digest).await;
    let root = tree.root.unwrap();
    assert_eq!(root.files.len(), 1);
    assert_eq!(root.symlinks[0].target, "one");
    assert_eq!(root.directories[0].name, "empty");
    assert_eq!(
        root.directories[0].digest,
        Some(FUNCTION.empty().to_proto())
    );
    assert_eq!(tree.children, [reapi::Directory::default()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_has_parents_first_and_equal_directories_once() {
    let farm = Farm::start().await;
    let script = "for x in a b c; do mkdir -p d/$x/deep/deeper; echo same > d/$x/deep/deeper/f; done; \
                  mkdir d/other; echo z > d/other/z; cp -r d/a/deep d/other/deep";
    let mut command = shell(script, &["d"]);
    command.output_directory_format = OutputDirectoryFormat::TreeAndDirectory as i32;
    let root = farm.root(&[]).await;
    let response = farm.execute(farm.task(&command, root).await).await;
    let directory = &response.result.as_ref().unwrap().output_directories[0];
    let tree: reapi::Tree = farm.read_message(&directory.tree_digest).await;
    let root = tree.root.clone().unwrap();
    assert_eq!(
        directory.root_directory_digest,
        Some(FUNCTION.digest_of(&root.encode_to_vec()).to_proto())
    );
    // d/{a,b,c}, deep, deeper, other.
    assert_eq!(tree.children.len(), 4);
    let mut seen = vec![FUNCTION.digest_of(&root.encode_to_vec()).to_proto()];
    let mut expected: Vec<_> = root
        .directories
        .iter()
        .flat_map(|d| d.digest.clone())
        .collect();
    for child in &tree.children {
        let digest = FUNCTION.digest_of(&child.encode_to_vec()).to_proto();
        assert!(expected.contains(&digest), "a child before its parent");
        assert!(!seen.contains(&digest), "a child twice");
        expected.extend(child.directories.iter().flat_map(|d| d.digest.clone()));
        // Each one is a blob, too.
        let blob: reapi::Directory = farm.read_message(&Some(digest.clone())).await;
        assert_eq!(&blob, child);
        seen.push(digest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_outside_of_the_working_directory_and_the_whole_root_can_be_asked_for() {
    let farm = Farm::start().await;
    let root = farm.root(&[("w/in", "input"), ("other/x", "y")]).await;
    let mut command = shell("mkdir ../i; echo made > ../i/m", &[".", "../i", "../.."]);
    command.working_directory = "w".to_owned();
    let response = farm.execute(farm.task(&command, root.clone()).await).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    command.output_paths = [".", "../i", ".."].map(str::to_owned).to_vec();
    let response = farm.execute(farm.task(&command, root).await).await;
    assert_eq!(response.status, None);
    let result = response.result.unwrap();
    let mut names = Vec::new();
    for directory in &result.output_directories {
        let tree: reapi::Tree = farm.read_message(&directory.tree_digest).await;
        let root = tree.root.unwrap();
        let files = root.files.iter().map(|f| f.name.clone());
        names.push(
            files
                .chain(root.directories.iter().map(|d| d.name.clone()))
                .collect::<Vec<_>>(),
        );
    }
    assert_eq!(names, [vec!["in"], vec!["m"], vec!["i", "other", "w"]]);
}

#[tokio::test(flavor = "multi_thread")]
#[expect(deprecated, reason = "clients of REAPI 2.0 use it")]
async fn clients_of_the_older_lists_are_served() {
    let farm = Farm::start().await;
    let script = "echo f > out/f; mkdir out/d; ln -s f out/lf; ln -s d out/ld";
    let mut command = shell(script, &[]);
    command.output_files = ["out/f", "out/lf", "out/none"].map(str::to_owned).to_vec();
    command.output_directories = ["out/d", "out/ld"].map(str::to_owned).to_vec();
    let root = farm.root(&[]).await;
    let response = farm.execute(farm.task(&command, root.clone()).await).await;
    assert_eq!(response.status, None);
    let result = response.result.unwrap();
    assert_eq!(result.output_files.len(), 1);
    assert_eq!(result.output_directories.len(), 1);
    assert_eq!(result.output_file_symlinks[0].path, "out/lf");
    assert_eq!(result.output_directory_symlinks[0].path, "out/ld");
    assert_eq!(result.output_symlinks.len(), 2);
    command.output_files = vec!["out/d".to_owned()];
    command.output_directories = vec!["out/f".to_owned()];
    let response = farm.execute(farm.task(&command, root).await).await;
    assert_eq!(code(&response), Code::FailedPrecondition);
    assert!(text(&response).contains("out/d"), "{}", text(&response));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_cannot_make_the_worker_read_outside_of_its_root() {
    let farm = Farm::start().await;
    let outside = farm.directory.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let script = format!(
        "rm -r d e; ln -s {0} d; ln -s {0}/secret f; mkdir e; ln -s {0} e/l; mkfifo pipe",
        outside.display()
    );
    let outputs = ["d/secret", "f", "e", "e/l/secret", "pipe", "good"];
    let script = format!("{script}; echo good > good");
    let response = farm
        .shell(&script, &[("d/secret", "input")], &outputs)
        .await;
    assert_eq!(
        code(&response),
        Code::InvalidArgument,
        "{}",
        text(&response)
    );
    let result = response.result.unwrap();
    // The rest was collected all the same.
    let files: Vec<&str> = result
        .output_files
        .iter()
        .map(|f| f.path.as_str())
        .collect();
    assert_eq!(files, ["good"]);
    let secret = FUNCTION.digest_of(b"secret");
    let (instance, asked) = (InstanceName::empty(), [secret]);
    let missing = farm.client.find_missing(&instance, &asked);
    assert_eq!(missing.await.unwrap(), [secret]);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_leftovers_end_in_a_clear_error_and_are_gone_afterwards() {
    let farm = Farm::start().await;
    let deep = "mkdir -p d; cd d; i=0; while [ $i -lt 1500 ]; do mkdir n; cd n; i=$((i+1)); done; echo x > f";
    for (script, word) in [
        ("mkdir d; touch \"$(printf 'd/\\377')\"", "UTF-8"),
        (
            "mkdir d; ln -s \"$(printf '\\377')\" d/x",
            r#"not UTF-8: "\xff""#,
        ),
        (deep, "1024"),
        ("mkdir d; mkfifo d/x; mkdir d/closed; chmod 0 d/closed", ""),
    ] {
        let response = farm.shell(script, &[], &["d"]).await;
        match word {
            "" => assert_eq!(response.status, None, "{}", text(&response)),
            word => {
                assert_eq!(
                    code(&response),
                    Code::InvalidArgument,
                    "{}",
                    text(&response)
                );
                assert!(text(&response).contains(word), "{}", text(&response));
            }
        }
    }
    // Whatever directory an action gets, it is empty.
    for _ in 0..6 {
        let response = farm
            .shell(
                "find . $TMPDIR $LOGS -mindepth 1; touch $TMPDIR/t $LOGS/l x; mkdir y",
                &[],
                &[],
            )
            .await;
        assert_eq!(response.status, None);
        assert_eq!(response.result.unwrap().stdout_digest, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_outputs_are_what_the_command_made() {
    let farm = Farm::start().await;
    // In several places, one of them under two names, one small, one the same as another.
    let script = "
        make() { mkdir -p $(dirname $1); yes $2 | head -c $3 > $1; }
        make a one 5000000; make b/c two 6000000; make d three 3; make e one 5000000
        make t/x four 7000001; make t/y five 4194304; make t/u/z six 9000000
        ln t/x t/same; chmod +x t/y";
    let outputs = ["a", "b/c", "d", "e", "t", "absent"];
    let response = farm.shell(script, &[("in", "")], &outputs).await;
    assert_eq!(response.status, None, "{response:?}");
    let result = response.result.unwrap();
    let expected = |word: &str, length: usize| -> Vec<u8> {
        let line = format!("{word}\n").into_bytes();
        line.into_iter().cycle().take(length).collect()
    };
    let files: Vec<&str> = result
        .output_files
        .iter()
        .map(|f| f.path.as_str())
        .collect();
    assert_eq!(files, ["a", "b/c", "d", "e"]);
    for (file, (word, length)) in result.output_files.iter().zip([
        ("one", 5_000_000),
        ("two", 6_000_000),
        ("three", 3),
        ("one", 5_000_000),
    ]) {
        assert!(
            farm.read(&file.digest).await == expected(word, length),
            "{}",
            file.path
        );
    }
    let tree: reapi::Tree = farm
        .read_message(&result.output_directories[0].tree_digest)
        .await;
    let root = tree.root.unwrap();
    let names: Vec<(&str, bool)> = root
        .files
        .iter()
        .map(|file| (file.name.as_str(), file.is_executable))
        .collect();
    assert_eq!(names, [("same", false), ("x", false), ("y", true)]);
    for (file, (word, length)) in root.files.iter().chain(&tree.children[0].files).zip([
        ("four", 7_000_001),
        ("four", 7_000_001),
        ("five", 4_194_304),
        ("six", 9_000_000),
    ]) {
        assert!(
            farm.read(&file.digest).await == expected(word, length),
            "{}",
            file.name
        );
    }
}

/// Makes outputs belong to a user of an action, as they do behind a runner; that takes root.
fn given_away(script: &str, outputs: &[&str]) -> Option<String> {
    nix::unistd::geteuid()
        .is_root()
        .then(|| format!("{script}; chown -R 12345:12345 {}", outputs.join(" ")))
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_that_overlap_or_are_named_twice_are_told_each_and_accuse_nobody() {
    let farm = Farm::start().await;
    for (round, outputs) in [["d", "d/x"], ["d/x", "d"], ["o", "./o"], ["o", "o"]]
        .iter()
        .enumerate()
    {
        let script =
            format!("mkdir -p d; echo {round} | tee d/x > o; head -c 5000000 /dev/zero > d/y");
        let Some(script) = given_away(&script, &["d", "o"]) else {
            crate::harness::skip("only root can give files away");
            return;
        };
        // The second time, the cache has them.
        for run in 0..2 {
            let script = format!("{script} # {run}");
            let response = farm.shell(&script, &[], outputs).await;
            assert_eq!(response.status, None, "{}", text(&response));
            let result = response.result.unwrap();
            let expected = outputs.iter().filter(|output| **output != "d").count();
            assert_eq!(result.output_files.len(), expected, "{outputs:?}");
            for file in &result.output_files {
                assert_eq!(
                    farm.read(&file.digest).await,
                    format!("{round}\n").as_bytes()
                );
            }
            for directory in &result.output_directories {
                let tree: reapi::Tree = farm.read_message(&directory.tree_digest).await;
                let files = tree.root.unwrap().files;
                assert_eq!(files[0].digest, result.output_files[0].digest);
            }
        }
        let now = std::time::Instant::now();
        assert_eq!(
            farm.executor
                .inputs
                .build_directory
                .describe_reuse_suspension(now),
            None,
            "{outputs:?}"
        );
    }
    // An action that does run as the worker is found out.
    farm.shell("echo x > o", &[], &["o"]).await;
    let now = std::time::Instant::now();
    let why = farm
        .executor
        .inputs
        .build_directory
        .describe_reuse_suspension(now)
        .unwrap();
    assert!(why.contains("1 actions"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_nobody_would_store_is_refused_before_it_is_read() {
    let settings = Settings {
        // A blob may take three quarters of it.
        stored: Some(Size::mib(24)),
        outputs_size: 30 << 20,
        ..Settings::default()
    };
    let farm = Farm::start_with(settings).await;
    // Reading one of them would take longer than a test may.
    let script = "echo out; truncate -s 8T large; truncate -s 8T other; echo small > small";
    let response = farm.shell(script, &[], &["large", "other", "small"]).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    let storage = format!("no blob of more than {} bytes", 18 << 20);
    assert!(text(&response).contains("\"large\""), "{}", text(&response));
    assert!(text(&response).contains(&storage), "{}", text(&response));
    let result = response.result.unwrap();
    assert_eq!(farm.read(&result.stdout_digest).await, b"out\n");
    assert_eq!(result.output_files[0].path, "small");
    // Each alone is small enough.
    let script = "mkdir d; truncate -s 10M d/0 d/1 d/2 d/3; echo x > d/x";
    let task = farm
        .task(&shell(script, &["d"]), farm.root(&[]).await)
        .await;
    let response = farm.execute(task.clone()).await;
    assert_eq!(code(&response), Code::InvalidArgument);
    let limit = "outputs.maximum_size";
    assert!(text(&response).contains(limit), "{}", text(&response));
    assert_eq!(farm.action_result(&task).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inode_is_read_once_however_many_names_it_has() {
    let settings = Settings {
        outputs_size: 10 << 20,
        ..Settings::default()
    };
    let farm = Farm::start_with(settings).await;
    let script = "mkdir -p d; head -c 8000000 /dev/urandom > d/0; i=0; \
                  while [ $i -lt 500 ]; do i=$((i+1)); ln d/0 d/$i; done; ln d/0 o; ln d/0 $LOGS/l";
    let response = farm.shell(script, &[], &["d", "o", "d/7"]).await;
    assert_eq!(response.status, None, "{}", text(&response));
    let result = response.result.unwrap();
    let digest = &result.output_files[0].digest;
    assert_eq!(&result.output_files[1].digest, digest);
    assert_eq!(&response.server_logs["l"].digest, digest);
    let tree: reapi::Tree = farm
        .read_message(&result.output_directories[0].tree_digest)
        .await;
    let files = tree.root.unwrap().files;
    assert_eq!(files.len(), 501);
    assert!(files.iter().all(|file| &file.digest == digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_no_client_could_receive_becomes_one_that_says_so() {
    let farm = Farm::start().await;
    let links: Vec<String> = (0..700).map(|n| format!("l{n}")).collect();
    let links: Vec<&str> = links.iter().map(String::as_str).collect();
    let script = "echo out; t=$(head -c 4000 /dev/zero | tr '\\0' t); i=0; \
                  while [ $i -lt 700 ]; do ln -s $t l$i; i=$((i+1)); done";
    let task = farm
        .task(&shell(script, &links), farm.root(&[]).await)
        .await;
    let response = farm.execute(task.clone()).await;
    assert!(response.encoded_len() < 4 << 20);
    assert_eq!(code(&response), Code::InvalidArgument);
    assert!(
        text(&response).contains("declare fewer"),
        "{}",
        text(&response)
    );
    let result = response.result.unwrap();
    assert_eq!(result.exit_code, 0);
    assert_eq!(farm.read(&result.stdout_digest).await, b"out\n");
    assert_eq!(farm.action_result(&task).await, None);
    // In one directory there may be as many.
    let script = format!("mkdir d; cd d; {script}");
    let response = farm.shell(&script, &[], &["d"]).await;
    assert_eq!(response.status, None, "{}", text(&response));
}
