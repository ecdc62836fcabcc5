//! What is routed where.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{super::queue::InvocationKey, *};
use crate::{
    config::{
        OptionalEndpoint,
        routing::{ActionRouterBackend, PlatformQueue},
    },
    proto::{self, reapi::RequestMetadata},
};

fn properties(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn message(pairs: &[(&str, &str)]) -> reapi::Platform {
    let properties = pairs.iter().map(|(name, value)| reapi::platform::Property {
        name: (*name).to_owned(),
        value: (*value).to_owned(),
    });
    reapi::Platform {
        properties: properties.collect(),
    }
}

fn platform(pairs: &[(&str, &str)]) -> Platform {
    Platform::from(&properties(pairs))
}

fn action(pairs: &[(&str, &str)]) -> reapi::Action {
    reapi::Action {
        platform: Some(message(pairs)),
        ..Default::default()
    }
}

fn name(text: &str) -> InstanceName {
    InstanceName::parse(text).unwrap()
}

fn metadata() -> RequestMetadata {
    RequestMetadata {
        tool_invocation_id: "build".to_owned(),
        correlated_invocations_id: "project".to_owned(),
        target_id: "//:x".to_owned(),
        ..Default::default()
    }
}

fn user() -> AuthenticationMetadata {
    AuthenticationMetadata {
        public: Some(prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue("ann".to_owned())),
        }),
        private: Some(prost_types::Value::default()),
        ..Default::default()
    }
}

struct Asked {
    instance: InstanceName,
    action: reapi::Action,
    metadata: RequestMetadata,
    user: Option<AuthenticationMetadata>,
    address: Option<&'static str>,
    claimed: Option<InvocationKeys>,
    command: Option<reapi::Command>,
    answer: Option<RouteActionResponse>,
}

impl Asked {
    fn new(instance: &str, action: reapi::Action) -> Self {
        Asked {
            instance: name(instance),
            action,
            metadata: metadata(),
            user: None,
            address: None,
            claimed: None,
            command: None,
            answer: None,
        }
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            instance: &self.instance,
            function: DigestFunction::Sha256,
            action: &self.action,
            metadata: &self.metadata,
            user: self.user.as_ref(),
            address: self.address,
            claimed: self.claimed.as_ref(),
            command: self.command.as_ref(),
            answer: self.answer.as_ref(),
        }
    }

    fn route(&self, config: &Config) -> Route {
        match Router::new(config).route(self.facts()).unwrap() {
            Step::Done(route) => route,
            step => panic!("{step:?}"),
        }
    }
}

#[test]
fn an_action_without_a_platform_has_the_one_of_its_command() {
    let config = Config::default();
    let router = Router::new(&config);
    let mut asked = Asked::new("", reapi::Action::default());
    assert_eq!(router.route(asked.facts()), Ok(Step::NeedsCommand));
    #[expect(deprecated, reason = "clients of REAPI 2.0 use it")]
    let command = reapi::Command {
        platform: Some(message(&[("a", "1")])),
        ..Default::default()
    };
    asked.command = Some(command);
    assert_eq!(asked.route(&config).platforms, [platform(&[("a", "1")])]);
    let mut config = config;
    config.action_router.platform_key_extractor = PlatformKeyExtractor::Action;
    assert_eq!(asked.route(&config).platforms, [Platform::default()]);
    config.action_router.platform_key_extractor = PlatformKeyExtractor::Static;
    config.action_router.static_platform = properties(&[("b", "2")]);
    assert_eq!(asked.route(&config).platforms, [platform(&[("b", "2")])]);
}

#[test]
fn properties_are_sorted_by_name_then_value_and_names_may_repeat() {
    let router = Router::new(&Config::default());
    let route = |pairs: &[(&str, &str)]| {
        let asked = Asked::new("", action(pairs));
        router.route(asked.facts()).map(drop)
    };
    assert_eq!(route(&[("a", "1"), ("a", "2"), ("b", "0")]), Ok(()));
    for bad in [
        &[("b", ""), ("a", "")][..],
        &[("a", "2"), ("a", "1")],
        &[("a", "1"), ("a", "1")],
    ] {
        let error = route(bad).unwrap_err();
        assert!(matches!(error, RouteError::Platform(_)), "{error}");
    }
}

