//! `bb_runner status`: asks a runner that runs, by its control socket.

use crate::{
    config::runner::Config,
    daemon::{Cell, CommandError, CommandOptions, Emphasis},
};

/// Commands of bb_runner that ask a runner that runs.
#[derive(clap::Subcommand)]
pub enum RunnerCommand {
    /// Show what the runner does, and what keeps its actions apart
    Status {
        #[command(flatten)]
        options: CommandOptions,
    },
}

/// Runs a command, and prints the answer.
pub async fn run_status(command: RunnerCommand, config: &Config) -> Result<(), CommandError> {
    let RunnerCommand::Status { options } = command;
    let status = options
        .fetch_status("bb_runner", &config.control.listen)
        .await?;
    let output = options.output();
    if output.is_json() {
        output.json(&status);
        return Ok(());
    }
    let names = |key: &str| {
        let names = status[key].as_array().into_iter().flatten();
        let names: Vec<&str> = names.filter_map(serde_json::Value::as_str).collect();
        names.join(" ")
    };
    output.fact("Version", status["version"].as_str().unwrap_or("-"));
    output.fact(
        "Actions",
        format!(
            "{} run; {} were started, {} ended, {} were stopped, {} ran out of memory, {} failed",
            status["running"],
            status["started"],
            status["ended"],
            status["stopped"],
            status["out_of_memory"],
            status["failed"]
        ),
    );
    output.fact(
        "Users",
        format!("{} of {}", status["running"], status["users"]),
    );
    output.fact("Containment", names("layers"));
    let missing = names("missing_layers");
    if !missing.is_empty() {
        output.fact("Without", Cell::new(missing, Emphasis::Warning));
    }
    Ok(())
}
