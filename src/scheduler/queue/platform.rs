//! Platforms, and where workers of one take their work from.

use std::{collections::BTreeMap, fmt, sync::Arc};

use crate::{instance::InstanceName, proto::reapi};

/// Platform properties, strictly sorted by name, then value (REAPI: Platform).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Platform(Arc<[(String, String)]>);

/// The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "platform properties are not sorted by name, then value, without repetition: {0:?} comes before {1:?}"
)]
pub struct UnsortedPlatform(String, String);

impl Platform {
    pub fn parse(platform: Option<&reapi::Platform>) -> Result<Self, UnsortedPlatform> {
        let properties: Arc<[(String, String)]> = platform
            .iter()
            .flat_map(|platform| &platform.properties)
            .map(|property| (property.name.clone(), property.value.clone()))
            .collect();
        for (earlier, later) in properties.iter().zip(properties.iter().skip(1)) {
            if earlier >= later {
                let show = |(name, value): &(String, String)| {
                    crate::text::shorten(&format!("{name}={value}"))
                };
                return Err(UnsortedPlatform(show(earlier), show(later)));
            }
        }
        Ok(Platform(properties))
    }

    /// This platform without the properties of some names.
    pub fn without(&self, leave_out: impl Fn(&str) -> bool) -> Self {
        let kept = self.0.iter().filter(|(name, _)| !leave_out(name));
        match kept.clone().count() == self.0.len() {
            true => self.clone(),
            false => Platform(kept.cloned().collect()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names of properties whose values are other ones, or are here or there only.
    pub fn differences(&self, other: &Platform) -> Vec<String> {
        let only = |one: &Platform, other: &Platform| -> Vec<String> {
            let properties = one.0.iter();
            let missing = properties.filter(|property| !other.0.contains(property));
            missing.map(|(name, _)| name.clone()).collect()
        };
        let mut names = only(self, other);
        names.extend(only(other, self));
        names.sort();
        names.dedup();
        names
    }

    pub fn properties(&self) -> &[(String, String)] {
        &self.0
    }
}

impl From<&BTreeMap<String, String>> for Platform {
    fn from(properties: &BTreeMap<String, String>) -> Self {
        Platform(
            properties
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
        )
    }
}

/// As in protobuf's JSON.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("{}");
        }
        f.write_str("{\"properties\":[")?;
        for (i, (name, value)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let (name, value) = (json(name), json(value));
            write!(f, "{comma}{{\"name\":{name},\"value\":{value}}}")?;
        }
        f.write_str("]}")
    }
}

pub(super) fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Where a worker takes its work from: a size-class queue.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClassQueueKey {
    pub platform: Platform,
    pub prefix: InstanceName,
    pub size_class: u32,
}
