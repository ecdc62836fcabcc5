//! What a command leaves at the places that it declared.

use bb_remote_execution::proto::reapi::{
    self, ActionResult, Directory, OutputDirectory, Tree, command::OutputDirectoryFormat,
};
use prost::Message;

use super::{
    super::{
        rule::{Expect, Outcome, Stop, ensure, fail, rules, unsupported},
        server::Server,
    },
    Task,
};

rules! {
    Must, "Command.output_paths", "files are returned, with their content and executable bit, by the paths that were declared", files;
    Must, "Command.output_paths", "a directory is returned as a Tree that has all of it, empty directories too", directory;
    Must, "Command.output_paths", "a symlink is returned as such, with its target", symlink;
    Must, "Command.output_paths", "what was not declared is not returned", undeclared;
    Must, "Command.output_paths", "directories leading up to an output are there before the command runs", parents;
    Must, "Command.output_paths", "paths are relative to the working directory", relative;
    Must, "Command.output_paths", "an output that is not there is left out, and the action has its result", absent;
    Must, "Command.output_files", "files and directories that are declared in the older way are returned", older;
    Must, "Command.output_paths", "where it is used, output_files and output_directories are ignored", newer_first;
    Should, "Command.OutputDirectoryFormat", "a root_directory_digest is returned where that was asked for, with all Directories in the CAS", directory_format;
    Must, "ActionResult", "all that a result names can be read from the CAS", all_there;
    Must, "ActionResult.stdout_digest", "a standard output of 300 KiB is returned whole", large_stdout;
    Must, "ActionResult", "outputs of a command that fails are returned as well", of_failure;
    Must, "OutputFile.digest", "an empty file is returned", empty_file;
    Should, "ExecuteRequest.inline_stdout", "the standard output and files are inlined where that is asked for, executed or looked up", inline;
}

fn task(server: &Server, script: &str, paths: &[&str]) -> Task {
    let mut task = server.task(script);
    task.command.output_paths = paths.iter().map(|path| (*path).to_owned()).collect();
    task
}

fn paths(result: &ActionResult) -> Vec<String> {
    #[expect(deprecated, reason = "older servers return symlinks there")]
    let symlinks = result
        .output_symlinks
        .iter()
        .chain(&result.output_file_symlinks)
        .chain(&result.output_directory_symlinks);
    let mut paths: Vec<String> = symlinks.map(|symlink| symlink.path.clone()).collect();
    paths.extend(result.output_files.iter().map(|file| file.path.clone()));
    paths.extend(
        result
            .output_directories
            .iter()
            .map(|directory| directory.path.clone()),
    );
    paths.sort();
    paths.dedup();
    paths
}

async fn files(server: &Server) -> Outcome {
    let script = "printf one > a; printf two > b; chmod 755 b";
    let result = server.result(&task(server, script, &["a", "b"])).await?;
    ensure!(
        paths(&result) == ["a", "b"],
        "{:?} are returned",
        paths(&result)
    );
    for file in &result.output_files {
        let expected = if file.path == "a" { "one" } else { "two" };
        let content = server
            .content(&file.digest.clone().unwrap_or_default())
            .await?;
        ensure!(
            content == expected.as_bytes(),
            "{} has another content",
            file.path
        );
        ensure!(
            file.is_executable == (file.path == "b"),
            "is_executable of {} is {}",
            file.path,
            file.is_executable
        );
    }
    Ok(())
}

async fn tree_of(server: &Server, directory: &OutputDirectory) -> Result<Tree, Stop> {
    let Some(digest) = &directory.tree_digest else {
        return fail("the directory has no tree_digest");
    };
    match Tree::decode(&*server.content(digest).await?) {
        Ok(tree) => Ok(tree),
        Err(error) => fail(format!("the content of tree_digest is no Tree: {error}")),
    }
}

