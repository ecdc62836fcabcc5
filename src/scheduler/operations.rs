//! google.longrunning.Operations: what clients may ask of operations beside REAPI, and how they cancel one.
//!
//! `ListOperations` has a filter, in which terms are joined by `AND`: `stage = QUEUED`, `EXECUTING` or
//! `COMPLETED`; `done = true` or `false`; `tool_invocation_id = "…"`. The name of the collection is an
//! instance name: operations of it, and of those below it, are listed.
//!
//! An operation of a scheduler before this one is taken up by whoever asks for it by its whole name and
//! may execute, as by `WaitExecution`; whoever cancels it need not be allowed that, as nothing is executed.

use std::time::Duration;

use futures::StreamExt;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    execution::{Asked, ExecutionService, Operations as OperationStream},
    operation_message::{self, Details},
    operation_name::{OperationName, ParsedName},
    queue::{OperationRow, Progress, Stage, StageKind},
    shared_queue::OPERATIONS_PER_LOCK,
    state::LARGEST_PAGE,
    status::{self, invalid},
};
use crate::{
    config::grants::Permission,
    daemon::{self, Access},
    instance::InstanceName,
    proto::{
        self,
        longrunning::{
            CancelOperationRequest, DeleteOperationRequest, GetOperationRequest,
            ListOperationsRequest, ListOperationsResponse, Operation, WaitOperationRequest,
            operations_server::Operations,
        },
        reapi::RequestMetadata,
    },
};

const DEFAULT_PAGE_SIZE: usize = 100;
const LARGEST_PAGE_SIZE: usize = 1000;
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What the operations of the Execution service are asked besides.
pub(super) struct OperationsService(pub ExecutionService);

#[tonic::async_trait]
impl Operations for OperationsService {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let instance = InstanceName::parse(&request.name).map_err(invalid)?;
        let filter = Filter::parse(&request.filter).map_err(invalid)?;
        let page_size = match usize::try_from(request.page_size) {
            Err(_) => return Err(invalid("page_size is negative")),
            Ok(0) => DEFAULT_PAGE_SIZE,
            Ok(size) => size.min(LARGEST_PAGE_SIZE),
        };
        let mut last =
            match request.page_token.as_str() {
                "" => None,
                token => Some(Uuid::try_parse(token).map_err(|_| {
                    invalid("page_token is none that an answer of ListOperations has")
                })?),
            };
        let mut operations: Vec<Operation> = Vec::new();
        let mut size = 0;
        loop {
            let rows: Vec<OperationRow> = self
                .0
                .queue
                .look(|queue| queue.operations(last).take(OPERATIONS_PER_LOCK).collect());
            if rows.is_empty() {
                break;
            }
            for row in rows {
                last = Some(row.name);
                if row.action.instance.strip_prefix(&instance).is_none() || !filter.admits(&row) {
                    continue;
                }
                let operation = self.operation(&row);
                size += prost::Message::encoded_len(&operation);
                operations.push(operation);
                if operations.len() == page_size || size >= LARGEST_PAGE {
                    return Ok(Response::new(ListOperationsResponse {
                        operations,
                        next_page_token: row.name.to_string(),
                    }));
                }
            }
            tokio::task::yield_now().await;
        }
        Ok(Response::new(ListOperationsResponse {
            operations,
            next_page_token: String::new(),
        }))
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let text = &request.get_ref().name;
        match self.find(text, &Access::of(&request))? {
            FoundOperation::Here(row) => Ok(Response::new(self.operation(&row))),
            FoundOperation::Before(name) => {
                let mut operations = self.take_up(*name, &request).await?;
                let first = operations.next().await;
                let first = first.ok_or_else(|| status::unknown_name(text, &"it is gone"))??;
                Ok(Response::new(Operation {
                    name: text.clone(),
                    ..first
                }))
            }
        }
    }

    async fn delete_operation(
        &self,
        _: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(
            "operations are forgotten by themselves when nobody waits for them; CancelOperation ends one",
        ))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let text = &request.get_ref().name;
        let operation = match self.find(text, &Access::of(&request))? {
            FoundOperation::Here(row) => {
                let cancelled = self.0.queue.cancel(row.name);
                cancelled.map_err(|error| status::unknown_name(text, &error))?;
                row.name
            }
            FoundOperation::Before(name) => {
                let operation = name.operation;
                let asked = Asked::again(*name, &request);
                self.0.cancel_unknown(asked).await?;
                operation
            }
        };
        let client = daemon::client_name(&request);
        tracing::info!(%operation, client, "an operation was cancelled");
        Ok(Response::new(()))
    }

    /// Returns when it is done, or after the timeout, with what it is then.
    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        self.0.refuse_when_stopping()?;
        let found = self.find(&request.get_ref().name, &Access::of(&request))?;
        let timeout = request.get_ref().timeout.as_ref();
        let timeout = timeout.and_then(proto::duration);
        let timeout = timeout.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT);
        let row = match found {
            FoundOperation::Here(row) => row,
            FoundOperation::Before(name) => {
                let operations = self.take_up(*name, &request).await?;
                let mut last = last_within(operations, timeout).await?;
                last.name = request.into_inner().name;
                return Ok(Response::new(last));
            }
        };
        let request = request.into_inner();
        let mut waiter = self
            .0
            .queue
            .wait(row.name)
            .ok_or_else(|| status::unknown_name(&request.name, &"it is gone"))?;
        let done = |progress: &Progress| matches!(progress.stage, Stage::Completed(_));
        if !done(&waiter.progress()) {
            tokio::select! {
                _ = waiter.news.wait_for(done) => {}
                () = tokio::time::sleep(timeout) => {}
                () = self.0.stopping.cancelled() => return Err(status::stopping()),
            }
        }
        let progress = waiter.progress();
        let action = &waiter.attached.action;
        let operation = operation_message::of_progress(
            request.name,
            waiter.attached.operation,
            action,
            &progress,
            Details::default(),
        );
        Ok(Response::new(operation))
    }
}

