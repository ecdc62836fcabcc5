//! `bb_scheduler action`: what is known of one action.

use std::time::Duration;

use serde::Serialize;

use super::{
    ActionName,
    calls::SchedulerCalls,
    rows::{Property, digest, properties},
};
use crate::{
    daemon::{Cell, CommandError, Emphasis, Output, span},
    proto::{
        self,
        control::{ActionDescription, GetActionRequest},
        reapi,
    },
    text::shell_word,
};

/// The keys of `action`.
#[derive(Serialize)]
struct ActionRow {
    action: String,
    instance: String,
    command: Option<String>,
    #[serde(skip)]
    names_command: bool,
    arguments: Vec<String>,
    environment: Vec<Property>,
    working_directory: String,
    platform: Vec<Property>,
    outputs: Vec<String>,
    input_root: String,
    do_not_cache: bool,
    timeout_seconds: Option<i64>,
    operations: Vec<String>,
    result: Option<ResultRow>,
}

#[derive(Serialize)]
struct ResultRow {
    exit_code: i32,
    worker: Option<String>,
    execution_seconds: Option<f64>,
    output_files: Vec<String>,
    output_directories: Vec<String>,
    stdout: Option<String>,
    stderr: Option<String>,
}

pub(super) async fn show(
    scheduler: &SchedulerCalls,
    output: &Output,
    name: &ActionName,
    instance: String,
) -> Result<(), CommandError> {
    let request = GetActionRequest {
        instance_name: instance.clone(),
        action_digest: Some(name.into()),
        digest_function: 0,
    };
    let described = scheduler.control().get_action(request).await?.into_inner();
    let row = row(name, instance, described);
    match output.is_json() {
        true => output.json(&row),
        false => print(output, &row),
    }
    Ok(())
}

#[expect(deprecated, reason = "clients before REAPI 2.2 say it there")]
fn row(name: &ActionName, instance: String, described: ActionDescription) -> ActionRow {
    let action = described.action.unwrap_or_default();
    let is_known = described.command.is_some();
    let command = described.command.unwrap_or_default();
    let platform = action.platform.as_ref().or(command.platform.as_ref());
    let mut outputs = command.output_paths.clone();
    outputs.extend(command.output_files.clone());
    outputs.extend(command.output_directories.clone());
    ActionRow {
        action: name.hash.clone(),
        instance,
        platform: properties(platform),
        names_command: action.command_digest.is_some(),
        command: is_known.then(|| shell_line(&command)),
        outputs,
        environment: command
            .environment_variables
            .iter()
            .map(|variable| Property {
                name: variable.name.clone(),
                value: variable.value.clone(),
            })
            .collect(),
        arguments: command.arguments,
        working_directory: command.working_directory,
        input_root: digest(action.input_root_digest.as_ref()),
        do_not_cache: action.do_not_cache,
        timeout_seconds: action.timeout.map(|timeout| timeout.seconds),
        operations: described.operation_names,
        result: described.action_result.map(result_row),
    }
}

fn result_row(result: reapi::ActionResult) -> ResultRow {
    let metadata = result.execution_metadata.unwrap_or_default();
    let time = |at: &Option<prost_types::Timestamp>| at.as_ref().and_then(proto::system_time);
    let execution = time(&metadata.execution_start_timestamp)
        .zip(time(&metadata.execution_completed_timestamp))
        .and_then(|(start, end)| end.duration_since(start).ok());
    let blob = |found: &Option<reapi::Digest>| found.as_ref().map(|found| digest(Some(found)));
    ResultRow {
        exit_code: result.exit_code,
        worker: Some(metadata.worker).filter(|worker| !worker.is_empty()),
        execution_seconds: execution.as_ref().map(Duration::as_secs_f64),
        stdout: blob(&result.stdout_digest),
        stderr: blob(&result.stderr_digest),
        output_files: result
            .output_files
            .into_iter()
            .map(|file| file.path)
            .collect(),
        output_directories: result
            .output_directories
            .into_iter()
            .map(|directory| directory.path)
            .collect(),
    }
}

