//! Where an action goes, PURE: its platform, its invocation keys and its timeout, out of the request,
//! the Action and the configuration.
//!
//! Terms are Buildbarn's: an *action router* has a *platform key extractor*, and an *invocation key
//! extractor* for each level of the invocation tree; or a *remote* program is asked. Which router is an
//! action's is told by the longest prefix of its instance name and its platform.
//!
//! To read in this order: this file, which is the way of one action; `platform`, `invocation`,
//! `timeout`, its steps.
//!
//! 1. Routing asks for what it lacks (`Step`) and is called again with it; it never waits.
//! 2. Ignored properties are dropped wherever a platform is compared: from actions' and from workers'.
//! 3. A client gets the key of no other user or address, whatever the name of an operation says.
//! 4. An action that asks for just what a platform queue offers goes there, before it is seen whether
//!    queues with `any_value` or `at_least` would take it.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod invocation;
mod platform;
#[cfg(test)]
mod tests;
mod timeout;

pub use timeout::{InvalidTimeout, execution_timeout};

use invocation::InvocationKeysError;
use platform::{IgnoredProperties, QueueMatches};

use super::queue::{InvocationKeys, Platform, UnsortedPlatform};
use crate::{
    config::{
        Endpoint,
        routing::{ActionRouter, InvocationKeyExtractor, PlatformKeyExtractor},
        scheduler::Config,
    },
    digest::DigestFunction,
    instance::InstanceName,
    proto::{
        auth::AuthenticationMetadata,
        reapi,
        remoteactionrouter::{RouteActionRequest, RouteActionResponse},
    },
};

/// All that the configuration says of routes.
pub struct Router {
    ignored: IgnoredProperties,
    queues: QueueMatches,
    default: RoutingRules,
    backends: Vec<RoutingBackend>,
}

/// One action router.
struct RoutingRules {
    platform: PlatformKeyExtractor,
    static_platform: Platform,
    invocation: Vec<InvocationKeyExtractor>,
    remote: Option<Endpoint>,
}

struct RoutingBackend {
    prefix: InstanceName,
    platform: Platform,
    rules: RoutingRules,
}

/// What is known of an action when it is routed.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    pub instance: &'a InstanceName,
    pub function: DigestFunction,
    pub action: &'a reapi::Action,
    /// What its client said of itself; empty when it said nothing.
    pub metadata: &'a reapi::RequestMetadata,
    /// Who its client proved to be.
    pub user: Option<&'a AuthenticationMetadata>,
    /// Where its client calls from, if that is known.
    pub address: Option<&'a str>,
    /// What the name of an operation says that is taken up again.
    pub claimed: Option<&'a InvocationKeys>,
    /// `None` until it was asked for.
    pub command: Option<&'a reapi::Command>,
    /// `None` until it was asked for.
    pub answer: Option<&'a RouteActionResponse>,
}

/// What is to be done next with an action.
#[derive(Debug, PartialEq)]
pub enum Step<'r> {
    /// Its Command is to be read.
    NeedsCommand,
    /// This server is to be asked.
    NeedsAnswer {
        endpoint: &'r Endpoint,
        request: Box<RouteActionRequest>,
    },
    Done(Route),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// In place of the client's.
    pub action: Option<reapi::Action>,
    /// Those that would do, the best one first: the action's own, and those of queues that take it all
    /// the same.
    pub platforms: Vec<Platform>,
    pub invocation: InvocationKeys,
}