async fn directory(server: &Server) -> Outcome {
    let script =
        "mkdir -p d/sub/deep d/empty; printf x > d/f; printf y > d/sub/deep/g; ln -s ../f d/sub/l";
    let result = server.result(&task(server, script, &["d"])).await?;
    let [directory] = result.output_directories.as_slice() else {
        return fail(format!(
            "{} directories are returned",
            result.output_directories.len()
        ));
    };
    ensure!(directory.path == "d", "its path is {:?}", directory.path);
    let tree = tree_of(server, directory).await?;
    let child = |parent: &Directory, name: &str| -> Result<Directory, Stop> {
        let node = parent.directories.iter().find(|node| node.name == name);
        let digest = node
            .and_then(|node| node.digest.clone())
            .unwrap_or_default();
        let found = tree
            .children
            .iter()
            .find(|child| server.digest(&child.encode_to_vec()) == digest);
        match found {
            Some(found) => Ok(found.clone()),
            None => fail(format!("the Tree has no {name}")),
        }
    };
    let root = tree.root.clone().unwrap_or_default();
    let sub = child(&root, "sub")?;
    let deep = child(&sub, "deep")?;
    let empty = child(&root, "empty")?;
    let names = |directory: &Directory| -> Vec<String> {
        directory
            .files
            .iter()
            .map(|file| file.name.clone())
            .collect()
    };
    ensure!(
        names(&root) == ["f"] && names(&deep) == ["g"],
        "files are missing"
    );
    ensure!(
        empty == Directory::default(),
        "the empty directory is not empty"
    );
    let link = sub.symlinks.first().map(|link| link.target.as_str());
    ensure!(link == Some("../f"), "the symlink's target is {link:?}");
    let content = server
        .content(&deep.files[0].digest.clone().unwrap_or_default())
        .await?;
    ensure!(content == b"y", "a file has another content");
    Ok(())
}

async fn symlink(server: &Server) -> Outcome {
    let script = "printf x > file; ln -s file to_file; ln -s nowhere dangling";
    let result = server
        .result(&task(server, script, &["dangling", "to_file"]))
        .await?;
    #[expect(deprecated, reason = "older servers return symlinks there")]
    let links = result
        .output_symlinks
        .iter()
        .chain(&result.output_file_symlinks)
        .chain(&result.output_directory_symlinks);
    let mut links: Vec<_> = links
        .map(|link| (link.path.as_str(), link.target.as_str()))
        .collect();
    links.sort_unstable();
    links.dedup();
    ensure!(
        links == [("dangling", "nowhere"), ("to_file", "file")],
        "symlinks {links:?} are returned"
    );
    Ok(())
}

async fn undeclared(server: &Server) -> Outcome {
    let result = server
        .result(&task(server, "echo > a; echo > b", &["a"]))
        .await?;
    ensure!(paths(&result) == ["a"], "{:?} are returned", paths(&result));
    Ok(())
}

async fn parents(server: &Server) -> Outcome {
    let script = "printf x > deep/er/file";
    let result = server
        .result(&task(server, script, &["deep/er/file"]))
        .await?;
    ensure!(
        paths(&result) == ["deep/er/file"],
        "{:?} are returned, exit code {}",
        paths(&result),
        result.exit_code
    );
    Ok(())
}

async fn relative(server: &Server) -> Outcome {
    let mut task = task(server, "printf x > file", &["file"]);
    task.root.directories = vec![reapi::DirectoryNode {
        name: "work".to_owned(),
        digest: Some(server.store_message(&Directory::default()).await?),
    }];
    task.command.working_directory = "work".to_owned();
    let result = server.result(&task).await?;
    ensure!(
        paths(&result) == ["file"],
        "{:?} are returned",
        paths(&result)
    );
    Ok(())
}

async fn absent(server: &Server) -> Outcome {
    let result = server
        .result(&task(server, "printf x > a", &["a", "b"]))
        .await?;
    ensure!(
        paths(&result) == ["a"] && result.exit_code == 0,
        "{:?} are returned, exit code {}",
        paths(&result),
        result.exit_code
    );
    Ok(())
}

#[expect(deprecated, reason = "it is about fields that are")]
async fn older(server: &Server) -> Outcome {
    let mut task = server.task("printf x > file; mkdir -p directory; printf y > directory/f");
    task.command.output_files = vec!["file".to_owned()];
    task.command.output_directories = vec!["directory".to_owned()];
    let result = server.result(&task).await?;
    let returned = paths(&result);
    if returned.is_empty()
        && let Ok(all) = &server.capabilities
        && let Some(low) = &all.low_api_version
        && (low.major, low.minor) >= (2, 1)
    {
        return unsupported("low_api_version is above 2.0, whose way this is");
    }
    ensure!(
        returned == ["directory", "file"],
        "{returned:?} are returned"
    );
    Ok(())
}

#[expect(deprecated, reason = "it is about fields that are")]
async fn newer_first(server: &Server) -> Outcome {
    let mut task = task(server, "printf x > a; printf x > b", &["a"]);
    task.command.output_files = vec!["b".to_owned()];
    let result = server.result(&task).await?;
    ensure!(paths(&result) == ["a"], "{:?} are returned", paths(&result));
    Ok(())
}

