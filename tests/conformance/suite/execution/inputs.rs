//! What an action is made of: its messages, its input root, and whose fault it is when they are not right.

use bb_remote_execution::proto::{
    reapi::{self, Action, Directory, DirectoryNode, FileNode, command::EnvironmentVariable},
    rpc, unpack,
};
use prost::Message;
use tonic::{Code, Status};

use super::{
    super::{
        rule::{Outcome, Stop, ensure, expect_code, fail, rules},
        server::Server,
    },
    Task,
};

rules! {
    Must, "Execution.Execute", "an action that is missing is FAILED_PRECONDITION", missing_action;
    Must, "Execution.Execute", "a command that is missing is FAILED_PRECONDITION", missing_command;
    Must, "Execution.Execute", "an input that is missing is FAILED_PRECONDITION", missing_input;
    Should, "Execution.Execute", "for each input that is missing there is a violation MISSING, whose subject is blobs/HASH/SIZE", violations;
    Must, "Execution.Execute", "an action that cannot be parsed, or has no command_digest, is an error of the client's", ill_formed_action;
    Must, "Command.arguments", "a command without arguments is an error of the client's", no_arguments;
    Should, "Directory", "an input root whose names occur twice, or are no single path component, is INVALID_ARGUMENT", not_canonical;
    Must, "Execution.Execute", "an input root whose names are not sorted is taken as it is, or INVALID_ARGUMENT", not_sorted;
    Must, "Directory", "no input leaves the input root by its name", no_escape;
    Must, "Command.environment_variables", "the command has them", environment;
    Must, "Command.working_directory", "the command runs in it", working_directory;
    Must, "Action.input_root_digest", "the command finds the files, directories, symlinks and executable bits of its input root", input_root;
}

/// The outcome of an action whose client has to do something about it.
async fn expect_precondition(server: &Server, task: &Task) -> Result<Status, Stop> {
    match server.outcome(task).await? {
        Err(status) if status.code() == Code::FailedPrecondition => Ok(status),
        other => {
            let codes = &[Code::FailedPrecondition];
            expect_code(other, codes, "Execute")?;
            fail("it succeeded")
        }
    }
}

async fn missing_action(server: &Server) -> Outcome {
    server.runs().await?;
    let action = server.digest(&server.random(50));
    let outcome = server.outcome_of(server.request(&action)).await?;
    expect_code(outcome, &[Code::FailedPrecondition], "Execute")
}

async fn missing_command(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.action.command_digest = Some(server.digest(&server.random(50)));
    expect_precondition(server, &task).await.map(drop)
}

fn lacking_file(server: &Server, name: &str) -> FileNode {
    FileNode {
        name: name.to_owned(),
        digest: Some(server.digest(&server.random(50))),
        ..Default::default()
    }
}

async fn missing_input(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.root.files = vec![lacking_file(server, "file")];
    expect_precondition(server, &task).await?;
    let mut task = server.task("exit 0");
    task.root.directories = vec![DirectoryNode {
        name: "directory".to_owned(),
        digest: Some(server.digest(&server.random(50))),
    }];
    expect_precondition(server, &task).await?;
    let mut task = server.task("exit 0");
    task.action.input_root_digest = Some(server.digest(&server.random(50)));
    expect_precondition(server, &task).await.map(drop)
}

async fn violations(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.root.files = vec![lacking_file(server, "a"), lacking_file(server, "b")];
    let status = expect_precondition(server, &task).await?;
    let details = rpc::Status::decode(status.details())
        .unwrap_or_default()
        .details;
    let failures: Vec<rpc::PreconditionFailure> = details.iter().filter_map(unpack).collect();
    let violations: Vec<_> = failures
        .iter()
        .flat_map(|failure| &failure.violations)
        .collect();
    for file in &task.root.files {
        let digest = file.digest.clone().unwrap_or_default();
        let subject = format!("blobs/{}", server.blob(&digest));
        let told = violations
            .iter()
            .any(|violation| violation.r#type == "MISSING" && violation.subject == subject);
        ensure!(
            told,
            "there is none with the subject {subject}: {violations:?}"
        );
    }
    Ok(())
}

/// Codes by which a client is told that it has to send something else.
const CLIENTS_FAULT: &[Code] = &[Code::InvalidArgument, Code::FailedPrecondition];

async fn ill_formed_action(server: &Server) -> Outcome {
    server.runs().await?;
    let no_message = server.store(vec![0xff; 30].into()).await?;
    let no_digests = Action {
        platform: Some(server.platform.clone()),
        salt: server.random(16),
        ..Default::default()
    };
    for (what, action) in [
        ("no Action", no_message),
        (
            "an Action without digests",
            server.store_message(&no_digests).await?,
        ),
    ] {
        let outcome = server.outcome_of(server.request(&action)).await?;
        expect_code(outcome, CLIENTS_FAULT, &format!("Execute of {what}"))?;
    }
    Ok(())
}

async fn no_arguments(server: &Server) -> Outcome {
    server.runs().await?;
    let mut task = server.task("exit 0");
    task.command.arguments.clear();
    expect_code(server.outcome(&task).await?, CLIENTS_FAULT, "Execute")
}

async fn not_canonical(server: &Server) -> Outcome {
    server.runs().await?;
    let content = server.store(server.random(20)).await?;
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(content.clone()),
        ..Default::default()
    };
    for names in [&["a", "a"][..], &["a/b"], &[".."], &["."], &[""]] {
        let mut task = server.task("exit 0");
        task.root.files = names.iter().map(|name| file(name)).collect();
        let call = format!("Execute with files {names:?}");
        expect_code(
            server.outcome(&task).await?,
            &[Code::InvalidArgument],
            &call,
        )?;
    }
    Ok(())
}