#[test]
fn what_bazel_sends_unasked_tells_no_platforms_apart() {
    let config = Config::default();
    let router = Router::new(&config);
    let sent = [
        ("OSFamily", "linux"),
        ("persistentWorkerKey", "0123"),
        ("persistentWorkerProtocol", "json"),
        ("requires-worker-protocol", "json"),
        ("resources:cpu", "10"),
    ];
    let linux = platform(&[("OSFamily", "linux")]);
    assert_eq!(
        Asked::new("", action(&sent)).route(&config).platforms,
        std::slice::from_ref(&linux)
    );
    assert_eq!(router.offered(&platform(&sent)), linux);
    let near = [("Resources:cpu", "10"), ("resources", "10")];
    assert_eq!(router.offered(&platform(&near)), platform(&near));
}

fn queue(prefix: &str, pairs: &[(&str, &str)], any: &[&str], least: &[&str]) -> PlatformQueue {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    PlatformQueue {
        instance_name_prefix: prefix.to_owned(),
        platform: properties(pairs),
        any_value: names(any),
        at_least: names(least),
        ..Default::default()
    }
}

#[test]
fn a_queue_may_take_any_value_and_smaller_numbers() {
    let config = Config {
        predeclared_platform_queues: vec![
            queue(
                "",
                &[("cpus", "16"), ("os", "linux")],
                &["image"],
                &["cpus"],
            ),
            queue("", &[("cpus", "4"), ("os", "linux")], &[], &["cpus"]),
            queue("a", &[("cpus", "8"), ("os", "linux")], &[], &["cpus"]),
        ],
        ..Default::default()
    };
    let to = |instance: &str, pairs: &[(&str, &str)]| {
        let route = Asked::new(instance, action(pairs)).route(&config);
        assert_eq!(
            route.platforms[0],
            platform(pairs),
            "exactly what is asked for is best"
        );
        let cpus = |platform: &Platform| platform.properties()[0].1.clone();
        route.platforms[1..].iter().map(cpus).collect::<Vec<_>>()
    };
    assert_eq!(to("", &[("cpus", "2"), ("os", "linux")]), ["4", "16"]);
    assert_eq!(
        to("a/b", &[("cpus", "2"), ("os", "linux")]),
        ["8", "4", "16"]
    );
    assert_eq!(to("", &[("cpus", "4.5"), ("os", "linux")]), ["16"]);
    assert_eq!(to("", &[("image", "x"), ("os", "linux")]), ["16"]);
    assert_eq!(to("", &[("os", "linux")]), ["4", "16"]);
    for none in [
        &[("cpus", "17"), ("os", "linux")][..],
        &[("cpus", "-1"), ("os", "linux")],
        &[("cpus", "inf"), ("os", "linux")],
        &[("cpus", "2"), ("os", "other")],
        &[("cpus", "2"), ("gpu", ""), ("os", "linux")],
    ] {
        assert_eq!(to("", none), [""; 0], "{none:?}");
    }
}

