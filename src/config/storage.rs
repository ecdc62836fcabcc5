//! Where blobs and action results are, in a configuration.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5) and bb_worker.toml(5), as a test sees to"
)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    Diagnostics, Duration, Endpoint, ListenAddress, Size,
    object_storage::{ObjectService, ObjectStores},
};
use crate::instance::InstanceName;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageLocation {
    Embedded,
    Endpoint(Endpoint),
    /// All of `storage.shards`.
    Shards,
    /// What the service's section says.
    Objects(ObjectService),
}

/// A part of the storage: a server, or several that mirror each other.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shard {
    /// Decides what the shard has, so that it never changes.
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    /// Its share, in proportion to others'.
    pub weight: u32,
    /// What is put before the instance names of calls.
    pub instance_name_prefix: String,
}

/// How much of the embedded store the uploads of some instance names may take.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceLimit {
    /// Of those names; empty for all that no other limit is about.
    pub instance_name_prefix: String,
    pub maximum_size: Size,
}

/// When a server of a shard, or an object store, is out of use.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// In a row.
    pub faults: u32,
    /// Between two health checks.
    pub interval: Duration,
    /// For the answer to a health check.
    pub timeout: Duration,
}

impl Default for Shard {
    fn default() -> Self {
        Shard {
            name: String::new(),
            endpoints: Vec::new(),
            weight: 1,
            instance_name_prefix: String::new(),
        }
    }
}

impl Default for InstanceLimit {
    fn default() -> Self {
        InstanceLimit {
            instance_name_prefix: String::new(),
            maximum_size: Size(0),
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Health {
            faults: 3,
            interval: Duration::seconds(2),
            timeout: Duration::seconds(2),
        }
    }
}

/// What a section `storage` says of places.
#[derive(Clone, Copy, Debug)]
pub struct Places<'c> {
    pub cas: &'c StorageLocation,
    pub action_cache: &'c StorageLocation,
    pub shards: &'c [Shard],
    pub health: &'c Health,
    pub objects: ObjectStores<'c>,
}

impl<'c> Places<'c> {
    /// Whether bb_scheduler has an embedded store: for what is embedded, or as the cache of a CAS of
    /// objects.
    pub fn has_embedded(&self) -> bool {
        self.counts_for_instances() || matches!(self.cas, StorageLocation::Objects(_))
    }

    /// Whether what is stored here is an instance name's: all but the cache of a CAS of objects.
    pub fn counts_for_instances(&self) -> bool {
        [self.cas, self.action_cache].contains(&&StorageLocation::Embedded)
    }

    /// Object stores that are used, each once.
    pub fn services(&self) -> Vec<ObjectService> {
        let mut services: Vec<ObjectService> = [self.cas, self.action_cache]
            .into_iter()
            .filter_map(StorageLocation::service)
            .collect();
        services.dedup();
        services
    }

    /// The files with secrets that are needed, by the keys that name them.
    pub fn secret_files(&self) -> Vec<(&'static str, &'c std::path::Path)> {
        let file = |service: &ObjectService| {
            let file = self.objects.secret_file(*service)?;
            Some((service.secret_key(), file))
        };
        self.services().iter().filter_map(file).collect()
    }

    pub fn has_shards(&self) -> bool {
        [self.cas, self.action_cache].contains(&&StorageLocation::Shards)
    }

    /// All that calls go to.
    pub fn endpoints(&self) -> Vec<&'c Endpoint> {
        let mut endpoints: Vec<&Endpoint> = [self.cas, self.action_cache]
            .into_iter()
            .filter_map(StorageLocation::endpoint)
            .collect();
        if self.has_shards() {
            endpoints.extend(self.shards.iter().flat_map(|shard| &shard.endpoints));
        }
        let services = self.services().into_iter();
        endpoints.extend(services.map(|service| self.objects.endpoint(service)));
        endpoints
    }

    /// What no host is needed to find wrong; `own` is where this daemon itself listens.
    pub(super) fn validate(&self, own: Option<&ListenAddress>, diagnostics: &mut Diagnostics) {
        for (key, place) in [
            ("storage.cas", self.cas),
            ("storage.action_cache", self.action_cache),
        ] {
            if let (StorageLocation::Endpoint(endpoint), Some(own)) = (place, own) {
                diagnostics.require(
                    !endpoint.is_at(own),
                    key,
                    "that is this scheduler's own port, so that it would ask itself; write \"embedded\", or where the storage is",
                );
            }
            diagnostics.require(
                *place != StorageLocation::Shards || !self.shards.is_empty(),
                key,
                "there are no storage.shards; write them, such as shards = [{ name = \"a\", endpoints = [\"grpc://a.example:8981\"] }]",
            );
        }
        diagnostics.require(
            self.shards.is_empty() || self.has_shards(),
            "storage.shards",
            "neither storage.cas nor storage.action_cache is \"shards\", so that these do nothing; write cas = \"shards\"",
        );
        for (number, shard) in self.shards.iter().enumerate() {
            shard.validate(number, &self.shards[..number], own, diagnostics);
        }
        self.health.validate(diagnostics);
        let used = [
            (self.cas, "storage.cas"),
            (self.action_cache, "storage.action_cache"),
        ];
        let used = used
            .into_iter()
            .filter_map(|(place, key)| Some((place.service()?, key)));
        let used: Vec<_> = used.collect();
        self.objects.validate(&used, diagnostics);
    }
}

