//! What an execution came to: outcome, timeline, cost, what it printed, and outputs.

use std::{collections::BTreeMap, time::Duration};

use maud::{Markup, html};
use prost_types::Timestamp;

use super::{Place, log};
use crate::{
    digest::Digest,
    proto::{
        self,
        reapi::{self, ActionResult, ExecuteResponse, ExecutedActionMetadata, RequestMetadata},
        resourceusage::{FilePoolResourceUsage, PosixResourceUsage},
        rpc, unpack,
    },
    scheduler::web::{
        Pages,
        format::{count, duration, name, size, timestamp},
        layout::{self, labels},
    },
};

/// Outputs that a page shows.
const MOST_OUTPUTS: usize = 1_000;

/// All of it. What is in the storage is left out for those who may not read there.
pub(in crate::scheduler::web) async fn show(
    pages: &Pages,
    place: &Place,
    response: &ExecuteResponse,
    may_read: bool,
) -> Markup {
    let status = response.status.clone().unwrap_or_default();
    let result = response.result.clone().unwrap_or_default();
    let code = rpc::Code::try_from(status.code).map_or("unknown", |code| code.as_str_name());
    html! {
        h2 { "Result" }
        p {
            @if status.code != 0 {
                span.badge.bad { (code) } " " (name(&status.message))
            } @else if result.exit_code != 0 {
                span.badge.bad { "exit code " (result.exit_code) }
            } @else {
                span.badge.good { "exit code 0" }
            }
            @if response.cached_result { " " span.badge { "from the Action Cache" } }
        }
        @if !response.message.is_empty() { p { (message(&response.message)) } }
        (output(pages, place, &result, may_read).await)
        @if let Some(metadata) = &result.execution_metadata {
            (timeline(metadata))
            (cost(metadata))
            (asked_by(metadata))
        }
        (outputs(place, &result))
        @if !response.server_logs.is_empty() {
            h2 { "Logs of the worker" }
            ul.paths {
                @for (title, file) in &response.server_logs {
                    li { (blob_link(place, file.digest.as_ref(), title)) }
                }
            }
        }
    }
}

/// A message of the farm; an address in it becomes a link.
fn message(text: &str) -> Markup {
    let at = text.find("http://").or_else(|| text.find("https://"));
    let (before, address) = at.map_or((text, ""), |at| text.split_at(at));
    html! {
        (name(before))
        @if !address.is_empty() { a href=(address) { (name(address)) } }
    }
}

async fn output(pages: &Pages, place: &Place, result: &ActionResult, may_read: bool) -> Markup {
    let streams = [
        (
            "stdout",
            "Standard output",
            &result.stdout_raw,
            &result.stdout_digest,
        ),
        (
            "stderr",
            "Standard error",
            &result.stderr_raw,
            &result.stderr_digest,
        ),
    ];
    let mut shown = Vec::new();
    for (file, title, raw, digest) in streams {
        let digest = digest.as_ref();
        let digest = digest.and_then(|digest| Digest::parse(Some(place.function), digest).ok());
        let content = match digest.filter(|digest| digest.size() > 0) {
            _ if !raw.is_empty() => log::frame(title, &log::coloured(raw)),
            None => html! { p.empty { "It printed nothing there." } },
            Some(_) if !may_read => html! { p.empty { "You may not read it (cas.read)." } },
            Some(digest) => match log::of_blob(pages, place, &digest, file).await {
                Ok(shown) => shown,
                Err(_) => html! {
                    p.empty { "It printed " (size(digest.size())) ", which the storage has not any more." }
                },
            },
        };
        shown.push((title, content));
    }
    html! {
        @for (title, content) in shown {
            h2 { (title) }
            (content)
        }
    }
}

fn passed(from: Option<&Timestamp>, to: Option<&Timestamp>) -> Option<Duration> {
    let (from, to) = (proto::system_time(from?)?, proto::system_time(to?)?);
    to.duration_since(from).ok()
}

