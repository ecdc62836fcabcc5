//! The Action Cache.

use bb_remote_execution::proto::reapi::{
    self, Action, ActionResult, Directory, FileNode, OutputDirectory, OutputFile, Tree,
    UpdateActionResultRequest,
};
use tonic::{Code, Status};

use super::{
    rule::{Expect, Outcome, Stop, ensure, expect_code, rules, unsupported},
    server::Server,
};

rules! {
    Must, "ActionCache.GetActionResult", "an action without a result is NOT_FOUND", unknown;
    Must, "ActionCache.UpdateActionResult", "what is stored is what GetActionResult returns", update_and_get;
    Must, "ActionCache.UpdateActionResult", "a newer result takes the place of an older one", update_again;
    Must, "ActionCacheUpdateCapabilities.update_enabled", "where updates are announced as disabled, they are refused", disabled;
    Should, "ActionCache.UpdateActionResult", "a result with a digest that is none is INVALID_ARGUMENT", ill_formed;
    Should, "ActionCache.GetActionResult", "a result is not returned while a file that it names is missing", incomplete_file;
    Should, "ActionCache.GetActionResult", "a result is not returned while a file in a Tree that it names is missing", incomplete_tree;
    Should, "GetActionResultRequest.inline_stdout", "the standard output is inlined where that is asked for", inline_stdout;
    Should, "GetActionResultRequest.inline_output_files", "a file is inlined where that is asked for, and others are not", inline_files;
    Should, "GetActionResultRequest.digest_function", "left out, it is told by the hash's length", inferred;
}

/// Stores an action that nobody has asked for; its digest.
async fn action(server: &Server) -> Result<reapi::Digest, Stop> {
    let command = reapi::Command {
        arguments: vec!["/bin/true".to_owned()],
        ..Default::default()
    };
    let action = Action {
        command_digest: Some(server.store_message(&command).await?),
        input_root_digest: Some(server.store_message(&Directory::default()).await?),
        salt: server.random(16),
        ..Default::default()
    };
    server.store_message(&action).await
}

async fn try_update(
    server: &Server,
    action: &reapi::Digest,
    result: ActionResult,
) -> Result<ActionResult, Status> {
    let request = UpdateActionResultRequest {
        instance_name: server.instance.clone(),
        action_digest: Some(action.clone()),
        action_result: Some(result),
        digest_function: server.function_value(),
        ..Default::default()
    };
    let answer = server.action_cache().update_action_result(request).await?;
    Ok(answer.into_inner())
}

/// Unsupported where updates are not for this client.
async fn update(server: &Server, action: &reapi::Digest, result: ActionResult) -> Outcome {
    let announced = server.cache().action_cache_update_capabilities;
    if server.capabilities.is_ok() && !announced.unwrap_or_default().update_enabled {
        return unsupported("update_enabled is not announced");
    }
    let updated = try_update(server, action, result).await;
    updated.expect_ok("UpdateActionResult").map(drop)
}

async fn file(server: &Server, path: &str) -> Result<OutputFile, Stop> {
    Ok(OutputFile {
        path: path.to_owned(),
        digest: Some(server.store(server.random(100)).await?),
        ..Default::default()
    })
}

async fn unknown(server: &Server) -> Outcome {
    let action = server.digest(&server.random(50));
    let result = server.get_action_result(&action, |_| ()).await;
    expect_code(result, &[Code::NotFound], "GetActionResult")
}

async fn update_and_get(server: &Server) -> Outcome {
    let action = action(server).await?;
    let mut executable = file(server, "b/tool").await?;
    executable.is_executable = true;
    let result = ActionResult {
        output_files: vec![file(server, "a").await?, executable],
        stdout_raw: server.random(10),
        stderr_digest: Some(server.store(server.random(40)).await?),
        exit_code: 0,
        ..Default::default()
    };
    update(server, &action, result.clone()).await?;
    let got = server.get_action_result(&action, |_| ()).await;
    let got = got.expect_ok("GetActionResult")?;
    ensure!(
        got.output_files == result.output_files
            && got.stderr_digest == result.stderr_digest
            && got.exit_code == 0,
        "another result is returned: {got:?}"
    );
    Ok(())
}

async fn update_again(server: &Server) -> Outcome {
    let action = action(server).await?;
    for path in ["older", "newer"] {
        let result = ActionResult {
            output_files: vec![file(server, path).await?],
            ..Default::default()
        };
        update(server, &action, result).await?;
    }
    let got = server.get_action_result(&action, |_| ()).await;
    let got = got.expect_ok("GetActionResult")?;
    let path = got.output_files.first().map(|file| file.path.as_str());
    ensure!(path == Some("newer"), "{path:?} is returned");
    Ok(())
}