async fn not_sorted(server: &Server) -> Outcome {
    let content = server.random(20);
    let digest = server.store(content.clone()).await?;
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(digest.clone()),
        ..Default::default()
    };
    server.runs().await?;
    let mut task = server.task("cat a");
    task.root.files = vec![file("b"), file("a")];
    match server.outcome(&task).await? {
        Ok(response) => {
            let result = response.result.unwrap_or_default();
            ensure!(
                server.stdout(&result).await? == content,
                "a file is missing"
            );
            Ok(())
        }
        refused => expect_code(refused, &[Code::InvalidArgument], "Execute"),
    }
}

async fn no_escape(server: &Server) -> Outcome {
    server.runs().await?;
    let content = server.store(server.random(20)).await?;
    let name = format!("reapi-conformance-{}", uuid::Uuid::new_v4().simple());
    let mut task = server.task(&format!("test ! -e ../{name} && test ! -e /tmp/{name}"));
    for path in [format!("../{name}"), format!("/tmp/{name}")] {
        task.root.files = vec![FileNode {
            name: path.clone(),
            digest: Some(content.clone()),
            ..Default::default()
        }];
        if let Ok(response) = server.outcome(&task).await? {
            let code = response.result.unwrap_or_default().exit_code;
            ensure!(
                code == 0,
                "a file named {path:?} is outside of the input root"
            );
        }
    }
    Ok(())
}

async fn environment(server: &Server) -> Outcome {
    let mut task = server.task("echo \"$CONFORMANCE_ONE\" \"$CONFORMANCE_TWO\"");
    for (name, value) in [("CONFORMANCE_ONE", "a b"), ("CONFORMANCE_TWO", "ü=\n$x")] {
        task.command.environment_variables.insert(
            task.command.environment_variables.len() - 1,
            EnvironmentVariable {
                name: name.to_owned(),
                value: value.to_owned(),
            },
        );
    }
    let result = server.result(&task).await?;
    let stdout = server.stdout(&result).await?;
    ensure!(
        stdout == "a b ü=\n$x\n".as_bytes(),
        "they are {:?}",
        String::from_utf8_lossy(&stdout)
    );
    Ok(())
}

async fn working_directory(server: &Server) -> Outcome {
    let content = server.random(20);
    let below = Directory {
        files: vec![FileNode {
            name: "file".to_owned(),
            digest: Some(server.store(content).await?),
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut task = server.task("test -f file && echo out > ../other/out");
    task.root.directories = vec![
        DirectoryNode {
            name: "other".to_owned(),
            digest: Some(server.store_message(&Directory::default()).await?),
        },
        DirectoryNode {
            name: "work".to_owned(),
            digest: Some(server.store_message(&below).await?),
        },
    ];
    task.command.working_directory = "work".to_owned();
    let result = server.result(&task).await?;
    ensure!(
        result.exit_code == 0,
        "the command does not find a file there"
    );
    Ok(())
}

async fn input_root(server: &Server) -> Outcome {
    let (one, tool) = (server.random(20), "#!/bin/sh\nexit 0\n");
    let below = Directory {
        files: vec![FileNode {
            name: "tool".to_owned(),
            digest: Some(server.store(tool.into()).await?),
            is_executable: true,
            ..Default::default()
        }],
        ..Default::default()
    };
    let directory = |name: &str, digest| DirectoryNode {
        name: name.to_owned(),
        digest: Some(digest),
    };
    let mut task = server.task(
        "test -d empty || exit 2; test -z \"$(ls -A empty)\" || exit 3; test -s file || exit 4; \
         test ! -x file || test \"$(id -u)\" = 0 || exit 5; test -x sub/tool || exit 6; \
         test \"$(readlink link)\" = sub/tool || exit 7; test -f link || exit 8; cat file",
    );
    task.root.files = vec![FileNode {
        name: "file".to_owned(),
        digest: Some(server.store(one.clone()).await?),
        ..Default::default()
    }];
    task.root.directories = vec![
        directory("empty", server.store_message(&Directory::default()).await?),
        directory("sub", server.store_message(&below).await?),
    ];
    task.root.symlinks = vec![reapi::SymlinkNode {
        name: "link".to_owned(),
        target: "sub/tool".to_owned(),
        ..Default::default()
    }];
    let result = server.result(&task).await?;
    ensure!(
        result.exit_code == 0,
        "the command finds something else, by its exit code {}",
        result.exit_code
    );
    ensure!(
        server.stdout(&result).await? == one,
        "a file has another content"
    );
    Ok(())
}
