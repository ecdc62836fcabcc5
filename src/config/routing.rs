//! Of bb_scheduler.toml: where actions go, and which platform queues there are without workers.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Diagnostics, Duration, OptionalEndpoint};
use crate::instance::InstanceName;

/// How the platform and the invocation keys of an action are found.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActionRouter {
    pub platform_key_extractor: PlatformKeyExtractor,
    /// That of all actions, when the extractor is `static`.
    pub static_platform: BTreeMap<String, String>,
    /// Levels of the invocation tree, outermost first; none for one line.
    pub invocation_key_extractors: Vec<InvocationKeyExtractor>,
    /// Who is asked instead.
    pub remote: OptionalEndpoint,
}

/// Where the platform of an action is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlatformKeyExtractor {
    Action,
    /// Clients before REAPI 2.2 write it in their Commands.
    #[default]
    ActionAndCommand,
    Static,
}

/// What tells an invocation from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InvocationKeyExtractor {
    /// RequestMetadata.tool_invocation_id.
    ToolInvocationId,
    /// RequestMetadata.correlated_invocations_id.
    CorrelatedInvocationsId,
    /// The public part of what is known of the user; no level where nothing is.
    AuthenticatedUser,
    /// The same; where nothing is known, the address that the client calls from.
    AuthenticatedUserOrAddress,
}

/// The router of some instance names, or of one platform there.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActionRouterBackend {
    pub instance_name_prefix: String,
    /// Without the ignored properties.
    pub platform: BTreeMap<String, String>,
    pub action_router: ActionRouter,
}

/// A platform queue that is there without workers, too, and who may use it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlatformQueue {
    pub instance_name_prefix: String,
    pub platform: BTreeMap<String, String>,
    /// Ascending; more than one only when all are above 0.
    pub size_classes: Vec<u32>,
    /// Properties that actions may ask for with any value.
    pub any_value: Vec<String>,
    /// Properties of which actions may ask for a smaller number, too.
    pub at_least: Vec<String>,
    pub worker_invocation_stickiness_limits: Vec<Duration>,
    /// 0 for no background learning.
    pub maximum_queued_background_learning_operations: usize,
    pub background_learning_operation_priority: i32,
}

impl Default for ActionRouter {
    fn default() -> Self {
        ActionRouter {
            platform_key_extractor: PlatformKeyExtractor::default(),
            static_platform: BTreeMap::new(),
            invocation_key_extractors: vec![
                InvocationKeyExtractor::AuthenticatedUserOrAddress,
                InvocationKeyExtractor::ToolInvocationId,
            ],
            remote: OptionalEndpoint::default(),
        }
    }
}

impl Default for PlatformQueue {
    fn default() -> Self {
        PlatformQueue {
            instance_name_prefix: String::new(),
            platform: BTreeMap::new(),
            size_classes: vec![0],
            any_value: Vec::new(),
            at_least: Vec::new(),
            worker_invocation_stickiness_limits: Vec::new(),
            maximum_queued_background_learning_operations: 0,
            background_learning_operation_priority: 0,
        }
    }
}

/// Whether a property's name matches a pattern, in which a final `*` stands for anything.
pub fn name_matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

impl ActionRouter {
    /// `key` is where it is written.
    pub(super) fn validate(&self, key: &str, diagnostics: &mut Diagnostics) {
        let is_static = self.platform_key_extractor == PlatformKeyExtractor::Static;
        diagnostics.require(
            is_static || self.static_platform.is_empty(),
            &format!("{key}.static_platform"),
            "it is used only with platform_key_extractor = \"static\"; set that, or take this out",
        );
        for (number, extractor) in self.invocation_key_extractors.iter().enumerate() {
            diagnostics.require(
                !self.invocation_key_extractors[..number].contains(extractor),
                &format!("{key}.invocation_key_extractors"),
                "a level is there twice; name each once, the outermost first",
            );
        }
    }
}

