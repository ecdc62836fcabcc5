//! Size-class queues, invocations and workers in addresses of pages.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::format::encode;
use crate::{
    instance::InstanceName,
    proto::{
        auth::AuthenticationMetadata,
        reapi::{self, RequestMetadata, platform::Property},
        unpack,
    },
    scheduler::queue::{InvocationKey, InvocationKeys, Platform, SizeClassQueueKey, WorkerPattern},
    text::{parse_hex, push_hex},
};

/// Which size-class queue is meant; in the query of an address, or in a form.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct QueueQuery {
    #[serde(default)]
    pub instance: String,
    /// A JSON object of the properties; one with several values has a list.
    #[serde(default)]
    pub platform: String,
    #[serde(default)]
    pub size: String,
}

impl QueueQuery {
    pub(super) fn of(key: &SizeClassQueueKey) -> Self {
        let properties: Vec<(&String, &String)> = key
            .platform
            .properties()
            .iter()
            .map(|(n, v)| (n, v))
            .collect();
        QueueQuery {
            instance: key.prefix.as_str().to_owned(),
            platform: serde_json::to_string(&properties).unwrap_or_default(),
            size: key.size_class.to_string(),
        }
    }

    /// `None` when it is none.
    pub(super) fn key(&self) -> Option<SizeClassQueueKey> {
        let properties: Vec<(String, String)> = match self.platform.is_empty() {
            true => Vec::new(),
            false => serde_json::from_str(&self.platform).ok()?,
        };
        let properties = properties.into_iter();
        let platform = reapi::Platform {
            properties: properties
                .map(|(name, value)| Property { name, value })
                .collect(),
        };
        Some(SizeClassQueueKey {
            platform: Platform::parse(Some(&platform)).ok()?,
            prefix: InstanceName::parse(&self.instance).ok()?,
            size_class: match self.size.is_empty() {
                true => 0,
                false => self.size.parse().ok()?,
            },
        })
    }

    /// For an address, behind its `?`.
    pub(super) fn encoded(&self) -> String {
        format!(
            "instance={}&platform={}&size={}",
            encode(&self.instance),
            encode(&self.platform),
            encode(&self.size)
        )
    }
}

/// Keys of an invocation in hexadecimal digits, outermost first, with dots between them.
pub(super) fn write_invocation(keys: &[InvocationKey]) -> String {
    let mut text = String::new();
    for (level, key) in keys.iter().enumerate() {
        if level > 0 {
            text.push('.');
        }
        push_hex(&mut text, key.as_bytes());
    }
    text
}

/// What `write_invocation` wrote.
pub(super) fn read_invocation(text: &str) -> Option<InvocationKeys> {
    let keys = text.split('.').filter(|key| !key.is_empty()).map(|digits| {
        let mut bytes = vec![0; digits.len() / 2];
        parse_hex(digits, &mut bytes).then(|| InvocationKey::from_bytes(&bytes))
    });
    Some(InvocationKeys::new(keys.collect::<Option<Vec<_>>>()?))
}

/// What an invocation is for people: its kind, and what its client calls it.
pub(super) fn describe_invocation(key: &InvocationKey) -> (&'static str, String) {
    let any = key.any();
    if let Some(metadata) = unpack::<RequestMetadata>(&any) {
        if !metadata.correlated_invocations_id.is_empty() {
            return ("correlated invocations", metadata.correlated_invocations_id);
        }
        return match metadata.tool_invocation_id.is_empty() {
            true => ("invocation", "(unnamed)".to_owned()),
            false => ("invocation", metadata.tool_invocation_id),
        };
    }
    if let Some(user) = unpack::<AuthenticationMetadata>(&any) {
        let public = user.public.map(|public| describe_value(&public));
        return ("user", public.unwrap_or_default());
    }
    let mut text = String::new();
    push_hex(&mut text, any.value.get(..64).unwrap_or(&any.value));
    ("key", text)
}

fn describe_value(value: &prost_types::Value) -> String {
    use prost_types::value::Kind;
    match &value.kind {
        Some(Kind::StringValue(text)) => text.clone(),
        Some(Kind::NumberValue(number)) => number.to_string(),
        Some(Kind::BoolValue(value)) => value.to_string(),
        Some(Kind::ListValue(list)) => {
            let values: Vec<String> = list.values.iter().map(describe_value).collect();
            values.join(", ")
        }
        Some(Kind::StructValue(object)) => {
            let fields = object.fields.iter();
            let fields = fields.map(|(name, value)| format!("{name}: {}", describe_value(value)));
            fields.collect::<Vec<_>>().join(", ")
        }
        Some(Kind::NullValue(_)) | None => String::new(),
    }
}

/// Labels of workers as a form has them: a JSON object.
pub(super) fn read_pattern(text: &str) -> Option<WorkerPattern> {
    let labels: BTreeMap<String, String> = serde_json::from_str(text).ok()?;
    Some(WorkerPattern::new(labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_being_written_into_an_address() {
        let platform = Platform::from(&BTreeMap::from([
            ("OSFamily".to_owned(), "linux & <b>".to_owned()),
            ("cpu".to_owned(), "\u{202e}".to_owned()),
        ]));
        let key = SizeClassQueueKey {
            platform,
            prefix: InstanceName::parse("a/b").unwrap(),
            size_class: 3,
        };
        let query = QueueQuery::of(&key);
        assert_eq!(query.key(), Some(key));
        assert!(
            !query.encoded().contains(['<', ' ', '"']),
            "{}",
            query.encoded()
        );
        let keys = [
            InvocationKey::from_bytes(&[1, 255]),
            InvocationKey::from_bytes(b"x"),
        ];
        let read = read_invocation(&write_invocation(&keys)).unwrap();
        assert_eq!(read.as_slice(), keys);
        assert_eq!(read_invocation("xyz"), None);
        let bad = QueueQuery {
            platform: "{".to_owned(),
            ..QueueQuery::default()
        };
        assert_eq!(bad.key(), None);
    }
}
