//! ActionCache: results of actions, whose digests are checked before they are kept.

use tonic::{Request, Response, Status, async_trait};

use super::{
    request::{digest, instance},
    response_size::{encoded_size, reserve},
};
use crate::{
    daemon::{self, Access, RequestReservation, ResponseBudget, with_reservation},
    digest::{Digest, DigestFunction},
    proto::reapi::{
        self, ActionResult, GetActionResultRequest, UpdateActionResultRequest,
        action_cache_server::ActionCache,
    },
    storage::{Backend, InlineHints},
    text::shorten,
};

pub(super) struct ActionCacheService {
    pub backend: Backend,
}

#[async_trait]
impl ActionCache for ActionCacheService {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let (answers, access) = (ResponseBudget::of(&request), Access::of(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let action = digest(request.digest_function, request.action_digest.as_ref())?;
        let hints = InlineHints::from(&request);
        match self
            .backend
            .complete_action_result(&instance, &action)
            .await?
        {
            Some(mut result) => {
                let function = action.function();
                let inlining = hints.apply(&self.backend, &instance, function, &mut result);
                inlining.await;
                let reservation = reserve(answers, encoded_size(&result)).await?;
                Ok(with_reservation(Response::new(result), reservation))
            }
            None => Err(Status::not_found(format!(
                "action {action} has no result whose outputs are all here"
            ))),
        }
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let (answers, _received) = (
            ResponseBudget::of(&request),
            RequestReservation::of(&request),
        );
        let (access, client) = (Access::of(&request), daemon::client_name(&request));
        let request = request.into_inner();
        let instance = instance(&request.instance_name)?;
        access.require(&instance)?;
        let action = digest(request.digest_function, request.action_digest.as_ref())?;
        let result = request
            .action_result
            .ok_or_else(|| Status::invalid_argument("no action_result was given"))?;
        check_result(action.function(), &result)?;
        let update = self
            .backend
            .update_action_result(&instance, &action, result.clone());
        update.await?;
        tracing::info!(
            action = action.hash_hex(),
            instance = instance.as_str(),
            client,
            "an action result was written"
        );
        let reservation = reserve(answers, encoded_size(&result)).await?;
        Ok(with_reservation(Response::new(result), reservation))
    }
}

/// Every digest of a result that will be followed.
fn check_result(function: DigestFunction, result: &ActionResult) -> Result<(), Status> {
    let check = |what: &str, digest: Option<&reapi::Digest>| {
        Digest::parse_required(Some(function), digest)
            .map(drop)
            .map_err(|error| Status::invalid_argument(format!("{what}: {error}")))
    };
    for file in &result.output_files {
        check(
            &format!("output file {:?}", shorten(&file.path)),
            file.digest.as_ref(),
        )?;
    }
    for directory in &result.output_directories {
        let what = format!("output directory {:?}", shorten(&directory.path));
        let (tree, root) = (&directory.tree_digest, &directory.root_directory_digest);
        if tree.is_none() && root.is_none() {
            check(&what, None)?;
        }
        for digest in [tree, root].into_iter().flatten() {
            check(&what, Some(digest))?;
        }
    }
    for (what, digest) in [
        ("stdout_digest", &result.stdout_digest),
        ("stderr_digest", &result.stderr_digest),
    ] {
        if digest.is_some() {
            check(what, digest.as_ref())?;
        }
    }
    Ok(())
}