/// Why an action has no route.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RouteError {
    /// The client must act.
    #[error("Failed to extract platform key: {0}")]
    Platform(#[from] UnsortedPlatform),
    /// The remote action router must be mended.
    #[error("Remote action router response does not contain an action with a platform")]
    NoPlatform,
    #[error("Malformed platform in remote action router response: {0}")]
    RemotePlatform(UnsortedPlatform),
    #[error("Malformed invocation key in remote action router response: {0}")]
    RemoteInvocation(#[from] InvocationKeysError),
}

impl Router {
    pub fn new(config: &Config) -> Self {
        let ignored = IgnoredProperties::new(&config.scheduling.ignored_platform_properties);
        let backends = config.action_router_backends.iter().filter_map(|backend| {
            Some(RoutingBackend {
                // The configuration's check refuses others.
                prefix: InstanceName::parse(&backend.instance_name_prefix).ok()?,
                platform: Platform::from(&backend.platform),
                rules: RoutingRules::new(&backend.action_router),
            })
        });
        Router {
            queues: QueueMatches::new(&config.predeclared_platform_queues),
            default: RoutingRules::new(&config.action_router),
            backends: backends.collect(),
            ignored,
        }
    }

    /// What to do next with an action of which so much is known.
    pub fn route(&self, facts: Facts<'_>) -> Result<Step<'_>, RouteError> {
        // Which router it is must not depend on what that router makes of the action.
        let Some(asked) = self.default.platform(&facts)? else {
            return Ok(Step::NeedsCommand);
        };
        let rules = self.rules(facts.instance, &self.ignored.strip(&asked));
        if let Some(endpoint) = &rules.remote {
            return match facts.answer {
                None => Ok(Step::NeedsAnswer {
                    endpoint,
                    request: Box::new(RouteActionRequest {
                        instance_name: facts.instance.as_str().to_owned(),
                        digest_function: facts.function.to_proto() as i32,
                        action: Some(facts.action.clone()),
                        request_metadata: Some(facts.metadata.clone()),
                    }),
                }),
                Some(answer) => Ok(Step::Done(self.answered(facts.instance, answer)?)),
            };
        }
        let Some(platform) = rules.platform(&facts)? else {
            return Ok(Step::NeedsCommand);
        };
        Ok(Step::Done(Route {
            action: None,
            platforms: self.candidates(facts.instance, &platform),
            invocation: invocation::extract(&rules.invocation, &facts),
        }))
    }

    /// All that may be asked.
    pub fn remotes(&self) -> impl Iterator<Item = &Endpoint> {
        let rules = self.backends.iter().map(|backend| &backend.rules);
        rules
            .chain([&self.default])
            .filter_map(|rules| rules.remote.as_ref())
    }

    /// The platform that a worker offers, as it is compared.
    pub fn offered(&self, platform: &Platform) -> Platform {
        self.ignored.strip(platform)
    }

    fn answered(
        &self,
        instance: &InstanceName,
        answer: &RouteActionResponse,
    ) -> Result<Route, RouteError> {
        let action = answer.action.as_ref().ok_or(RouteError::NoPlatform)?;
        let platform = action.platform.as_ref().ok_or(RouteError::NoPlatform)?;
        let platform = Platform::parse(Some(platform)).map_err(RouteError::RemotePlatform)?;
        Ok(Route {
            platforms: self.candidates(instance, &platform),
            invocation: invocation::answered(&answer.invocation_keys)?,
            action: Some(action.clone()),
        })
    }

    fn candidates(&self, instance: &InstanceName, platform: &Platform) -> Vec<Platform> {
        let exact = self.ignored.strip(platform);
        let mut candidates = self.queues.of(instance, &exact);
        candidates.retain(|candidate| *candidate != exact);
        candidates.insert(0, exact);
        candidates
    }

    fn rules(&self, instance: &InstanceName, platform: &Platform) -> &RoutingRules {
        self.backends
            .iter()
            .filter(|backend| {
                backend.platform == *platform && instance.strip_prefix(&backend.prefix).is_some()
            })
            .max_by_key(|backend| backend.prefix.components().count())
            .map_or(&self.default, |backend| &backend.rules)
    }
}

impl RoutingRules {
    fn new(config: &ActionRouter) -> Self {
        RoutingRules {
            platform: config.platform_key_extractor,
            static_platform: Platform::from(&config.static_platform),
            invocation: config.invocation_key_extractors.clone(),
            remote: config.remote.0.clone(),
        }
    }

    /// `None` when the Command must be read for it.
    fn platform(&self, facts: &Facts<'_>) -> Result<Option<Platform>, UnsortedPlatform> {
        match (self.platform, &facts.action.platform, facts.command) {
            (PlatformKeyExtractor::Static, ..) => Ok(Some(self.static_platform.clone())),
            (PlatformKeyExtractor::Action, asked, _)
            | (PlatformKeyExtractor::ActionAndCommand, asked @ Some(_), _) => {
                Platform::parse(asked.as_ref()).map(Some)
            }
            (PlatformKeyExtractor::ActionAndCommand, None, None) => Ok(None),
            (PlatformKeyExtractor::ActionAndCommand, None, Some(command)) => {
                #[expect(deprecated, reason = "clients before REAPI 2.2 fill it")]
                let asked = command.platform.as_ref();
                Platform::parse(asked).map(Some)
            }
        }
    }
}