/// An operation that somebody asks for.
enum FoundOperation {
    Here(Box<OperationRow>),
    /// A scheduler before this one may have had it.
    Before(Box<OperationName>),
}

/// The last of these within that time.
async fn last_within(
    mut operations: OperationStream,
    timeout: Duration,
) -> Result<Operation, Status> {
    let end = tokio::time::Instant::now() + timeout;
    let mut last = None;
    loop {
        // The first one comes at once.
        let next = match &last {
            None => operations.next().await,
            Some(_) => {
                let next = tokio::time::timeout_at(end, operations.next());
                next.await.unwrap_or_default()
            }
        };
        match (next, last) {
            (Some(operation), _) => last = Some(operation?),
            (None, Some(last)) => return Ok(last),
            (None, None) => return Err(status::stopping()),
        }
    }
}

impl OperationsService {
    /// As `WaitExecution` does, whose permission it asks.
    async fn take_up<T>(
        &self,
        name: OperationName,
        request: &Request<T>,
    ) -> Result<OperationStream, Status> {
        let access = Access::of(request);
        if !access.may(Permission::Execute, &name.instance) {
            return Err(Status::unavailable(format!(
                "Operation {} is of a scheduler before this one; it is known here as soon as its client waits for it, or whoever asks has the permission \"execute\"",
                name.operation
            )));
        }
        let asked = Asked::again(name, request);
        self.0.resume(asked).await
    }

    fn find(&self, text: &str, access: &Access) -> Result<FoundOperation, Status> {
        let name = ParsedName::parse(text).map_err(|error| status::unknown_name(text, &error))?;
        let row = self.0.queue.look(|queue| queue.operation(name.operation()));
        let row = match (row, &name) {
            (Some(row), _) => row,
            (None, ParsedName::Full(name)) => {
                access.require(&name.instance)?;
                return Ok(FoundOperation::Before(name.clone()));
            }
            (None, ParsedName::Plain(_)) => {
                return Err(status::unknown_name(
                    text,
                    &"nor does the name say what it executed",
                ));
            }
        };
        match &name {
            ParsedName::Full(name)
                if name.digest != row.action.digest || name.instance != row.action.instance =>
            {
                Err(status::unknown_name(text, &"it is of another action"))
            }
            _ => {
                access.require(&row.action.instance)?;
                Ok(FoundOperation::Here(Box::new(row)))
            }
        }
    }

