//! Actions: what was asked for, and what came of it; and what earlier executions came to.

use maud::{Markup, html};
use prost::Message;

use super::{
    Place, command, compare, directory,
    read::{self, Problem},
    result, tar,
};
use crate::{
    digest::Digest,
    proto::{
        self,
        cas::HistoricalExecuteResponse,
        iscc::{PreviousExecutionStats, previous_execution::Outcome},
        reapi::{self, Action, Command, ExecuteResponse},
        rpc,
    },
    scheduler::web::{
        Pages,
        format::{duration, name, timestamp},
        layout::{Page, Section},
    },
};

pub(super) async fn page(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
) -> Result<Page<'static>, Problem> {
    let action = read::message::<Action>(pages, place, digest, "Action").await?;
    // What no Action is decodes as an empty one, or one of unknown fields.
    if action.command_digest.is_none() {
        return Err(no_action());
    }
    let cached = pages.storage.action_result(&place.instance, digest).await;
    let response = cached.ok().flatten().map(|result| ExecuteResponse {
        result: Some(result),
        cached_result: true,
        status: Some(rpc::Status::default()),
        ..Default::default()
    });
    let content = html! {
        h1 { "Action" }
        (facts(place, digest, &action))
        @match &response {
            Some(response) => (result::show(pages, place, response, true).await),
            None => {
                h2 { "Result" }
                p.empty {
                    "The Action Cache has no result of it: it failed, is not to be cached, was evicted, or "
                    "was never executed. The message of a failed build leads to its own result."
                }
            }
        }
        (inputs(pages, place, digest, &action).await)
    };
    Ok(framed("Action", content))
}

fn no_action() -> Problem {
    Problem::Malformed {
        kind: "Action",
        error: "it names no command".to_owned(),
    }
}

fn framed(title: &'static str, content: Markup) -> Page<'static> {
    Page {
        section: Section::None,
        title,
        is_live: false,
        content,
    }
}

pub(super) async fn historical(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
) -> Result<Page<'static>, Problem> {
    let kind = "HistoricalExecuteResponse";
    let found = read::message::<HistoricalExecuteResponse>(pages, place, digest, kind).await?;
    let action_digest = Digest::parse_required(Some(place.function), found.action_digest.as_ref())
        .map_err(|error| Problem::Malformed {
            kind,
            error: error.to_string(),
        })?;
    let response = found.execute_response.unwrap_or_default();
    let action = read::message::<Action>(pages, place, &action_digest, "Action").await;
    let content = html! {
        h1 { "Action, as it was executed once" }
        @match &action {
            Ok(action) => (facts(place, &action_digest, action)),
            Err(_) => {
                p.empty { "The action itself is not in the storage any more; what came of it is." }
            }
        }
        (result::show(pages, place, &response, true).await)
        @if let Ok(action) = &action { (inputs(pages, place, &action_digest, action).await) }
    };
    Ok(framed("Action", content))
}

fn facts(place: &Place, digest: &Digest, action: &Action) -> Markup {
    let timeout = action.timeout.as_ref().and_then(proto::duration);
    let own = place.address("action", digest);
    html! {
        dl.facts {
            div { dt { "Hash" } dd { code { a href=(own) { (digest.hash_hex()) } } } }
            div { dt { "Size" } dd { (digest.size()) " bytes" } }
            @if !place.instance.is_empty() {
                div { dt { "Instance name" } dd { (name(place.instance.as_str())) } }
            }
            div { dt { "Timeout" } dd {
                @match timeout { Some(timeout) => (duration(timeout)), None => "the scheduler's" }
            } }
            div { dt { "Result may be cached" } dd { @if action.do_not_cache { "no" } @else { "yes" } } }
        }
        (compare::form(&own))
    }
}

/// Command and input root.
async fn inputs(pages: &Pages, place: &Place, digest: &Digest, action: &Action) -> Markup {
    let parse =
        |digest: Option<&reapi::Digest>| Digest::parse_required(Some(place.function), digest).ok();
    let command_digest = parse(action.command_digest.as_ref());
    let command = match &command_digest {
        None => None,
        Some(digest) => read::message::<Command>(pages, place, digest, "Command")
            .await
            .ok(),
    };
    let root_digest = parse(action.input_root_digest.as_ref());
    let root = match &root_digest {
        None => None,
        Some(digest) => directory::entries(pages, place, digest, 0).await.ok(),
    };
    html! {
        h2 { "Command" }
        @match (&command, &command_digest) {
            (Some(command), Some(digest)) => (command::show(command, place, digest)),
            _ => p.empty { "The command is not in the storage any more." }
        }
        h2 { "Platform" }
        p { (command::show_platform(command::platform(action, command.as_ref()))) }
        h2 { "Input root" }
        @match (&root, &root_digest) {
            (Some(root), Some(root_digest)) => {
                (tar::link(place, digest))
                @let own = place.address("directory", root_digest);
                (directory::show(root, place, &own, |node| {
                    let child = parse(node.digest.as_ref())?;
                    Some(place.address("directory", &child))
                }))
            }
            _ => p.empty { "The input root is not in the storage any more." }
        }
    }
}

/// What is remembered of executions of actions that differ in their inputs only.
pub(super) async fn statistics(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
) -> Result<Page<'static>, Problem> {
    let kind = "PreviousExecutionStats";
    let read = pages.statistics.read(&place.instance, digest).await?;
    let stats = PreviousExecutionStats::decode(read.ok_or(Problem::Missing)?);
    let stats = stats.map_err(|error| Problem::Malformed {
        kind,
        error: error.to_string(),
    })?;
    let mut classes: Vec<_> = stats.size_classes.iter().collect();
    classes.sort_unstable_by_key(|(size, _)| **size);
    let content = html! {
        h1 { "Earlier executions" }
        @if let Some(failure) = &stats.last_seen_failure {
            p { "The last failure on the largest size class was at " (timestamp(failure)) "." }
        }
        @for (size, class) in classes {
            h2 { "Size class " (size) }
            ol {
                @for execution in &class.previous_executions {
                    li {
                        @match &execution.outcome {
                            Some(Outcome::Succeeded(time)) => {
                                "succeeded in " (proto::duration(time).map(duration).unwrap_or_default())
                            }
                            Some(Outcome::TimedOut(time)) => {
                                "timed out after " (proto::duration(time).map(duration).unwrap_or_default())
                            }
                            Some(Outcome::Failed(())) | None => "failed"
                        }
                    }
                }
            }
        }
    };
    Ok(framed("Earlier executions", content))
}
