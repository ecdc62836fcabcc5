//! A runner of one's own, to copy from: the protocol that bb_worker speaks, whole.
//!
//! A worker's `runners.endpoint` names any server of it. What it must keep:
//!
//! 1. All paths are below the build directory, which it shares with the worker, and lead out of it
//!    neither by `..` nor by a symbolic link: an action may have left one.
//! 2. It makes both log files, which do not exist yet.
//! 3. It answers when nothing of the command runs any more. While something might, it holds a lock
//!    (flock(2)) on the directory that the input root lies in, as the worker may give a call up.
//! 4. A command that cannot be started is INVALID_ARGUMENT; what is the runner's own fault is not.

use std::{path::PathBuf, process::Stdio};

use bb_remote_execution::proto::runner::{
    CheckReadinessRequest, RunRequest, RunResponse, runner_server,
};
use tonic::{Request, Response, Status};

use super::*;

/// Runs commands as the user that it runs as itself, which is no containment at all.
struct Plain {
    build_directory: PathBuf,
}

impl Plain {
    /// Simpler than right: a symbolic link is refused only as the last part of a path.
    fn path(&self, text: &str) -> Result<PathBuf, Status> {
        let relative = Path::new(text);
        let plain = relative
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        match plain {
            true => Ok(self.build_directory.join(relative)),
            false => Err(Status::invalid_argument(format!(
                "{text:?} leads out of the build directory"
            ))),
        }
    }
}

#[tonic::async_trait]
impl runner_server::Runner for Plain {
    /// Ready when it sees what the worker has made.
    async fn check_readiness(
        &self,
        request: Request<CheckReadinessRequest>,
    ) -> Result<Response<()>, Status> {
        let path = self.path(&request.into_inner().path)?;
        match path.symlink_metadata() {
            Ok(_) => Ok(Response::new(())),
            Err(error) => Err(Status::internal(format!("{}: {error}", path.display()))),
        }
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        let request = request.into_inner();
        let root = self.path(&request.input_root_directory)?;
        let io = |error: std::io::Error| Status::internal(error.to_string());
        let locked = fs::File::open(root.parent().unwrap_or(&root)).map_err(io)?;
        locked.lock().map_err(io)?;
        let log = |text: &str| fs::File::create_new(self.path(text)?).map_err(io);
        let (stdout, stderr) = (log(&request.stdout_path)?, log(&request.stderr_path)?);
        let Some((program, arguments)) = request.arguments.split_first() else {
            return Err(Status::invalid_argument("no arguments"));
        };
        let mut command = tokio::process::Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&request.environment_variables)
            .current_dir(root.join(&request.working_directory))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .kill_on_drop(true);
        let status = command
            .spawn()
            .map_err(|error| Status::invalid_argument(format!("{program}: {error}")))?
            .wait()
            .await
            .map_err(io)?;
        drop(locked);
        Ok(Response::new(RunResponse {
            // No code: it was killed by a signal.
            exit_code: status.code().map_or(-1, i64::from),
            // buildbarn.resourceusage messages, and others: clients see them beside the result.
            resource_usage: Vec::new(),
        }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_of_ones_own_runs_commands() {
    let directory = tempfile::tempdir().unwrap();
    let slot = Slot::make(directory.path(), 0, nix::unistd::getuid().as_raw());
    let runner = Plain {
        build_directory: directory.path().to_owned(),
    };
    let request = slot.request(&["sh", "-c", "pwd; exit 3"]);
    let response = runner_server::Runner::run(&runner, Request::new(request)).await;
    assert_eq!(response.unwrap().into_inner().exit_code, 3);
    let stdout = fs::read_to_string(slot.path.join("stdout")).unwrap();
    assert_eq!(stdout.trim(), slot.path.join("root").to_str().unwrap());
    let status = runner_server::Runner::run(&runner, Request::new(slot.request(&[]))).await;
    // Its logs are there already.
    assert_eq!(status.unwrap_err().code(), Code::Internal);
}
