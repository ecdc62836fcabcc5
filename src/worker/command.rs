//! A Command as a client sent it, parsed into one that can be run.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    path::{PathError, RelativePath},
    proto::reapi,
};

/// REAPI: Command. No text in it contains a NUL character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Not empty.
    pub arguments: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// Relative to the input root.
    pub working_directory: RelativePath,
    pub outputs: Vec<CommandOutput>,
    /// Of output directories, store each Directory as a blob too.
    pub store_directories: bool,
    /// What is told of each output beside its content.
    pub node_properties: NodePropertyKeys,
}

/// REAPI: Command.output_node_properties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodePropertyKeys {
    pub mtime: bool,
    pub unix_mode: bool,
}

/// Where an output may be after the command ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOutput {
    /// As the client spells it, and as it is reported.
    pub text: String,
    /// Relative to the input root.
    pub path: RelativePath,
    pub kind: OutputKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// `output_paths`
    Any,
    /// `output_files`
    File,
    /// `output_directories`
    Directory,
}

/// The client must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCommand {
    #[error("the command has no arguments")]
    NoArguments,
    #[error("{0} of the command has a NUL character in it")]
    Nul(&'static str),
    #[error("environment variable {0:?} has no name, or one with an equals sign")]
    VariableName(String),
    #[error("environment variable {0:?} is given twice")]
    DuplicateVariable(String),
    #[error("working directory: {0}")]
    WorkingDirectory(PathError),
    #[error("output path: {0}")]
    CommandOutput(PathError),
    #[error("output node property {0:?} is not known; known are mtime and unix_mode")]
    NodeProperty(String),
    #[error("output_directory_format {0} is not known")]
    Format(i32),
}

impl Command {
    #[expect(deprecated, reason = "clients of REAPI 2.0 fill the older lists")]
    pub fn parse(command: reapi::Command) -> Result<Self, InvalidCommand> {
        use reapi::command::OutputDirectoryFormat as Format;
        if command.arguments.is_empty() {
            return Err(InvalidCommand::NoArguments);
        }
        if command.arguments.iter().any(|text| text.contains('\0')) {
            return Err(InvalidCommand::Nul("an argument"));
        }
        let mut environment = BTreeMap::new();
        for variable in command.environment_variables {
            if variable.name.is_empty() || variable.name.contains('=') {
                return Err(InvalidCommand::VariableName(variable.name));
            }
            if variable.name.contains('\0') || variable.value.contains('\0') {
                return Err(InvalidCommand::Nul("an environment variable"));
            }
            // REAPI wants them sorted, which changes nothing for us; twice is ambiguous.
            if environment.contains_key(&variable.name) {
                return Err(InvalidCommand::DuplicateVariable(variable.name));
            }
            environment.insert(variable.name, variable.value);
        }
        let working_directory = RelativePath::resolve(
            &RelativePath::root(),
            &command.working_directory,
            "input root",
        )
        .map_err(InvalidCommand::WorkingDirectory)?;
        // REAPI: output_files and output_directories are ignored when output_paths is set.
        let declared = match command.output_paths.is_empty() {
            false => vec![(command.output_paths, OutputKind::Any)],
            true => vec![
                (command.output_files, OutputKind::File),
                (command.output_directories, OutputKind::Directory),
            ],
        };
        let mut outputs = Vec::new();
        for (texts, kind) in declared {
            for text in texts {
                let path = RelativePath::resolve(&working_directory, &text, "input root")
                    .map_err(InvalidCommand::CommandOutput)?;
                outputs.push(CommandOutput { text, path, kind });
            }
        }
        let mut node_properties = NodePropertyKeys::default();
        for key in command.output_node_properties {
            match key.as_str() {
                "mtime" => node_properties.mtime = true,
                "unix_mode" => node_properties.unix_mode = true,
                _ => return Err(InvalidCommand::NodeProperty(key)),
            }
        }
        let store_directories = match Format::try_from(command.output_directory_format) {
            Ok(Format::TreeOnly) => false,
            Ok(Format::DirectoryOnly | Format::TreeAndDirectory) => true,
            Err(_) => return Err(InvalidCommand::Format(command.output_directory_format)),
        };
        Ok(Command {
            arguments: command.arguments,
            environment,
            working_directory,
            outputs,
            store_directories,
            node_properties,
        })
    }

    /// Whether an output is declared twice, or lies in another one. Both are legal.
    pub fn outputs_overlap(&self) -> bool {
        let paths = self.outputs.iter().map(|output| output.path.components());
        let mut paths: Vec<_> = paths.collect();
        // What lies in a directory comes right after it.
        paths.sort_unstable();
        paths.windows(2).any(|pair| pair[1].starts_with(pair[0]))
    }