#[test]
fn levels_of_the_tree_are_those_of_the_extractors_and_a_user_only_where_there_is_one() {
    let keys = |asked: &Asked, config: &Config| -> Vec<prost_types::Any> {
        let route = asked.route(config);
        let keys = route.invocation.as_slice().iter();
        keys.map(InvocationKey::any).collect()
    };
    let tool = proto::pack(&RequestMetadata {
        tool_invocation_id: "build".to_owned(),
        ..Default::default()
    });
    let correlated = proto::pack(&RequestMetadata {
        correlated_invocations_id: "project".to_owned(),
        ..Default::default()
    });
    let public = proto::pack(&AuthenticationMetadata {
        private: None,
        ..user()
    });
    let mut config = Config::default();
    let mut asked = Asked::new("", action(&[]));
    assert_eq!(keys(&asked, &config), std::slice::from_ref(&tool));
    asked.address = Some("192.0.2.1");
    let address = proto::pack(&AuthenticationMetadata {
        public: Some(prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue(
                "address:192.0.2.1".to_owned(),
            )),
        }),
        ..Default::default()
    });
    assert_eq!(keys(&asked, &config), [address, tool.clone()]);
    config.action_router.invocation_key_extractors[0] = InvocationKeyExtractor::AuthenticatedUser;
    assert_eq!(keys(&asked, &config), std::slice::from_ref(&tool));
    config = Config::default();
    asked.user = Some(user());
    assert_eq!(
        keys(&asked, &config),
        [public.clone(), tool.clone()],
        "and nothing private"
    );
    config.action_router.invocation_key_extractors = vec![
        InvocationKeyExtractor::CorrelatedInvocationsId,
        InvocationKeyExtractor::ToolInvocationId,
    ];
    assert_eq!(keys(&asked, &config), [correlated, tool]);
    config.action_router.invocation_key_extractors.clear();
    assert_eq!(keys(&asked, &config), []);
    // Absent metadata is a key of its own, and a long one has a bound.
    config = Config::default();
    let mut asked = Asked::new("", action(&[]));
    asked.metadata = RequestMetadata::default();
    assert_eq!(
        keys(&asked, &config),
        [proto::pack(&RequestMetadata::default())]
    );
    asked.metadata.tool_invocation_id = "x".repeat(10_000);
    assert!(keys(&asked, &config)[0].value.len() < 200);
}

#[test]
fn an_operation_that_is_taken_up_keeps_its_keys_but_nobody_takes_another_users() {
    let key = |text: &str| {
        InvocationKey::new(&proto::pack(&RequestMetadata {
            tool_invocation_id: text.to_owned(),
            ..Default::default()
        }))
    };
    let of_user = |name: &str| {
        InvocationKey::new(&proto::pack(&AuthenticationMetadata {
            public: Some(prost_types::Value {
                kind: Some(prost_types::value::Kind::StringValue(name.to_owned())),
            }),
            ..Default::default()
        }))
    };
    let config = Config::default();
    let mut asked = Asked::new("", action(&[]));
    asked.metadata = RequestMetadata::default();
    asked.claimed = Some(InvocationKeys::new([of_user("bob"), key("before")]));
    assert_eq!(asked.route(&config).invocation.as_slice(), [key("before")]);
    asked.user = Some(user());
    let own = [of_user("ann"), key("before")];
    assert_eq!(asked.route(&config).invocation.as_slice(), own);
    // Made up: more than there are levels, or too large.
    asked.claimed = Some(InvocationKeys::new((0..100).map(|_| key("x"))));
    assert_eq!(asked.route(&config).invocation.as_slice().len(), 2);
    asked.claimed = Some(InvocationKeys::new([key(&"x".repeat(2000))]));
    assert_eq!(asked.route(&config).invocation.as_slice()[1], key(""));
}

#[test]
fn the_router_is_that_of_the_longest_prefix_and_the_exact_platform() {
    let backend = |prefix: &str, pairs: &[(&str, &str)], to: &str| ActionRouterBackend {
        instance_name_prefix: prefix.to_owned(),
        platform: properties(pairs),
        action_router: ActionRouter {
            platform_key_extractor: PlatformKeyExtractor::Static,
            static_platform: properties(&[("to", to)]),
            ..Default::default()
        },
    };
    let config = Config {
        action_router_backends: vec![
            backend("", &[("a", "1")], "everywhere"),
            backend("x/y", &[("a", "1")], "deep"),
            backend("x", &[("a", "1")], "shallow"),
        ],
        ..Default::default()
    };
    for (instance, pairs, to) in [
        ("", &[("a", "1")][..], Some("everywhere")),
        ("x", &[("a", "1")], Some("shallow")),
        ("x/y/z", &[("a", "1"), ("resources:cpu", "1")], Some("deep")),
        ("xx", &[("a", "1")], Some("everywhere")),
        ("x/y", &[("a", "2")], None),
    ] {
        let route = Asked::new(instance, action(pairs)).route(&config);
        let expected = to.map_or(platform(pairs), |to| platform(&[("to", to)]));
        assert_eq!(route.platforms, [expected], "{instance} {pairs:?}");
    }
}

