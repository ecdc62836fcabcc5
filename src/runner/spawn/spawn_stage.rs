//! How far a new process has come on its way to the action's command, for errors that name what failed.

/// How far a process has come, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpawnStage {
    #[default]
    Namespaces,
    Mounts,
    Root,
    Session,
    Descriptors,
    Limits,
    InputRoot,
    Credentials,
    Filter,
    WorkingDirectory,
    Search,
    Execute,
    /// Comes instead of `Execute`, where an emulator is executed with the command as an argument.
    Emulate,
}