/// A command for a shell (POSIX, section 2.2), to be run in the input root.
/// Nothing in it is read by the shell but what this function wrote.
fn shell_line(command: &reapi::Command) -> String {
    let mut words = Vec::new();
    if !command.working_directory.is_empty() {
        words.push(format!(
            "cd ./{} &&",
            shell_word(&command.working_directory)
        ));
    }
    words.push("env -i --".to_owned());
    for variable in &command.environment_variables {
        let assignment = format!("{}={}", variable.name, variable.value);
        words.push(shell_word(&assignment).into_owned());
    }
    // Which env(1) would take for one more variable.
    let is_assignment = command
        .arguments
        .first()
        .is_some_and(|word| word.contains('='));
    if is_assignment {
        words.push("sh -c 'exec \"$@\"' sh".to_owned());
    }
    let arguments = command.arguments.iter();
    words.extend(arguments.map(|argument| shell_word(argument).into_owned()));
    words.join(" ")
}

fn print(output: &Output, row: &ActionRow) {
    output.fact("Action", &row.action);
    if !row.instance.is_empty() {
        output.fact("Instance", &row.instance);
    }
    match &row.command {
        Some(command) => output.fact("Command", command),
        None => {
            let text = match row.names_command {
                true => "not in the storage any more",
                false => "the action names none",
            };
            output.fact("Command", Cell::new(text, Emphasis::Warning));
        }
    }
    let platform: Vec<String> = row.platform.iter().map(Property::to_string).collect();
    output.fact("Platform", platform.join(" "));
    output.fact("Input root", &row.input_root);
    output.fact("Outputs", row.outputs.join(" "));
    if let Some(seconds) = row.timeout_seconds {
        output.fact("Timeout", format!("{seconds} s"));
    }
    output.fact(
        "Cached",
        if row.do_not_cache {
            "never"
        } else {
            "when it succeeds"
        },
    );
    for operation in &row.operations {
        output.fact("Operation", operation);
    }
    let Some(result) = &row.result else {
        output.fact("Result", "none in the Action Cache");
        return;
    };
    let emphasis = match result.exit_code {
        0 => Emphasis::Good,
        _ => Emphasis::Bad,
    };
    output.fact(
        "Result",
        Cell::new(format!("exit code {}", result.exit_code), emphasis),
    );
    if let Some(seconds) = result.execution_seconds {
        let shown = match seconds < 60.0 {
            true => format!("{seconds:.2} s"),
            false => span(Duration::from_secs_f64(seconds)),
        };
        output.fact("Executed in", shown);
    }
    if let Some(worker) = &result.worker {
        output.fact("Executed by", worker);
    }
    output.fact(
        "Output files",
        format!(
            "{} files, {} directories",
            result.output_files.len(),
            result.output_directories.len()
        ),
    );
    for (name, blob) in [("Stdout", &result.stdout), ("Stderr", &result.stderr)] {
        if let Some(blob) = blob {
            output.fact(name, blob);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_a_line_that_a_shell_reads_as_it_was_meant() {
        let command = reapi::Command {
            arguments: ["printf", "%s|", "a b", "it's", "", "$x\n"]
                .map(str::to_owned)
                .into(),
            environment_variables: vec![reapi::command::EnvironmentVariable {
                name: "X;exit 1;PATH".to_owned(),
                value: "/bin:/usr/bin".to_owned(),
            }],
            ..Default::default()
        };
        let line = shell_line(&command);
        let shell = std::process::Command::new("bash")
            .arg("-c")
            .arg(&line)
            .output()
            .unwrap();
        assert_eq!(shell.stdout, b"a b|it's||$x\n|", "{line}");
        let elsewhere = reapi::Command {
            working_directory: "a b".to_owned(),
            arguments: vec!["true".to_owned()],
            ..Default::default()
        };
        assert_eq!(shell_line(&elsewhere), "cd ./'a b' && env -i -- true");
    }
}