async fn directory_format(server: &Server) -> Outcome {
    let mut task = task(server, "mkdir -p d/sub; printf x > d/sub/f", &["d"]);
    task.command.output_directory_format = OutputDirectoryFormat::TreeAndDirectory as i32;
    let result = server.result(&task).await?;
    let [directory] = result.output_directories.as_slice() else {
        return fail(format!(
            "{} directories are returned",
            result.output_directories.len()
        ));
    };
    let Some(root) = &directory.root_directory_digest else {
        return unsupported("only a Tree is returned, as a server may");
    };
    let root = Directory::decode(&*server.content(root).await?);
    let sub = root.unwrap_or_default().directories.first().cloned();
    let sub = sub.and_then(|sub| sub.digest).unwrap_or_default();
    let sub = Directory::decode(&*server.content(&sub).await?).unwrap_or_default();
    ensure!(
        sub.files.len() == 1,
        "a Directory below the root is another one"
    );
    tree_of(server, directory).await.map(drop)
}

async fn all_there(server: &Server) -> Outcome {
    let script = "printf x > a; mkdir -p d/sub; head -c 100000 /dev/urandom > d/sub/f; echo out; echo err >&2";
    let result = server.result(&task(server, script, &["a", "d"])).await?;
    let mut digests: Vec<reapi::Digest> = Vec::new();
    digests.extend(
        result
            .output_files
            .iter()
            .filter_map(|file| file.digest.clone()),
    );
    digests.extend(result.stdout_digest.clone());
    digests.extend(result.stderr_digest.clone());
    for directory in &result.output_directories {
        digests.extend(directory.tree_digest.clone());
        let tree = tree_of(server, directory).await?;
        for directory in tree.root.iter().chain(&tree.children) {
            digests.extend(
                directory
                    .files
                    .iter()
                    .filter_map(|file| file.digest.clone()),
            );
        }
    }
    for digest in digests {
        let content = server.content(&digest).await?;
        ensure!(
            server.digest(&content) == digest,
            "a blob has another content"
        );
    }
    Ok(())
}

async fn large_stdout(server: &Server) -> Outcome {
    let script = "i=0; while [ $i -lt 3000 ]; do printf '%0100d\\n' $i; i=$((i+1)); done";
    let result = server.result(&server.task(script)).await?;
    let stdout = server.stdout(&result).await?;
    ensure!(stdout.len() == 3_000 * 101, "it has {} bytes", stdout.len());
    Ok(())
}

async fn of_failure(server: &Server) -> Outcome {
    let result = server
        .result(&task(server, "printf x > a; exit 3", &["a"]))
        .await?;
    ensure!(
        result.exit_code == 3 && paths(&result) == ["a"],
        "{:?} are returned, exit code {}",
        paths(&result),
        result.exit_code
    );
    Ok(())
}

async fn empty_file(server: &Server) -> Outcome {
    let result = server.result(&task(server, ": > a", &["a"])).await?;
    let digest = result
        .output_files
        .first()
        .and_then(|file| file.digest.clone());
    ensure!(
        digest == Some(server.digest(b"")),
        "its digest is {digest:?}"
    );
    Ok(())
}

async fn inline(server: &Server) -> Outcome {
    server.runs().await?;
    let task = task(
        server,
        "echo inlined; printf x > wanted; printf y > other",
        &["other", "wanted"],
    );
    let action = server.prepare(&task).await?;
    for skip_cache_lookup in [true, false] {
        let request = reapi::ExecuteRequest {
            skip_cache_lookup,
            inline_stdout: true,
            inline_output_files: vec!["wanted".to_owned()],
            ..server.request(&action)
        };
        let outcome = server.outcome_of(request).await?;
        let result = outcome.expect_ok("Execute")?.result.unwrap_or_default();
        let contents = |path: &str| {
            let mut files = result.output_files.iter();
            let file = files.find(|file| file.path == path);
            file.map(|file| file.contents.clone()).unwrap_or_default()
        };
        ensure!(
            contents("other").is_empty(),
            "a file is inlined that was not asked for"
        );
        if contents("wanted").is_empty() {
            return unsupported("it is not inlined; that is a hint");
        }
        ensure!(
            result.stdout_raw == "inlined\n" && contents("wanted") == "x",
            "something else is inlined"
        );
    }
    Ok(())
}
