//! The commands of bb_scheduler that ask a scheduler that runs.
//!
//! In the order to read it: `arguments` is what they are about, `rows` what they show, `calls` how they ask; `look`, `action` and `store` show
//! it, `steer` changes something. What they print for scripts is described in bb_scheduler(8).

mod action;
mod arguments;
mod calls;
mod look;
mod rows;
mod steer;
mod store;

use crate::{
    config::scheduler::Config,
    daemon::{CommandError, CommandOptions, Output},
};
use arguments::{ActionName, Pattern, QueueFilter, StageName};
use calls::SchedulerCalls;

/// What bb_scheduler asks a scheduler that runs.
#[derive(clap::Subcommand)]
pub enum SchedulerCommand {
    /// Show how the farm is: what is queued, executing and idle, and what the store takes
    Status {
        #[command(flatten)]
        options: CommandOptions,
    },
    /// List platform queues: their workers, what is queued, and for how long
    Queues {
        #[command(flatten)]
        options: CommandOptions,
    },
    /// List workers: what they execute, and which are drained
    Workers {
        /// Only those with these labels: LABEL=VALUE,…, or the value of hostname
        pattern: Option<Pattern>,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// List operations, oldest first
    Operations {
        /// Only those at this stage
        #[arg(long)]
        stage: Option<StageName>,
        /// No more than so many, which are the oldest; 0 for all
        #[arg(long, default_value_t = 1000, value_name = "COUNT")]
        limit: usize,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Say why an operation is where it is
    Why {
        /// The operation, as its client or the list of operations has it
        name: String,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Have workers finish what they execute and take nothing new
    Drain {
        /// Workers with these labels: LABEL=VALUE,…, or the value of hostname
        pattern: Pattern,
        /// Also where there are no such workers now; where there is no such queue, that of --instance,
        /// --platform and --size-class
        #[arg(long)]
        ahead: bool,
        #[command(flatten)]
        filter: QueueFilter,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Have drained workers take work again
    Undrain {
        /// As it was given to drain; without it, the drains are listed
        pattern: Option<Pattern>,
        /// Remove all drains
        #[arg(long, conflicts_with = "pattern")]
        all: bool,
        #[command(flatten)]
        filter: QueueFilter,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Have workers take nothing new until they are restarted, and wait until what they execute has ended
    Terminate {
        /// Workers with these labels: LABEL=VALUE,…, or the value of hostname
        pattern: Pattern,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// End an operation, and all others of its action, with an error for those who wait
    Kill {
        /// The operation, as its client or the list of operations has it
        #[arg(required_unless_present = "without_workers")]
        name: Option<String>,
        /// Everything that is queued where there are no workers
        #[arg(long, conflicts_with = "name")]
        without_workers: bool,
        /// What clients are told
        #[arg(long, default_value = "An operator of the farm has ended this")]
        reason: String,
        #[command(flatten)]
        filter: QueueFilter,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Show an action: its command, its result, and who executes it
    Action {
        /// HASH or HASH/SIZE, as a message of the client or the journal has it
        digest: ActionName,
        /// Instance name of its client
        #[arg(long, default_value = "", value_name = "NAME")]
        instance: String,
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Look after the embedded store
    Store {
        #[command(subcommand)]
        command: StoreCommand,
    },
}

/// What can be done with the embedded store.
#[derive(clap::Subcommand)]
pub enum StoreCommand {
    /// Show what the store takes
    Usage {
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Read all of it, and remove what is damaged
    Check {
        #[command(flatten)]
        options: CommandOptions,
    },
    /// Take the result of an action back, so that the action is executed again
    RemoveResult {
        /// HASH or HASH/SIZE of the action
        digest: ActionName,
        /// Instance name of its client
        #[arg(long, default_value = "", value_name = "NAME")]
        instance: String,
        #[command(flatten)]
        options: CommandOptions,
    },
}

/// Does what a command says.
pub async fn ask(command: SchedulerCommand, config: &Config) -> Result<(), CommandError> {
    let connect = |options: &CommandOptions| -> Result<(SchedulerCalls, Output), CommandError> {
        let channel = options.connect("bb_scheduler", &config.control.listen)?;
        Ok((SchedulerCalls::new(channel), options.output()))
    };
    match command {
        SchedulerCommand::Status { options } => {
            let (scheduler, output) = connect(&options)?;
            look::status(&scheduler, &output).await
        }
        SchedulerCommand::Queues { options } => {
            let (scheduler, output) = connect(&options)?;
            look::queues(&scheduler, &output).await
        }
        SchedulerCommand::Workers { pattern, options } => {
            let (scheduler, output) = connect(&options)?;
            look::workers(&scheduler, &output, pattern.as_ref()).await
        }
        SchedulerCommand::Operations {
            stage,
            limit,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            look::operations(&scheduler, &output, stage, limit).await
        }
        SchedulerCommand::Why { name, options } => {
            let (scheduler, output) = connect(&options)?;
            look::why(&scheduler, &output, name).await
        }
        SchedulerCommand::Drain {
            pattern,
            ahead,
            filter,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            steer::drain(&scheduler, &output, &pattern, ahead, &filter).await
        }
        SchedulerCommand::Undrain {
            pattern,
            all,
            filter,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            steer::undrain(&scheduler, &output, pattern.as_ref(), all, &filter).await
        }
        SchedulerCommand::Terminate { pattern, options } => {
            let (scheduler, output) = connect(&options)?;
            steer::terminate(&scheduler, &output, pattern).await
        }
        SchedulerCommand::Kill {
            name,
            reason,
            filter,
            options,
            without_workers: _,
        } => {
            if name.is_some() && filter != QueueFilter::default() {
                return Err(CommandError::Usage(
                    "--instance, --platform and --size-class say which queues are meant by --without-workers; an operation is named without them".to_owned(),
                ));
            }
            let (scheduler, output) = connect(&options)?;
            match name {
                Some(name) => steer::kill(&scheduler, &output, name, reason).await,
                None => steer::kill_queued(&scheduler, &output, &reason, &filter).await,
            }
        }
        SchedulerCommand::Action {
            digest,
            instance,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            action::show(&scheduler, &output, &digest, instance).await
        }
        SchedulerCommand::Store { command } => match command {
            StoreCommand::Usage { options } => {
                let (scheduler, output) = connect(&options)?;
                store::usage(&scheduler, &output).await
            }
            StoreCommand::Check { options } => {
                let (scheduler, output) = connect(&options)?;
                store::check(&scheduler, &output).await
            }
            StoreCommand::RemoveResult {
                digest,
                instance,
                options,
            } => {
                let (scheduler, output) = connect(&options)?;
                store::remove_result(&scheduler, &output, &digest, instance).await
            }
        },
    }
}