fn timeline(metadata: &ExecutedActionMetadata) -> Markup {
    let stages = [
        (
            "Queued",
            &metadata.queued_timestamp,
            &metadata.worker_start_timestamp,
        ),
        (
            "Inputs",
            &metadata.input_fetch_start_timestamp,
            &metadata.input_fetch_completed_timestamp,
        ),
        (
            "Execution",
            &metadata.execution_start_timestamp,
            &metadata.execution_completed_timestamp,
        ),
        (
            "Outputs",
            &metadata.output_upload_start_timestamp,
            &metadata.output_upload_completed_timestamp,
        ),
    ];
    let begin = metadata
        .queued_timestamp
        .or(metadata.worker_start_timestamp);
    let end = metadata.worker_completed_timestamp;
    let all = passed(begin.as_ref(), end.as_ref()).unwrap_or_default();
    let share = |time: Option<Duration>| match (time, all.as_secs_f64()) {
        (Some(time), all) if all > 0.0 => (time.as_secs_f64() / all * 240.0).clamp(0.0, 240.0),
        _ => 0.0,
    };
    html! {
        h2 { "Timeline" }
        (layout::table("Timeline", Some("timeline"), html! {
            th scope="col" { "Stage" }
            th scope="col" { "Begin" }
            th.number scope="col" { "Took" }
            th scope="col" { "Of " (duration(all)) }
        }, html! {
            @for (title, from, to) in stages {
                @let took = passed(from.as_ref(), to.as_ref());
                tr {
                    th scope="row" { (title) }
                    td { @if let Some(from) = from { (timestamp(from)) } }
                    td.number { @if let Some(took) = took { (duration(took)) } }
                    td {
                        svg.bar viewBox="0 0 240 10" preserveAspectRatio="none" aria-hidden="true" {
                            rect.back x="0" y="0" width="240" height="10" {}
                            rect.part x=(format!("{:.1}", share(passed(begin.as_ref(), from.as_ref())))) y="0"
                                width=(format!("{:.1}", share(took).max(if took.is_some() { 1.0 } else { 0.0 }))) height="10" {}
                        }
                    }
                }
            }
        }))
        @if !metadata.worker.is_empty() {
            p { "Executed on " (worker(&metadata.worker)) }
        }
    }
}

fn worker(text: &str) -> Markup {
    match serde_json::from_str::<BTreeMap<String, String>>(text) {
        Ok(found) => labels(&found),
        Err(_) => name(text),
    }
}

fn cost(metadata: &ExecutedActionMetadata) -> Markup {
    let of_type = metadata.auxiliary_metadata.iter();
    let usage = of_type.clone().find_map(unpack::<PosixResourceUsage>);
    let files = of_type.clone().find_map(unpack::<FilePoolResourceUsage>);
    let time = |time: &Option<prost_types::Duration>| {
        let time = time.as_ref().and_then(proto::duration);
        time.map(duration).unwrap_or_default()
    };
    let positive = |number: i64| u64::try_from(number).unwrap_or_default();
    html! {
        @if usage.is_some() || files.is_some() {
            h2 { "Cost" }
            dl.facts {
                @if let Some(usage) = usage {
                    div { dt { "CPU in user mode" } dd { (time(&usage.user_time)) } }
                    div { dt { "CPU in the kernel" } dd { (time(&usage.system_time)) } }
                    div { dt { "Peak memory" } dd { (size(positive(usage.maximum_resident_set_size))) } }
                    div { dt { "Block reads" } dd { (count(positive(usage.block_input_operations))) } }
                    div { dt { "Block writes" } dd { (count(positive(usage.block_output_operations))) } }
                    div { dt { "Page faults" } dd { (count(positive(usage.page_faults))) } }
                    @if !usage.termination_signal.is_empty() {
                        div { dt { "Killed by" } dd { "SIG" (name(&usage.termination_signal)) } }
                    }
                }
                @if let Some(files) = files {
                    div { dt { "Peak of temporary files" } dd { (size(files.files_size_bytes_peak)) } }
                    div { dt { "Bytes read" } dd { (size(files.reads_size_bytes)) } }
                    div { dt { "Bytes written" } dd { (size(files.writes_size_bytes)) } }
                }
            }
        }
    }
}