    fn operation(&self, row: &OperationRow) -> Operation {
        let name = OperationName {
            operation: row.name,
            scheduler: self.0.scheduler,
            instance: row.action.instance.clone(),
            digest: row.action.digest,
            priority: row.priority,
            skip_cache_lookup: row.skip_cache_lookup,
            invocation: row.invocation.clone(),
        };
        let progress = Progress {
            version: 0,
            stage: row.stage.clone(),
        };
        let explanation = match row.stage {
            Stage::Completed(_) => None,
            Stage::Queued | Stage::Executing => self.0.queue.explain(row.name),
        };
        let details = Details {
            explanation,
            metadata: None,
        };
        operation_message::of_progress(name.to_string(), row.name, &row.action, &progress, details)
    }
}

/// Which operations are listed; what is `None` does not matter.
#[derive(Debug, Default, PartialEq)]
struct Filter {
    stage: Option<StageKind>,
    done: Option<bool>,
    tool_invocation_id: Option<String>,
}

/// The client must act.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error(
    "filter: {0:?} is not understood; write terms such as stage = QUEUED (or EXECUTING, COMPLETED), done = false, tool_invocation_id = \"x\", and AND between them"
)]
struct FilterError(String);

impl Filter {
    fn parse(text: &str) -> Result<Self, FilterError> {
        let mut filter = Filter::default();
        if text.trim().is_empty() {
            return Ok(filter);
        }
        for term in text.split(" AND ") {
            let refuse = || FilterError(crate::text::shorten(term));
            let (field, value) = term.split_once('=').ok_or_else(refuse)?;
            let quoted = value.trim();
            let value = quoted
                .strip_prefix('"')
                .and_then(|value| value.strip_suffix('"'))
                .unwrap_or(quoted);
            match (field.trim(), value) {
                ("stage", "QUEUED") => filter.stage = Some(StageKind::Queued),
                ("stage", "EXECUTING") => filter.stage = Some(StageKind::Executing),
                ("stage", "COMPLETED") => filter.stage = Some(StageKind::Completed),
                ("done", "true") => filter.done = Some(true),
                ("done", "false") => filter.done = Some(false),
                ("tool_invocation_id", id) => filter.tool_invocation_id = Some(id.to_owned()),
                _ => return Err(refuse()),
            }
        }
        Ok(filter)
    }

    fn admits(&self, row: &OperationRow) -> bool {
        let stage = StageKind::of(&row.stage);
        let of_invocation = |id: &String| {
            let mut keys = row.invocation.as_slice().iter();
            keys.any(|key| {
                proto::unpack::<RequestMetadata>(&key.any())
                    .is_some_and(|metadata| metadata.tool_invocation_id == *id)
            })
        };
        self.stage.is_none_or(|wanted| wanted == stage)
            && self
                .done
                .is_none_or(|wanted| wanted == (stage == StageKind::Completed))
            && self.tool_invocation_id.as_ref().is_none_or(of_invocation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_terms_joined_by_and() {
        assert_eq!(Filter::parse(" "), Ok(Filter::default()));
        assert_eq!(
            Filter::parse("stage=QUEUED AND done = false AND tool_invocation_id = \"a b\""),
            Ok(Filter {
                stage: Some(StageKind::Queued),
                done: Some(false),
                tool_invocation_id: Some("a b".to_owned()),
            })
        );
        for bad in [
            "stage",
            "stage = LATER",
            "done = maybe",
            "x = 1",
            "done = true AND ",
            "AND",
        ] {
            assert!(Filter::parse(bad).is_err(), "{bad}");
        }
    }
}