async fn disabled(server: &Server) -> Outcome {
    let announced = server.cache().action_cache_update_capabilities;
    if announced.unwrap_or_default().update_enabled {
        return unsupported("update_enabled is announced");
    }
    let action = action(server).await?;
    let updated = try_update(server, &action, ActionResult::default()).await;
    ensure!(updated.is_err(), "UpdateActionResult succeeded");
    Ok(())
}

async fn ill_formed(server: &Server) -> Outcome {
    let action = action(server).await?;
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "file".to_owned(),
            digest: Some(reapi::Digest {
                hash: "no hash".to_owned(),
                size_bytes: 1,
            }),
            ..Default::default()
        }],
        ..Default::default()
    };
    // Where updates are for this client at all.
    update(server, &action, ActionResult::default()).await?;
    let updated = try_update(server, &action, result).await;
    expect_code(updated, &[Code::InvalidArgument], "UpdateActionResult")
}

/// A server may refuse such a result at once.
async fn is_not_returned(server: &Server, result: ActionResult) -> Outcome {
    let action = action(server).await?;
    // Where updates are for this client at all.
    update(server, &action, ActionResult::default()).await?;
    if try_update(server, &action, result).await.is_err() {
        return Ok(());
    }
    let got = server.get_action_result(&action, |_| ()).await;
    expect_code(got, &[Code::NotFound], "GetActionResult")
}

async fn incomplete_file(server: &Server) -> Outcome {
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "file".to_owned(),
            digest: Some(server.digest(&server.random(100))),
            ..Default::default()
        }],
        ..Default::default()
    };
    is_not_returned(server, result).await
}

async fn incomplete_tree(server: &Server) -> Outcome {
    let tree = Tree {
        root: Some(Directory {
            files: vec![FileNode {
                name: "file".to_owned(),
                digest: Some(server.digest(&server.random(100))),
                ..Default::default()
            }],
            ..Default::default()
        }),
        children: Vec::new(),
    };
    let result = ActionResult {
        output_directories: vec![OutputDirectory {
            path: "directory".to_owned(),
            tree_digest: Some(server.store_message(&tree).await?),
            ..Default::default()
        }],
        ..Default::default()
    };
    is_not_returned(server, result).await
}

async fn inline_stdout(server: &Server) -> Outcome {
    let action = action(server).await?;
    let content = server.random(100);
    let result = ActionResult {
        stdout_digest: Some(server.store(content.clone()).await?),
        ..Default::default()
    };
    update(server, &action, result).await?;
    let got = server
        .get_action_result(&action, |request| request.inline_stdout = true)
        .await;
    let got = got.expect_ok("GetActionResult")?;
    if got.stdout_raw.is_empty() {
        ensure!(got.stdout_digest.is_some(), "the standard output is lost");
        return unsupported("it is not inlined; that is a hint");
    }
    ensure!(got.stdout_raw == content, "something else is inlined");
    Ok(())
}

async fn inline_files(server: &Server) -> Outcome {
    let action = action(server).await?;
    let content = server.random(100);
    let digest = server.store(content.clone()).await?;
    let wanted = OutputFile {
        path: "wanted".to_owned(),
        digest: Some(digest.clone()),
        ..Default::default()
    };
    let other = OutputFile {
        path: "other".to_owned(),
        ..wanted.clone()
    };
    let result = ActionResult {
        output_files: vec![other, wanted],
        ..Default::default()
    };
    update(server, &action, result).await?;
    let inline = vec!["wanted".to_owned()];
    let got = server
        .get_action_result(&action, |request| request.inline_output_files = inline)
        .await;
    let got = got.expect_ok("GetActionResult")?;
    let of = |path: &str| got.output_files.iter().find(|file| file.path == path);
    let (Some(wanted), Some(other)) = (of("wanted"), of("other")) else {
        ensure!(false, "files are lost: {got:?}");
        return Ok(());
    };
    ensure!(
        wanted.digest == Some(digest),
        "the digest of a file is left out"
    );
    ensure!(
        other.contents.is_empty(),
        "a file is inlined that was not asked for"
    );
    if wanted.contents.is_empty() {
        return unsupported("it is not inlined; that is a hint");
    }
    ensure!(wanted.contents == content, "something else is inlined");
    Ok(())
}

async fn inferred(server: &Server) -> Outcome {
    if !server.function.is_told_by_length() {
        return unsupported("the function must be named");
    }
    let action = action(server).await?;
    update(server, &action, ActionResult::default()).await?;
    let got = server
        .get_action_result(&action, |request| request.digest_function = 0)
        .await;
    got.expect_ok("GetActionResult").map(drop)
}
