use std::process::ExitCode;

use bb_remote_execution::{daemon, scheduler};

fn main() -> ExitCode {
    daemon::main(
        scheduler::PROGRAM,
        |config| &config.log,
        scheduler::warnings,
        scheduler::probe,
        scheduler::run,
        scheduler::ask,
    )
}
