//! Stand-in for the executor, so that the protocol's side builds alone.

use tokio_util::sync::CancellationToken;

use super::task::Task;
use crate::proto::{self, reapi, rpc};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    FetchingInputs,
    Running,
    UploadingOutputs,
}

pub struct Executor {}

impl Executor {
    /// Never fails: failures are in the response's status.
    pub async fn execute(
        &self,
        _slot: usize,
        _task: Task,
        _stage: &tokio::sync::watch::Sender<Stage>,
        _cancel: &CancellationToken,
    ) -> reapi::ExecuteResponse {
        reapi::ExecuteResponse {
            status: Some(proto::status(rpc::Code::Unimplemented, "no executor")),
            ..Default::default()
        }
    }

    pub async fn check_readiness(&self, _slot: usize) -> Result<(), String> {
        Ok(())
    }
}
