//! What to run: a RunRequest, checked and laid out so that nothing is left to decide after the
//! process has been made.
//!
//! 1. No path of a Run leads out of the build directory, lexically; that no symbolic link does
//!    either is for those who open them.
//! 2. Its strings have no NUL, and each fits in what execve(2) takes (MAX_ARG_STRLEN).
//! 3. The search of an executable in the action's own PATH is data: a list of candidates, to be
//!    tried by the action's user in the action's working directory.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    collections::BTreeSet,
    ffi::CString,
    fmt,
    time::{Duration, Instant},
};

use super::default_environment::AddedVariables;
use crate::{
    path::{PathError, RelativePath},
    proto::runner::RunRequest,
};

/// Bytes of the longest single string that execve(2) takes, 32 pages, with its NUL.
const MAXIMUM_STRING: usize = 131_072;
/// Bytes of the longest name of a directory entry that Linux takes (limits.h).
const MAXIMUM_NAME: usize = 255;
/// Bytes of the longest path that Linux takes (limits.h).
const MAXIMUM_PATH: usize = 4095;

/// A RunRequest that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RunSpec {
    pub arguments: Vec<CString>,
    /// Variables as `NAME=VALUE`: exactly what was sent, and what the runner adds.
    pub environment: Vec<CString>,
    pub executable: Executable,
    /// A path below the input root.
    pub working_directory: RelativePath,
    /// A path below the build directory.
    pub input_root: RelativePath,
    /// A path below the build directory; `None` when the worker gave none.
    pub temporary_directory: Option<RelativePath>,
    pub stdout: StdioPath,
    pub stderr: StdioPath,
    /// The directory, below the build directory, that server logs are taken from; `None` when the worker takes none.
    pub server_logs: Option<RelativePath>,
    /// The home directory: an absolute path as the command sees it.
    pub home: String,
    /// Whether the worker has made the files in the input root for this action alone: they become its user's.
    pub private_inputs: bool,
    /// When the caller wants the command to have ended; `None` when it does not say.
    pub deadline: Option<Deadline>,
}

/// When a command must have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deadline {
    pub at: Instant,
    /// How much time that was when the call arrived.
    pub limit: Duration,
}

/// Where the executable may be; relative paths start at the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Executable {
    /// argv[0] has a slash, and is this path.
    Path(CString),
    /// argv[0] is a name, to be found at the first of these that can be executed.
    Search {
        candidates: Vec<CString>,
        name: String,
        path: String,
    },
}

/// A file that the runner makes for a command's standard output or error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StdioPath {
    pub stream: StdioStream,
    /// The path as the worker wrote it, for errors.
    pub text: String,
    /// The path below the build directory.
    pub path: RelativePath,
}

/// Which of a command's streams is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StdioStream {
    Stdout,
    Stderr,
}

/// Why a RunRequest cannot be run; its sender must act. The texts are Buildbarn's where it has one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RunSpecError {
    #[error("Insufficient number of command arguments")]
    NoArguments,
    #[error("Failed to start process: {0} contains a NUL character")]
    Nul(RunSpecPart),
    #[error(
        "Failed to start process: {0} is {1} bytes long, and an operating system takes {limit}",
        limit = MAXIMUM_STRING - 1
    )]
    TooLong(RunSpecPart, usize),
    #[error("Failed to start process: {0:?} cannot be the name of an environment variable")]
    VariableName(String),
    #[error("Failed to open {0} path {1:?}: {reason}", reason = reason(.2))]
    StdioPath(StdioStream, String, PathError),
    #[error("Failed to open {0} path {1:?}: Path is that of a directory")]
    StdioPathIsDirectory(StdioStream, String),
    #[error("Failed to resolve {0} directory {1:?}: {reason}", reason = reason(.2))]
    Directory(&'static str, String, PathError),
}

/// Which string of a RunRequest no process can be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RunSpecPart {
    Argument(usize),
    Variable(String),
}