fn asked_by(metadata: &ExecutedActionMetadata) -> Markup {
    let all = metadata.auxiliary_metadata.iter();
    let request = all.clone().find_map(|any| {
        let is_request = any.type_url.ends_with("RequestMetadata");
        let bytes = is_request.then_some(&*any.value)?;
        <RequestMetadata as prost::Message>::decode(bytes).ok()
    });
    html! {
        @if let Some(request) = request {
            h2 { "Asked by" }
            dl.facts { (request_facts(&request)) }
        }
    }
}

/// What a client said of itself.
pub(in crate::scheduler::web) fn request_facts(request: &RequestMetadata) -> Markup {
    let tool = request.tool_details.clone().unwrap_or_default();
    let tool = format!("{} {}", tool.tool_name, tool.tool_version);
    html! {
        @for (title, value) in [
            ("Target", request.target_id.as_str()),
            ("Mnemonic", &request.action_mnemonic),
            ("Tool", tool.trim()),
            ("Invocation", &request.tool_invocation_id),
            ("Correlated invocations", &request.correlated_invocations_id),
            ("Configuration", &request.configuration_id),
        ] {
            @if !value.is_empty() { div { dt { (title) } dd { (name(value)) } } }
        }
    }
}

fn blob_link(place: &Place, digest: Option<&reapi::Digest>, path: &str) -> Markup {
    let parsed = digest.and_then(|digest| Digest::parse(Some(place.function), digest).ok());
    let file = path.rsplit('/').next().unwrap_or(path);
    html! {
        @match parsed {
            Some(digest) => {
                a href={ (place.file_address(&digest, file)) "?format=view" } { (name(path)) }
                " " span.quiet { (size(digest.size())) }
            }
            None => (name(path))
        }
    }
}

#[expect(deprecated, reason = "workers of REAPI 2.0 fill the older lists")]
fn outputs(place: &Place, result: &ActionResult) -> Markup {
    let links = result.output_symlinks.iter();
    let links = links
        .chain(&result.output_file_symlinks)
        .chain(&result.output_directory_symlinks);
    let mut links: Vec<(&str, &str)> = links
        .map(|link| (link.path.as_str(), link.target.as_str()))
        .collect();
    links.sort_unstable();
    links.dedup();
    let all = result.output_files.len() + result.output_directories.len() + links.len();
    html! {
        h2 { "Outputs (" (count(all as u64)) ")" }
        @if all == 0 { p.empty { "It has no outputs but what it printed." } } @else {
            ul.paths {
                @for directory in result.output_directories.iter().take(MOST_OUTPUTS) {
                    li { (directory_link(place, directory)) }
                }
                @for file in result.output_files.iter().take(MOST_OUTPUTS) {
                    li {
                        (blob_link(place, file.digest.as_ref(), &file.path))
                        @if file.is_executable { " " span.quiet { "program" } }
                    }
                }
                @for (path, target) in links.iter().take(MOST_OUTPUTS) {
                    li { (name(path)) span.quiet { " → " } code { (name(target)) } }
                }
                @if all > MOST_OUTPUTS { li { "… and more" } }
            }
        }
    }
}

fn directory_link(place: &Place, directory: &reapi::OutputDirectory) -> Markup {
    let parse = |digest: Option<&reapi::Digest>| {
        digest.and_then(|digest| Digest::parse(Some(place.function), digest).ok())
    };
    let tree = parse(directory.tree_digest.as_ref()).map(|digest| place.address("tree", &digest));
    let root = parse(directory.root_directory_digest.as_ref());
    let root = root.map(|digest| place.address("directory", &digest));
    html! {
        @match tree.or(root) {
            Some(address) => a href=(address) { (name(&directory.path)) "/" },
            None => { (name(&directory.path)) "/" }
        }
    }
}
