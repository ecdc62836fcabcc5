//! The commands of bb_worker that ask a worker that runs.

use crate::{
    config::worker::Config,
    daemon::{Cell, CommandError, CommandOptions, Emphasis, Output, bytes},
};

/// What bb_worker asks a worker that runs.
#[derive(clap::Subcommand)]
pub enum WorkerCommand {
    /// Show what the worker does, and whether it serves
    Status {
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Show what the worker's cache has, and how it is used
    Cache {
        #[command(flatten)]
        options: CommandOptions,
    },
}

/// Does what a command says.
pub async fn ask(command: WorkerCommand, config: &Config) -> Result<(), CommandError> {
    let (options, is_cache) = match &command {
        WorkerCommand::Status { options } => (options, false),
        WorkerCommand::Cache { options } => (options, true),
    };
    let mut status = options
        .fetch_status("bb_worker", &config.control.listen)
        .await?;
    let cache = status["cache"].take();
    if let Some(status) = status.as_object_mut() {
        status.remove("cache");
    }
    let output = options.output();
    match (output.is_json(), is_cache) {
        (true, true) => output.json(&cache),
        (true, false) => output.json(&status),
        (false, true) => print_cache(&output, &cache),
        (false, false) => print_status(&output, &status),
    }
    Ok(())
}

fn print_status(output: &Output, status: &serde_json::Value) {
    let text = |key: &str| status[key].as_str().unwrap_or("-").to_owned();
    output.fact(
        "State",
        match status["serving"].as_bool() {
            Some(true) => Cell::new("serving", Emphasis::Good),
            _ => Cell::new(
                format!("not serving: {}", text("not_serving_because")),
                Emphasis::Bad,
            ),
        },
    );
    output.fact("Version", text("version"));
    output.fact("Scheduler", text("scheduler"));
    output.fact(
        "Slots",
        format!(
            "{}, of which {} run an action",
            status["slots"], status["running"]
        ),
    );
    for trouble in status["out_of_service"].as_array().into_iter().flatten() {
        let trouble = trouble.as_str().unwrap_or_default();
        output.fact("Out of service", Cell::new(trouble, Emphasis::Bad));
    }
    output.fact("Doing", text("line"));
}

fn print_cache(output: &Output, cache: &serde_json::Value) {
    let number = |key: &str| cache[key].as_u64().unwrap_or_default();
    let text = |key: &str| cache[key].as_str().unwrap_or("-").to_owned();
    output.fact("Directory", text("directory"));
    output.fact(
        "Files",
        format!("{} of {}", number("files"), number("maximum_files")),
    );
    output.fact(
        "Bytes",
        format!(
            "{} of {}",
            bytes(number("bytes")),
            bytes(number("maximum_bytes"))
        ),
    );
    output.fact("Free on its disk", bytes(number("free_bytes")));
    let (hits, misses) = (number("hits"), number("misses"));
    let rate = hits * 100 / (hits + misses).max(1);
    output.fact(
        "Since the start",
        format!(
            "{hits} input files were there ({rate} %), {misses} were not; {} fetched",
            bytes(number("fetched_bytes"))
        ),
    );
    output.fact(
        "Kept",
        format!(
            "{} input roots and {} subtrees in {}",
            number("kept_roots"),
            number("stashed_subtrees"),
            text("build_directory")
        ),
    );
}