/// What is wrong with a list of properties' names or patterns.
pub(super) fn validate_patterns(key: &str, patterns: &[String], diagnostics: &mut Diagnostics) {
    for pattern in patterns {
        let stars = pattern.strip_suffix('*').unwrap_or(pattern).contains('*');
        diagnostics.require(
            !pattern.is_empty() && !stars,
            key,
            format!("{pattern:?} is no pattern; write a property's name, or its beginning and a final *, as in \"resources:*\""),
        );
    }
}

pub(super) fn validate_backends(backends: &[ActionRouterBackend], diagnostics: &mut Diagnostics) {
    for (number, backend) in backends.iter().enumerate() {
        let key = |name: &str| format!("action_router_backends.{number}.{name}");
        check_prefix(
            &backend.instance_name_prefix,
            key("instance_name_prefix"),
            diagnostics,
        );
        let same = |other: &ActionRouterBackend| {
            other.instance_name_prefix == backend.instance_name_prefix
                && other.platform == backend.platform
        };
        diagnostics.require(
            !backends[..number].iter().any(same),
            &key("platform"),
            "an earlier [[action_router_backends]] has the same instance_name_prefix and platform; keep one of them",
        );
        let nested = key("action_router");
        backend.action_router.validate(&nested, diagnostics);
    }
}

pub(super) fn validate_platform_queues(
    queues: &[PlatformQueue],
    ignored: &[String],
    diagnostics: &mut Diagnostics,
) {
    for (number, queue) in queues.iter().enumerate() {
        let key = |name: &str| format!("predeclared_platform_queues.{number}.{name}");
        check_prefix(
            &queue.instance_name_prefix,
            key("instance_name_prefix"),
            diagnostics,
        );
        let same = |other: &PlatformQueue| {
            other.instance_name_prefix == queue.instance_name_prefix
                && other.platform == queue.platform
        };
        diagnostics.require(
            !queues[..number].iter().any(same),
            &key("platform"),
            "an earlier [[predeclared_platform_queues]] has the same instance_name_prefix and platform; list all size_classes there",
        );
        let sizes = &queue.size_classes;
        diagnostics.require(
            !sizes.is_empty() && sizes.is_sorted_by(|a, b| a < b),
            &key("size_classes"),
            "size classes are written once each, in ascending order, as in [1, 4]; [0] where workers have none",
        );
        diagnostics.require(
            sizes.len() < 2 || sizes.first() != Some(&0),
            &key("size_classes"),
            "where there are several, each is above 0, as in [1, 4]: the 0 is that of workers without size classes",
        );
        let is_ignored = |name: &String| ignored.iter().any(|pattern| name_matches(pattern, name));
        for (which, names) in [
            ("platform", queue.platform.keys().collect::<Vec<_>>()),
            ("any_value", queue.any_value.iter().collect()),
            ("at_least", queue.at_least.iter().collect()),
        ] {
            for name in names {
                diagnostics.require(
                    !is_ignored(name),
                    &key(which),
                    format!("{name:?} is ignored by scheduling.ignored_platform_properties; take it out there, or here"),
                );
            }
        }
        for name in &queue.at_least {
            let number = queue
                .platform
                .get(name)
                .and_then(|value| at_least_number(value));
            diagnostics.require(
                number.is_some(),
                &key("at_least"),
                format!("platform has no number for {name:?}; write how much its workers have, as in platform = {{ {name} = \"8\" }}"),
            );
            diagnostics.require(
                !queue.any_value.contains(name),
                &key("at_least"),
                format!("{name:?} is in any_value, too; keep one of them"),
            );
        }
    }
}

/// The number of a property that is compared; `None` when it is none.
pub fn at_least_number(value: &str) -> Option<f64> {
    let digits = value
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    value.parse().ok().filter(|_| digits)
}

fn check_prefix(prefix: &str, key: String, diagnostics: &mut Diagnostics) {
    if let Err(error) = InstanceName::parse(prefix) {
        diagnostics.add(key, format!("{error}; write \"\" for all instance names"));
    }
}
