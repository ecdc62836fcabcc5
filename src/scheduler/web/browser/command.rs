//! Commands: as a line for a shell, with their environment and platform.

use std::borrow::Cow;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use maud::{Markup, html};

use super::{
    Place,
    read::{self, Problem},
};
use crate::{
    digest::Digest,
    proto::reapi::{self, Command},
    scheduler::web::{
        Pages,
        format::name,
        layout::{self, Page, Section, properties},
    },
    text::posix_shell_word,
};

/// Arguments that a page shows, and bytes of one of them.
const MOST_ARGUMENTS: usize = 5_000;
const LONGEST_ARGUMENT: usize = 16 << 10;

/// The program that runs a command as its worker would, from the input root in `root` beside it.
pub(super) fn shell_script(command: &Command) -> String {
    let mut script = String::from("#!/bin/sh\n# Runs an action's command by hand.\nset -eu\n");
    script.push_str("cd \"$(dirname \"$0\")/root\"\n");
    if !command.working_directory.is_empty() {
        let directory = format!("./{}", command.working_directory);
        script.push_str(&format!("cd {}\n", posix_shell_word(&directory)));
    }
    script.push_str("exec env -i -- \\\n");
    for variable in &command.environment_variables {
        let pair = format!("{}={}", variable.name, variable.value);
        script.push_str(&format!("  {} \\\n", posix_shell_word(&pair)));
    }
    // Which env(1) would take for one more variable.
    if command
        .arguments
        .first()
        .is_some_and(|word| word.contains('='))
    {
        script.push_str("  sh -c 'exec \"$@\"' sh \\\n");
    }
    let arguments = command.arguments.iter();
    let words: Vec<Cow<str>> = arguments.map(|word| posix_shell_word(word)).collect();
    script.push_str(&format!("  {}\n", words.join(" \\\n    ")));
    script
}

pub(super) async fn script(pages: &Pages, place: &Place, digest: &Digest) -> Response {
    match read::message::<Command>(pages, place, digest, "Command").await {
        Err(problem) => problem.page(place, digest),
        Ok(command) => {
            let headers = [
                (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
                (
                    header::CONTENT_DISPOSITION,
                    "attachment; filename=\"run.sh\"",
                ),
            ];
            (headers, shell_script(&command)).into_response()
        }
    }
}

pub(super) async fn page(
    pages: &Pages,
    place: &Place,
    digest: &Digest,
) -> Result<Page<'static>, Problem> {
    let command = read::message::<Command>(pages, place, digest, "Command").await?;
    let content = html! {
        h1 { "Command" }
        (show(&command, place, digest))
    };
    Ok(Page {
        section: Section::None,
        title: "Command",
        is_live: false,
        content,
    })
}

/// The parts of a command.
pub(super) fn show(command: &Command, place: &Place, digest: &Digest) -> Markup {
    let shown = command.arguments.iter().take(MOST_ARGUMENTS);
    html! {
        div.code-head {
            p.quiet { (command.arguments.len()) " arguments, quoted for a shell" }
            a href={ (place.address("command", digest)) "?format=sh" } { "Download as a script" }
        }
        pre.command tabindex="0" aria-label="Command line" {
            code {
                @for (number, word) in shown.enumerate() {
                    @if number > 0 { " \\\n  " }
                    (argument(word))
                }
                @if command.arguments.len() > MOST_ARGUMENTS { " …" }
            }
        }
        @if !command.working_directory.is_empty() {
            p { "In the directory " code { (name(&command.working_directory)) } "." }
        }
        details #environment open[command.environment_variables.len() <= 12] {
            summary { "Environment (" (command.environment_variables.len()) ")" }
            @if command.environment_variables.is_empty() { p.empty { "No variables." } }
            @else {
                (layout::table("Environment", None, html! {
                    th scope="col" { "Variable" } th scope="col" { "Value" }
                }, html! {
                    @for variable in command.environment_variables.iter().take(MOST_ARGUMENTS) {
                        tr {
                            th scope="row" { code { (name(&variable.name)) } }
                            td { code { (name(&variable.value)) } }
                        }
                    }
                }))
            }
        }
        details #outputs-declared {
            @let outputs = declared_outputs(command);
            summary { "Outputs that it declares (" (outputs.len()) ")" }
            ul.paths {
                @for path in outputs.iter().take(MOST_ARGUMENTS) { li { code { (name(path)) } } }
            }
        }
    }
}

fn argument(word: &str) -> Markup {
    let quoted = posix_shell_word(word);
    let cut = quoted.char_indices().nth(LONGEST_ARGUMENT);
    html! {
        @match cut {
            Some((end, _)) => { (name(quoted.get(..end).unwrap_or_default())) "…" }
            None => (name(&quoted))
        }
    }
}

#[expect(deprecated, reason = "clients of REAPI 2.0 send the older lists")]
pub(super) fn declared_outputs(command: &Command) -> Vec<&String> {
    match command.output_paths.is_empty() {
        false => command.output_paths.iter().collect(),
        true => command
            .output_files
            .iter()
            .chain(&command.output_directories)
            .collect(),
    }
}

/// Properties in force: the action's, or else those of its command (REAPI 2.2).
#[expect(deprecated, reason = "clients of REAPI 2.1 send it with the command")]
pub(super) fn platform<'a>(
    action: &'a reapi::Action,
    command: Option<&'a Command>,
) -> Option<&'a reapi::Platform> {
    let own = action.platform.as_ref();
    own.or_else(|| command.and_then(|command| command.platform.as_ref()))
}

pub(super) fn show_platform(platform: Option<&reapi::Platform>) -> Markup {
    let pairs: Vec<(String, String)> = platform
        .iter()
        .flat_map(|platform| &platform.properties)
        .map(|property| (property.name.clone(), property.value.clone()))
        .collect();
    properties(&pairs)
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn a_shell_reads_back_every_word_that_was_quoted() {
        let words = [
            "plain",
            "",
            "a b",
            "it's",
            "$HOME `id` \"x\" \\",
            "*?[",
            "-n",
            "~",
            "new\nline",
            "ü\u{202e}",
            "#x",
        ];
        let quoted: Vec<Cow<str>> = words.iter().map(|word| posix_shell_word(word)).collect();
        let output = process::Command::new("sh")
            .arg("-c")
            .arg(format!("printf '%s\\0' {}", quoted.join(" ")))
            .output()
            .unwrap();
        let read: Vec<&str> = std::str::from_utf8(&output.stdout)
            .unwrap()
            .split_terminator('\0')
            .collect();
        assert_eq!(read, words);
    }

    #[test]
    fn the_script_runs_the_command_with_its_environment_only() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("root/sub")).unwrap();
        let command = Command {
            arguments: [
                "/bin/sh",
                "-c",
                "echo \"$A|$HOME|$(basename \"$PWD\")|$1\"",
                "x",
                "it's",
            ]
            .map(str::to_owned)
            .into(),
            environment_variables: vec![reapi::command::EnvironmentVariable {
                name: "A".to_owned(),
                value: "1 '2'".to_owned(),
            }],
            working_directory: "sub".to_owned(),
            ..Default::default()
        };
        let path = directory.path().join("run.sh");
        std::fs::write(&path, shell_script(&command)).unwrap();
        let output = process::Command::new("sh").arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1 '2'||sub|it's\n");
    }
}
