//! What each method asks for.

use crate::config::grants::Permission::{
    self, ActionCacheRead, ActionCacheWrite, CasRead, CasWrite, Execute, See, Steer, Work,
};

/// What a caller of a method must be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Nothing: whether a server is healthy is nobody's secret.
    Nothing,
    /// This, anywhere.
    Anywhere(Permission),
    /// One of these, with the instance that the request names.
    InInstance(&'static [Permission]),
}

use Requirement::{Anywhere, InInstance, Nothing};

/// Of a method by its path, `/package.Service/Method`; `None` for one that is not known.
pub fn requirement(path: &str) -> Option<Requirement> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    Some(match (service, method) {
        ("build.bazel.remote.execution.v2.Execution", "Execute" | "WaitExecution") => {
            InInstance(&[Execute])
        }
        ("build.bazel.remote.execution.v2.Capabilities", "GetCapabilities") => InInstance(&[
            Execute,
            CasRead,
            CasWrite,
            ActionCacheRead,
            ActionCacheWrite,
        ]),
        ("build.bazel.remote.execution.v2.ContentAddressableStorage", method) => match method {
            // Who writes asks first what is not there yet.
            "FindMissingBlobs" => InInstance(&[CasRead, CasWrite]),
            "BatchReadBlobs" | "GetTree" | "SplitBlob" => InInstance(&[CasRead]),
            "BatchUpdateBlobs" | "SpliceBlob" => InInstance(&[CasWrite]),
            _ => return None,
        },
        ("google.bytestream.ByteStream", method) => match method {
            "Read" => InInstance(&[CasRead]),
            "Write" | "QueryWriteStatus" => InInstance(&[CasWrite]),
            _ => return None,
        },
        ("build.bazel.remote.execution.v2.ActionCache", method) => match method {
            "GetActionResult" => InInstance(&[ActionCacheRead]),
            "UpdateActionResult" => InInstance(&[ActionCacheWrite]),
            _ => return None,
        },
        ("bb_remote_execution.live_output.LiveOutput", "Serve") => InInstance(&[Work]),
        ("buildbarn.remoteworker.OperationQueue", "Synchronize") => InInstance(&[Work]),
        ("google.longrunning.Operations", method) => match method {
            "GetOperation" | "ListOperations" | "WaitOperation" => Anywhere(See),
            "CancelOperation" | "DeleteOperation" => Anywhere(Steer),
            _ => return None,
        },
        ("buildbarn.buildqueuestate.BuildQueueState", method) => match method {
            "GetOperation" => Anywhere(See),
            "KillOperations" | "TerminateWorkers" | "AddDrain" | "RemoveDrain" => Anywhere(Steer),
            _ if method.starts_with("List") => Anywhere(See),
            _ => return None,
        },
        ("bb_remote_execution.control.SchedulerControl", method) => match method {
            "GetStatus" | "ExplainOperation" | "GetAction" | "GetStoreUsage" => Anywhere(See),
            "ListOldestOperations" | "ListDrainedQueues" | "ListTerminatingWorkers" => {
                Anywhere(See)
            }
            "KillOperation" | "CheckStore" | "RemoveActionResult" => Anywhere(Steer),
            _ => return None,
        },
        ("grpc.health.v1.Health", "Check" | "Watch" | "List") => Nothing,
        (
            "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection",
            "ServerReflectionInfo",
        ) => Anywhere(See),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_our_protocols_that_a_scheduler_serves_is_in_the_table() {
        use prost::Message;
        let files = prost_types::FileDescriptorSet::decode(crate::proto::DESCRIPTORS).unwrap();
        // Served by others: the runner has no grants, and the rest is called, not served.
        let others = [
            "buildbarn.runner.Runner",
            "buildbarn.iscc.InitialSizeClassCache",
            "buildbarn.remoteactionrouter.ActionRouter",
            "buildbarn.completedactionlogger.CompletedActionLogger",
            "opentelemetry.proto.collector.trace.v1.TraceService",
        ];
        let mut known = 0;
        for file in files.file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                for method in &service.method {
                    let path = format!("/{name}/{}", method.name());
                    let is_known = requirement(&path).is_some();
                    assert_eq!(is_known, !others.contains(&name.as_str()), "{path}");
                    known += usize::from(is_known);
                }
            }
        }
        assert!(known > 25, "{known}");
        for unknown in ["", "/", "/a/b", "/google.bytestream.ByteStream/read"] {
            assert_eq!(requirement(unknown), None);
        }
    }
}