#[test]
fn a_remote_router_may_change_the_action_and_must_name_platform_and_keys() {
    let mut config = Config::default();
    let endpoint: Endpoint = "grpc://router.example:1".parse().unwrap();
    config.action_router.remote = OptionalEndpoint(Some(endpoint.clone()));
    let router = Router::new(&config);
    let mut asked = Asked::new("x", action(&[("a", "1")]));
    let Ok(Step::NeedsAnswer {
        endpoint: to,
        request,
    }) = router.route(asked.facts())
    else {
        panic!("nobody is asked");
    };
    assert_eq!(*to, endpoint);
    assert_eq!(request.instance_name, "x");
    assert_eq!(request.action.as_ref(), Some(&asked.action));
    assert_eq!(request.request_metadata, Some(metadata()));
    let key = proto::pack(&metadata());
    let changed = reapi::Action {
        do_not_cache: true,
        ..action(&[("b", "2")])
    };
    let good = RouteActionResponse {
        action: Some(changed.clone()),
        invocation_keys: vec![key.clone()],
    };
    asked.answer = Some(good.clone());
    let route = asked.route(&config);
    assert_eq!(route.action, Some(changed.clone()));
    assert_eq!(route.platforms, [platform(&[("b", "2")])]);
    assert_eq!(route.invocation.as_slice(), [InvocationKey::new(&key)]);
    let large = prost_types::Any {
        value: vec![0; 2000],
        ..Default::default()
    };
    for bad in [
        RouteActionResponse::default(),
        RouteActionResponse {
            action: Some(reapi::Action::default()),
            ..good.clone()
        },
        RouteActionResponse {
            action: Some(action(&[("b", ""), ("a", "")])),
            ..good.clone()
        },
        RouteActionResponse {
            invocation_keys: vec![],
            ..good.clone()
        },
        RouteActionResponse {
            invocation_keys: vec![key; 9],
            ..good.clone()
        },
        RouteActionResponse {
            invocation_keys: vec![large],
            ..good.clone()
        },
    ] {
        asked.answer = Some(bad.clone());
        assert!(router.route(asked.facts()).is_err(), "{bad:?}");
    }
}

#[test]
fn a_timeout_is_the_actions_own_within_bounds_or_the_default() {
    let scheduling = Config::default().scheduling;
    let timeout = |seconds, nanos| {
        execution_timeout(Some(&prost_types::Duration { seconds, nanos }), &scheduling)
    };
    let default = scheduling.default_execution_timeout.get();
    assert_eq!(execution_timeout(None, &scheduling), Ok(default));
    assert_eq!(timeout(0, 0), Ok(default));
    assert_eq!(timeout(7, 5), Ok(std::time::Duration::new(7, 5)));
    let maximum = scheduling.maximum_execution_timeout.get();
    assert_eq!(timeout(maximum.as_secs() as i64, 0), Ok(maximum));
    for bad in [
        timeout(maximum.as_secs() as i64, 1),
        timeout(-1, 0),
        timeout(0, -1),
        timeout(0, 1_000_000_000),
    ] {
        assert!(bad.unwrap_err().to_string().contains("between 0 s and 4h"));
    }
}

proptest! {
    /// Routing is a function: nothing but its arguments matters, and dropping what is ignored beforehand
    /// changes nothing.
    #[test]
    fn ignored_properties_do_not_matter(
        kept in prop::collection::btree_map("[a-q]{1,3}", "[a-z]{0,2}", 0..6),
        ignored in prop::collection::btree_map("resources:[a-z]{0,3}", "[0-9]{1,2}", 0..6),
    ) {
        let all: BTreeMap<_, _> = kept.clone().into_iter().chain(ignored).collect();
        let asked = |from: &BTreeMap<String, String>| {
            let pairs: Vec<_> = from.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            Asked::new("", action(&pairs)).route(&Config::default())
        };
        prop_assert_eq!(asked(&all), asked(&kept));
    }
}