impl RunSpec {
    /// Lays out what a worker sent, with the variables that the runner adds. Whether inputs are private, and the
    /// deadline, come with the call, not with the message.
    pub(super) fn parse(
        mut request: RunRequest,
        additions: &AddedVariables,
    ) -> Result<Self, RunSpecError> {
        let below_build = |what, text: &str| {
            RelativePath::resolve(&RelativePath::root(), text, "build directory")
                .map_err(|error| RunSpecError::Directory(what, text.to_owned(), error))
        };
        let input_root = below_build("input root", &request.input_root_directory)?;
        let temporary_directory = match request.temporary_directory.as_str() {
            "" => None,
            text => Some(below_build("temporary", text)?),
        };
        let server_logs = match request.server_logs_directory.as_str() {
            "" => None,
            text => Some(below_build("server logs", text)?),
        };
        let working_directory = RelativePath::resolve(
            &RelativePath::root(),
            &request.working_directory,
            "input root",
        )
        .map_err(|error| {
            RunSpecError::Directory("working", request.working_directory.clone(), error)
        })?;
        let stdout = StdioPath::parse(StdioStream::Stdout, request.stdout_path)?;
        let stderr = StdioPath::parse(StdioStream::Stderr, request.stderr_path)?;

        let home = additions
            .view
            .home(temporary_directory.as_ref(), &input_root);
        let added = additions.missing_from(
            &request.environment_variables,
            &home,
            temporary_directory.as_ref(),
            &input_root,
        );
        let variable = |(name, value): (String, String)| {
            let text = format!("{name}={value}");
            c_string(RunSpecPart::Variable(name), text)
        };
        let mut environment = Vec::with_capacity(request.environment_variables.len() + added.len());
        for (name, value) in added {
            if name == "PATH" {
                // For the search, too.
                let variables = &mut request.environment_variables;
                variables.insert(name, value);
            } else {
                environment.push(variable((name, value))?);
            }
        }

        let executable = match request.arguments.first() {
            None => return Err(RunSpecError::NoArguments),
            Some(first) if first.contains('/') => {
                Executable::Path(c_string(RunSpecPart::Argument(0), first.clone())?)
            }
            Some(first) => {
                let path = request
                    .environment_variables
                    .get("PATH")
                    .map_or("", String::as_str);
                // Before the candidates, so that none of them can have a NUL or be endless.
                c_string(RunSpecPart::Argument(0), first.clone())?;
                c_string(RunSpecPart::Variable("PATH".to_owned()), path.to_owned())?;
                Executable::Search {
                    candidates: candidates(first, path),
                    name: first.clone(),
                    path: path.to_owned(),
                }
            }
        };
        let arguments = request
            .arguments
            .into_iter()
            .enumerate()
            .map(|(index, argument)| c_string(RunSpecPart::Argument(index), argument))
            .collect::<Result<_, _>>()?;

        for (name, value) in request.environment_variables {
            if name.is_empty() || name.contains('=') {
                return Err(RunSpecError::VariableName(name));
            }
            environment.push(variable((name, value))?);
        }
        Ok(RunSpec {
            arguments,
            environment,
            executable,
            working_directory,
            input_root,
            temporary_directory,
            stdout,
            stderr,
            server_logs,
            home,
            private_inputs: false,
            deadline: None,
        })
    }
}

impl StdioPath {
    fn parse(stream: StdioStream, text: String) -> Result<Self, RunSpecError> {
        match RelativePath::resolve(&RelativePath::root(), &text, "build directory") {
            Ok(path) if path.is_root() => Err(RunSpecError::StdioPathIsDirectory(stream, text)),
            Ok(path) => Ok(StdioPath { stream, text, path }),
            Err(error) => Err(RunSpecError::StdioPath(stream, text, error)),
        }
    }
}

fn c_string(part: RunSpecPart, text: String) -> Result<CString, RunSpecError> {
    if text.len() >= MAXIMUM_STRING {
        return Err(RunSpecError::TooLong(part, text.len()));
    }
    CString::new(text).map_err(|_| RunSpecError::Nul(part))
}

/// `name` in every directory of a PATH, in order; an empty directory is the working directory, and
/// an empty PATH has no directory.
fn candidates(name: &str, path: &str) -> Vec<CString> {
    if name.is_empty() || name.len() > MAXIMUM_NAME || path.is_empty() {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    path.split(':')
        .map(|directory| match directory.trim_end_matches('/') {
            "" if directory.is_empty() => ".",
            trimmed => trimmed,
        })
        .filter(|directory| directory.len() + 1 + name.len() <= MAXIMUM_PATH)
        .filter(|directory| seen.insert(*directory))
        .filter_map(|directory| CString::new(format!("{directory}/{name}")).ok())
        .collect()
}

fn reason(error: &PathError) -> String {
    match error {
        PathError::Escapes(_, "build directory") => {
            "Path resolves to a location outside the build directory".to_owned()
        }
        PathError::Escapes(_, root) => {
            format!("Path resolves to a location outside the {root}")
        }
        error => error.to_string(),
    }
}

impl fmt::Display for StdioStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StdioStream::Stdout => "stdout",
            StdioStream::Stderr => "stderr",
        })
    }
}

