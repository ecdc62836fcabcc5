use std::process::ExitCode;

use bb_remote_execution::{daemon, worker};

fn main() -> ExitCode {
    daemon::main(
        worker::PROGRAM,
        |config| &config.log,
        worker::warnings,
        worker::probe,
        worker::run,
        worker::ask,
    )
}