    /// The directories that must exist before the command starts (REAPI: Command.output_paths).
    pub fn output_parents(&self) -> BTreeSet<RelativePath> {
        self.outputs
            .iter()
            .filter_map(|output| Some(output.path.split_last()?.0))
            .filter(|parent| !parent.is_root())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> reapi::Command {
        reapi::Command {
            arguments: vec!["true".into()],
            ..Default::default()
        }
    }

    #[test]
    fn outputs_are_relative_to_the_working_directory_and_stay_in_the_root() {
        let parse = |working_directory: &str, path: &str| {
            Command::parse(reapi::Command {
                working_directory: working_directory.into(),
                output_paths: vec![path.into()],
                ..command()
            })
            .map(|command| command.outputs[0].path.to_string())
        };
        assert_eq!(parse("a/b", "../c").unwrap(), "a/c");
        assert_eq!(parse("a/b/c", "../../../d").unwrap(), "d");
        assert_eq!(parse("a", ".").unwrap(), "a");
        assert_eq!(parse("", "").unwrap(), ".");
        assert!(matches!(
            parse("a", "../../b"),
            Err(InvalidCommand::CommandOutput(_))
        ));
        assert!(matches!(
            parse("a", "/b"),
            Err(InvalidCommand::CommandOutput(_))
        ));
        assert!(matches!(
            parse("..", "b"),
            Err(InvalidCommand::WorkingDirectory(_))
        ));
        assert!(matches!(
            parse("/a", "b"),
            Err(InvalidCommand::WorkingDirectory(_))
        ));
    }

    #[test]
    fn node_properties_that_are_not_known_are_refused() {
        let parse = |keys: &[&str]| {
            let output_node_properties = keys.iter().map(|key| (*key).to_owned()).collect();
            let command = Command::parse(reapi::Command {
                output_node_properties,
                ..command()
            });
            command.map(|command| command.node_properties)
        };
        assert_eq!(parse(&[]), Ok(NodePropertyKeys::default()));
        let mtime = NodePropertyKeys {
            mtime: true,
            unix_mode: false,
        };
        assert_eq!(parse(&["mtime"]), Ok(mtime));
        assert!(parse(&["mtime", "unix_mode"]).unwrap().unix_mode);
        let error = parse(&["mtime", "owner"]).unwrap_err();
        assert_eq!(error, InvalidCommand::NodeProperty("owner".to_owned()));
    }

    #[test]
    #[expect(deprecated, reason = "clients of REAPI 2.0 use it")]
    fn old_lists_count_only_without_output_paths() {
        let old = reapi::Command {
            output_files: vec!["f".into()],
            output_directories: vec!["d".into()],
            ..command()
        };
        let parsed = Command::parse(old.clone()).unwrap();
        let kinds: Vec<_> = parsed.outputs.iter().map(|output| output.kind).collect();
        assert_eq!(kinds, [OutputKind::File, OutputKind::Directory]);
        let parsed = Command::parse(reapi::Command {
            output_paths: vec!["p/q".into()],
            ..old
        })
        .unwrap();
        assert_eq!(parsed.outputs.len(), 1);
        assert_eq!(parsed.outputs[0].kind, OutputKind::Any);
        assert_eq!(parsed.output_parents().len(), 1);
    }

    #[test]
    fn outputs_overlap_when_one_is_or_lies_in_another() {
        let overlap = |paths: &[&str]| {
            let command = reapi::Command {
                output_paths: paths.iter().map(|path| path.to_string()).collect(),
                ..command()
            };
            Command::parse(command).unwrap().outputs_overlap()
        };
        assert!(!overlap(&[]));
        assert!(!overlap(&["d", "d.x", "dx/y", "e/d", "d-"]));
        assert!(overlap(&["o", "p", "./o"]));
        assert!(overlap(&["d/x", "d.x", "d"]));
        assert!(overlap(&["d/e/f", "d!", "d/e0", "d"]));
        assert!(overlap(&["z", "."]));
    }

    #[test]
    fn what_no_process_can_be_started_with_is_refused() {
        let variable = |name: &str| reapi::command::EnvironmentVariable {
            name: name.into(),
            value: "x".into(),
        };
        let with = |variables: &[&str]| {
            Command::parse(reapi::Command {
                environment_variables: variables.iter().map(|name| variable(name)).collect(),
                ..command()
            })
        };
        assert!(with(&["B", "A"]).is_ok());
        assert!(matches!(
            with(&["A", "A"]),
            Err(InvalidCommand::DuplicateVariable(_))
        ));
        assert!(matches!(with(&[""]), Err(InvalidCommand::VariableName(_))));
        assert!(matches!(
            with(&["A=B"]),
            Err(InvalidCommand::VariableName(_))
        ));
        assert!(matches!(with(&["A\0"]), Err(InvalidCommand::Nul(_))));
        assert_eq!(
            Command::parse(reapi::Command::default()),
            Err(InvalidCommand::NoArguments)
        );
    }
}