impl fmt::Display for RunSpecPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunSpecPart::Argument(index) => write!(f, "argument {index}"),
            RunSpecPart::Variable(name) => write!(f, "environment variable {name:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::default_environment::{BuildDirectoryView, PATH},
        *,
    };

    fn request(arguments: &[&str], environment: &[(&str, &str)]) -> RunRequest {
        RunRequest {
            arguments: arguments.iter().map(|text| text.to_string()).collect(),
            environment_variables: environment
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
            working_directory: String::new(),
            stdout_path: "0/stdout".to_owned(),
            stderr_path: "0/stderr".to_owned(),
            input_root_directory: "0/root".to_owned(),
            temporary_directory: "0/tmp".to_owned(),
            server_logs_directory: "0/server_logs".to_owned(),
        }
    }

    fn additions(tmpdir: bool, defaults: bool) -> AddedVariables {
        AddedVariables {
            view: BuildDirectoryView::OwnDirectory("/build".to_owned()),
            tmpdir,
            defaults,
        }
    }

    fn parse(request: RunRequest) -> Result<RunSpec, RunSpecError> {
        RunSpec::parse(request, &additions(true, false))
    }

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|text| text.to_str().unwrap()).collect()
    }

    #[test]
    fn a_name_is_sought_in_each_directory_of_the_actions_path() {
        for (path, expected) in [
            ("", vec![]),
            ("/bin", vec!["/bin/cc"]),
            ("/bin/:sub:/bin", vec!["/bin/cc", "sub/cc"]),
            (":/", vec!["./cc", "/cc"]),
        ] {
            let command = parse(request(&["cc", "-c"], &[("PATH", path)])).unwrap();
            let Executable::Search { candidates, .. } = command.executable else {
                panic!("{path:?} led to no search");
            };
            assert_eq!(texts(&candidates), expected, "{path:?}");
        }
    }

    #[test]
    fn a_path_is_not_sought() {
        for path in ["/bin/cc", "./cc", "tools/cc"] {
            let command = parse(request(&[path], &[("PATH", "/bin")])).unwrap();
            assert_eq!(
                command.executable,
                Executable::Path(CString::new(path).unwrap())
            );
        }
    }

    #[test]
    fn the_environment_is_what_was_sent_and_tmpdir_unless_the_action_sets_it() {
        let command = parse(request(&["/x"], &[("B", "2"), ("A", "")])).unwrap();
        assert_eq!(
            texts(&command.environment),
            ["TMPDIR=/build/tmp", "A=", "B=2"]
        );
        let command = parse(request(&["/x"], &[("TMPDIR", "/mine")])).unwrap();
        assert_eq!(texts(&command.environment), ["TMPDIR=/mine"]);
        let command = RunSpec::parse(request(&["/x"], &[]), &additions(false, false));
        assert!(command.unwrap().environment.is_empty());
        let without = RunRequest {
            temporary_directory: String::new(),
            ..request(&["/x"], &[])
        };
        assert!(parse(without).unwrap().environment.is_empty());
    }

    #[test]
    fn what_the_command_leaves_unset_has_a_default_and_what_it_sets_wins() {
        let with = |environment: &[(&str, &str)]| {
            RunSpec::parse(request(&["cc"], environment), &additions(false, true)).unwrap()
        };
        let command = with(&[]);
        let path = format!("PATH={PATH}");
        assert_eq!(
            texts(&command.environment),
            ["HOME=/build/home", "TZ=UTC", &path]
        );
        let Executable::Search { candidates, .. } = &command.executable else {
            panic!("a name led to no search");
        };
        assert_eq!(texts(candidates).last(), Some(&"/bin/cc"));
        let own = [("HOME", "/h"), ("PATH", ""), ("TZ", "")];
        let command = with(&own);
        assert_eq!(texts(&command.environment), ["HOME=/h", "PATH=", "TZ="]);
        let Executable::Search { candidates, .. } = command.executable else {
            panic!("a name led to no search");
        };
        assert!(candidates.is_empty());
    }

    #[test]
    fn no_path_leads_out_of_the_build_directory() {
        let escape = "hello/../../../../../../etc/passwd";
        let error = parse(RunRequest {
            stdout_path: escape.to_owned(),
            ..request(&["/x"], &[])
        })
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Failed to open stdout path {escape:?}: Path resolves to a location outside the \
                 build directory"
            )
        );
        for wrong in [
            RunRequest {
                stderr_path: "/etc/passwd".to_owned(),
                ..request(&["/x"], &[])
            },
            RunRequest {
                stderr_path: "0/..".to_owned(),
                ..request(&["/x"], &[])
            },
            RunRequest {
                input_root_directory: "..".to_owned(),
                ..request(&["/x"], &[])
            },
            RunRequest {
                temporary_directory: "../x".to_owned(),
                ..request(&["/x"], &[])
            },
            RunRequest {
                server_logs_directory: "0/../../x".to_owned(),
                ..request(&["/x"], &[])
            },
            RunRequest {
                working_directory: "a/../..".to_owned(),
                ..request(&["/x"], &[])
            },
        ] {
            parse(wrong).unwrap_err();
        }
    }

    #[test]
    fn what_no_process_can_be_given_is_refused() {
        assert_eq!(parse(request(&[], &[])), Err(RunSpecError::NoArguments));
        let long = "x".repeat(MAXIMUM_STRING);
        for (arguments, environment) in [
            (vec!["/x", "a\0b"], vec![]),
            (vec!["a\0b"], vec![("PATH", "/bin")]),
            (vec!["x"], vec![("PATH", "/bin\0")]),
            (vec!["/x", &long], vec![]),
            (vec!["/x"], vec![("A", &*long)]),
            (vec!["/x"], vec![("A=B", "")]),
            (vec!["/x"], vec![("", "x")]),
        ] {
            parse(request(&arguments, &environment)).unwrap_err();
        }
    }
}
