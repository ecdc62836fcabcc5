//! The commands of bb_scheduler that ask a scheduler that runs.
//!
//! In the order to read it: `rows` is what they show, `calls` how they ask; `look`, `action` and `store` show
//! it, `steer` changes something. What they print for scripts is described in bb_scheduler(8).

mod action;
mod calls;
mod look;
mod rows;
mod steer;
mod store;

use std::collections::BTreeMap;

use crate::{
    config::scheduler::Config,
    daemon::{CommandError, CommandOptions, Output},
    digest::Digest,
    proto::{
        buildqueuestate::{PlatformQueueName, SizeClassQueueName},
        reapi::{Platform, platform::Property},
    },
};
use calls::Scheduler;
use rows::QueueName;

/// What bb_scheduler asks a scheduler that runs.
#[derive(clap::Subcommand)]
pub enum Command {
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

/// Which platform queues are meant; all when nothing is said.
#[derive(clap::Args, Default, PartialEq)]
pub struct QueueFilter {
    /// Only queues of this instance name
    #[arg(long, value_name = "NAME")]
    instance: Option<String>,
    /// Only queues whose platform has this property, NAME=VALUE; may be repeated
    #[arg(long = "platform", value_name = "PROPERTY")]
    platform: Vec<String>,
    /// Only queues of this size class
    #[arg(long, value_name = "NUMBER")]
    size_class: Option<u32>,
}

/// A stage that operations can be at.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum StageName {
    Queued,
    Executing,
    Completed,
}

/// Labels that a worker must have to be meant.
#[derive(Clone)]
pub struct Pattern(BTreeMap<String, String>);

/// The digest of an action, as people have it.
#[derive(Clone)]
pub struct ActionName {
    hash: String,
    /// 0 when it was not said.
    size: i64,
}

impl QueueFilter {
    /// The queue that it describes, where none is there.
    fn queue(&self) -> Result<SizeClassQueueName, CommandError> {
        let mut properties = Vec::new();
        for property in &self.platform {
            let (name, value) = property.split_once('=').ok_or_else(|| {
                CommandError::Usage(format!("--platform {property}: write NAME=VALUE"))
            })?;
            properties.push(Property {
                name: name.to_owned(),
                value: value.to_owned(),
            });
        }
        properties.sort_by(|one, other| (&one.name, &one.value).cmp(&(&other.name, &other.value)));
        Ok(SizeClassQueueName {
            platform_queue_name: Some(PlatformQueueName {
                instance_name_prefix: self.instance.clone().unwrap_or_default(),
                platform: Some(Platform { properties }),
            }),
            size_class: self.size_class.unwrap_or_default(),
        })
    }

    fn admits(&self, queue: &QueueName) -> bool {
        let is_property = |wanted: &String| {
            let mut properties = queue.platform.iter();
            properties.any(|property| property.to_string() == *wanted)
        };
        self.instance
            .as_ref()
            .is_none_or(|name| *name == queue.instance)
            && self.size_class.is_none_or(|size| size == queue.size_class)
            && self.platform.iter().all(is_property)
    }
}

impl std::str::FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('=') {
            return match text {
                "" => Err("write LABEL=VALUE, or a host's name".to_owned()),
                host => Ok(Pattern([("hostname".to_owned(), host.to_owned())].into())),
            };
        }
        let label = |part: &str| {
            let (name, value) = part.split_once('=')?;
            (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
        };
        let labels: Option<BTreeMap<_, _>> = text.split(',').map(label).collect();
        let labels = labels.ok_or("each label is LABEL=VALUE, and commas are between them")?;
        Ok(Pattern(labels))
    }
}

impl Pattern {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0
            .iter()
            .all(|(name, value)| labels.get(name) == Some(value))
    }
}

impl std::str::FromStr for ActionName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (hash, size) = match text.split_once(['/', '-']) {
            Some((hash, size)) => (
                hash,
                size.parse()
                    .map_err(|_| "after the hash comes the size, a number")?,
            ),
            None => (text, 0),
        };
        let name = ActionName {
            hash: hash.to_owned(),
            size,
        };
        Digest::parse_required(None, Some(&(&name).into())).map_err(|error| error.to_string())?;
        Ok(name)
    }
}

/// Does what a command says.
pub async fn ask(command: Command, config: &Config) -> Result<(), CommandError> {
    let connect = |options: &CommandOptions| -> Result<(Scheduler, Output), CommandError> {
        let channel = options.connect("bb_scheduler", &config.control.listen)?;
        Ok((Scheduler::new(channel), options.output()))
    };
    match command {
        Command::Status { options } => {
            let (scheduler, output) = connect(&options)?;
            look::status(&scheduler, &output).await
        }
        Command::Queues { options } => {
            let (scheduler, output) = connect(&options)?;
            look::queues(&scheduler, &output).await
        }
        Command::Workers { pattern, options } => {
            let (scheduler, output) = connect(&options)?;
            look::workers(&scheduler, &output, pattern.as_ref()).await
        }
        Command::Operations {
            stage,
            limit,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            look::operations(&scheduler, &output, stage, limit).await
        }
        Command::Why { name, options } => {
            let (scheduler, output) = connect(&options)?;
            look::why(&scheduler, &output, name).await
        }
        Command::Drain {
            pattern,
            ahead,
            filter,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            steer::drain(&scheduler, &output, &pattern, ahead, &filter).await
        }
        Command::Undrain {
            pattern,
            all,
            filter,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            steer::undrain(&scheduler, &output, pattern.as_ref(), all, &filter).await
        }
        Command::Terminate { pattern, options } => {
            let (scheduler, output) = connect(&options)?;
            steer::terminate(&scheduler, &output, pattern).await
        }
        Command::Kill {
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
        Command::Action {
            digest,
            instance,
            options,
        } => {
            let (scheduler, output) = connect(&options)?;
            action::show(&scheduler, &output, &digest, instance).await
        }
        Command::Store { command } => match command {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_meant_by_labels_or_by_their_host() {
        let labels = |text: &str| text.parse::<Pattern>().map(|pattern| pattern.0);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(labels("a"), Ok([pair("hostname", "a")].into()));
        assert_eq!(labels("a=b,c="), Ok([pair("a", "b"), pair("c", "")].into()));
        for bad in ["", "=b", "a=b,c"] {
            assert!(labels(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn actions_are_named_with_or_without_their_size() {
        let hash = "ab".repeat(32);
        for (text, size) in [
            (hash.clone(), 0),
            (format!("{hash}/7"), 7),
            (format!("{hash}-8"), 8),
        ] {
            let name: ActionName = text.parse().unwrap();
            assert_eq!((name.hash, name.size), (hash.clone(), size));
        }
        for bad in [
            "ab".to_owned(),
            hash.to_uppercase(),
            format!("{hash}/x"),
            format!("{hash}/-7"),
        ] {
            assert!(bad.parse::<ActionName>().is_err(), "{bad}");
        }
    }
}
