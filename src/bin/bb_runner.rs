use std::process::ExitCode;

use bb_remote_execution::{daemon, runner};

fn main() -> ExitCode {
    daemon::main(
        runner::PROGRAM,
        |config| &config.log,
        runner::warnings,
        runner::check_host,
        runner::run,
        runner::run_status,
    )
}
