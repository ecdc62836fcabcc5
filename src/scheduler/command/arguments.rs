//! What the commands are told to be about: queues, workers, stages and actions.

use std::collections::BTreeMap;

use super::rows::QueueName;
use crate::{
    daemon::CommandError,
    digest::Digest,
    proto::{
        buildqueuestate::{PlatformQueueName, SizeClassQueueName},
        reapi::{self, Platform, platform::Property},
    },
};

/// Which platform queues are meant; all when nothing is said.
#[derive(clap::Args, Default, PartialEq)]
pub struct QueueFilter {
    /// Only queues of this instance name
    #[arg(long, value_name = "NAME")]
    pub(super) instance: Option<String>,
    /// Only queues whose platform has this property, NAME=VALUE; may be repeated
    #[arg(long = "platform", value_name = "PROPERTY")]
    pub(super) platform: Vec<String>,
    /// Only queues of this size class
    #[arg(long, value_name = "NUMBER")]
    pub(super) size_class: Option<u32>,
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
pub struct Pattern(pub(super) BTreeMap<String, String>);

/// The digest of an action, as people have it.
#[derive(Clone)]
pub struct ActionName {
    pub(super) hash: String,
    /// 0 when it was not said.
    pub(super) size: i64,
}

impl QueueFilter {
    /// The queue that it describes, where none is there.
    pub(super) fn queue(&self) -> Result<SizeClassQueueName, CommandError> {
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

    pub(super) fn admits(&self, queue: &QueueName) -> bool {
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
    /// Whether a worker with these labels is meant.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
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

impl From<&ActionName> for reapi::Digest {
    fn from(name: &ActionName) -> Self {
        reapi::Digest {
            hash: name.hash.clone(),
            size_bytes: name.size,
        }
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