impl Shard {
    fn validate(
        &self,
        number: usize,
        before: &[Shard],
        own: Option<&ListenAddress>,
        diagnostics: &mut Diagnostics,
    ) {
        let key = |name: &str| format!("storage.shards.{number}.{name}");
        diagnostics.require(
            !self.name.is_empty() && before.iter().all(|other| other.name != self.name),
            &key("name"),
            "each shard needs a name of its own, which decides what it has, such as \"a\"; do not change it later",
        );
        diagnostics.require(
            (1..=8).contains(&self.endpoints.len()),
            &key("endpoints"),
            "a shard is a server, or up to 8 that mirror each other, such as [\"grpc://a.example:8981\"]",
        );
        let others = before.iter().flat_map(|other| &other.endpoints);
        let others: Vec<&Endpoint> = others.collect();
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            diagnostics.require(
                !others.contains(&endpoint) && !self.endpoints[..i].contains(endpoint),
                &key("endpoints"),
                format!("{endpoint} is given twice; give each server once"),
            );
            diagnostics.require(
                own.is_none_or(|own| !endpoint.is_at(own)),
                &key("endpoints"),
                "that is this scheduler's own port, so that it would ask itself; write where the shard's server is",
            );
        }
        diagnostics.require(
            (1..=1_000_000).contains(&self.weight),
            &key("weight"),
            "it is a share in proportion to others', from 1 to 1000000; leave it out where all are alike",
        );
        if let Err(error) = InstanceName::parse(&self.instance_name_prefix) {
            diagnostics.add(key("instance_name_prefix"), error.to_string());
        }
    }
}

/// More of them would make each upload slow.
const MOST_INSTANCE_LIMITS: usize = 1000;

/// What no host is needed to find wrong with the limits of an embedded store of this size.
pub(super) fn validate_instance_limits(
    limits: &[InstanceLimit],
    maximum: Size,
    diagnostics: &mut Diagnostics,
) {
    diagnostics.require(
        limits.len() <= MOST_INSTANCE_LIMITS,
        "storage.embedded.instance_limits",
        format!("there are {}, of at most {MOST_INSTANCE_LIMITS}; give prefixes that several instance names have", limits.len()),
    );
    for (number, limit) in limits.iter().enumerate() {
        limit.validate(number, &limits[..number], maximum, diagnostics);
    }
}

impl InstanceLimit {
    fn validate(
        &self,
        number: usize,
        before: &[Self],
        maximum: Size,
        diagnostics: &mut Diagnostics,
    ) {
        let key = |name: &str| format!("storage.embedded.instance_limits.{number}.{name}");
        let prefix = &self.instance_name_prefix;
        if let Err(error) = InstanceName::parse(prefix) {
            diagnostics.add(key("instance_name_prefix"), error.to_string());
        }
        diagnostics.require(
            before
                .iter()
                .all(|other| other.instance_name_prefix != *prefix),
            &key("instance_name_prefix"),
            format!("{prefix:?} has a limit already; leave one of them out"),
        );
        diagnostics.require(
            self.maximum_size >= Size::mib(16),
            &key("maximum_size"),
            "less than 16MiB cannot hold the outputs of a build; write how much of the store these instance names may take, such as \"5GiB\"",
        );
        diagnostics.require(
            self.maximum_size <= maximum,
            &key("maximum_size"),
            format!(
                "it exceeds storage.embedded.maximum_size, which is {maximum}, so that it would limit nothing; write less, or leave it out"
            ),
        );
    }
}

impl Health {
    fn validate(&self, diagnostics: &mut Diagnostics) {
        const LEAST: std::time::Duration = std::time::Duration::from_millis(100);
        diagnostics.require(
            (1..=1000).contains(&self.faults),
            "storage.health.faults",
            "it is how many faults in a row take a server out of use, from 1 to 1000; 3 is a good start",
        );
        for (key, duration) in [
            ("storage.health.interval", self.interval),
            ("storage.health.timeout", self.timeout),
        ] {
            diagnostics.require(
                duration.get() >= LEAST,
                key,
                "less than 100ms takes servers for dead that are only busy; \"2s\" is a good start",
            );
        }
    }
}

impl StorageLocation {
    /// The server, where it is a single one.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        match self {
            StorageLocation::Endpoint(endpoint) => Some(endpoint),
            StorageLocation::Embedded | StorageLocation::Shards | StorageLocation::Objects(_) => {
                None
            }
        }
    }

    /// The object store, where it is one.
    pub fn service(&self) -> Option<ObjectService> {
        match self {
            StorageLocation::Objects(service) => Some(*service),
            _ => None,
        }
    }
}

impl From<Endpoint> for StorageLocation {
    fn from(endpoint: Endpoint) -> Self {
        StorageLocation::Endpoint(endpoint)
    }
}

impl fmt::Display for StorageLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StorageLocation::Embedded => f.write_str("embedded"),
            StorageLocation::Endpoint(endpoint) => endpoint.fmt(f),
            StorageLocation::Shards => f.write_str("shards"),
            StorageLocation::Objects(service) => f.write_str(service.name()),
        }
    }
}

impl<'de> Deserialize<'de> for StorageLocation {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut services = ObjectService::ALL.into_iter();
        if let Some(service) = services.find(|service| service.name() == text) {
            return Ok(StorageLocation::Objects(service));
        }
        match &*text {
            "embedded" => Ok(StorageLocation::Embedded),
            "shards" => Ok(StorageLocation::Shards),
            _ => text
                .parse()
                .map(StorageLocation::Endpoint)
                .map_err(|error| {
                    serde::de::Error::custom(format!(
                        "{error}, or \"embedded\" for a store in bb_scheduler, \"shards\" for storage.shards, or \"s3\", \"gcs\", \"azure\" or \"redis\" for the section of that name"
                    ))
                }),
        }
    }
}

impl Serialize for StorageLocation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
