//! Who may call what: every method, asked by nobody, by the wrong one and by the right one, over TLS,
//! plain TCP and Unix sockets.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use bb_remote_execution::{
    config::{
        self, Endpoint,
        tls::{ClientTls, ServerTls},
    },
    daemon::{self, Channel, Credentials, Lifecycle},
    proto::{
        self,
        reapi::{self, capabilities_client::CapabilitiesClient},
    },
    scheduler,
};
use tonic::{Code, Request, Status};

use crate::harness::{
    Client, Farm, Task, finished, free_address, is_ok, is_root,
    pki::{Authority, Leaf, Pair},
    scheduler_process::SchedulerProcess,
};
use methods::operation_name;
pub use methods::{call, methods};

mod methods;

/// A scheduler of this process, with both ports.
struct Scheduler {
    ports: [Endpoint; 2],
    lifecycle: Lifecycle,
    _directory: tempfile::TempDir,
}

impl Scheduler {
    /// `listen` is the address of the port of that name in the directory.
    async fn start(
        listen: impl Fn(&Path, &str) -> Endpoint,
        tls: &ServerTls,
        grants: &str,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let ports = ["clients", "workers"].map(|name| listen(path, name));
        let mut config: config::scheduler::Config = toml::from_str(grants).unwrap();
        let addresses = ports.clone().map(|port| {
            let text = port.to_string();
            let text = text
                .trim_start_matches("grpcs://")
                .trim_start_matches("grpc://");
            text.parse().unwrap()
        });
        [config.clients.listen, config.workers.listen] = addresses;
        config.state.listen = config::ListenAddress::Unix(path.join("state"));
        config.state.directory = path.join("drains");
        config.web.listen = config::ListenAddress::Unix(path.join("web"));
        config.clients.tls = tls.clone();
        config.workers.tls = tls.clone();
        config.storage.embedded.directory = path.join("storage");
        config.storage.embedded.maximum_size = config::Size::mib(64);
        let lifecycle = Lifecycle::new();
        let running = scheduler::run(config, lifecycle.clone());
        tokio::spawn(async move { running.await.unwrap() });
        Scheduler {
            ports,
            lifecycle,
            _directory: directory,
        }
    }

    fn channels(&self, credentials: &Credentials) -> [Channel; 2] {
        self.ports
            .each_ref()
            .map(|port| daemon::connect_with(port, credentials))
    }

    /// What each method says on each port.
    async fn ask(
        &self,
        credentials: &Credentials,
    ) -> BTreeMap<(usize, String), Result<(), Status>> {
        let mut said = BTreeMap::new();
        let health = "/grpc.health.v1.Health/Check";
        for (port, channel) in self.channels(credentials).iter().enumerate() {
            // It may still be starting.
            while let Err(status) = call(channel, health).await
                && status.code() == Code::Unavailable
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            for path in methods() {
                let answer = call(channel, &path).await;
                said.insert((port, path), answer);
            }
        }
        said
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.lifecycle.stop();
    }
}

/// Who is right may do everything, who is wrong the same elsewhere.
fn grants(right: &str, wrong: &str) -> String {
    let all = "[\"execute\", \"cas.read\", \"cas.write\", \"action_cache.read\", \"action_cache.write\", \
               \"work\", \"see\", \"steer\"]";
    let elsewhere = all.replace(", \"see\", \"steer\"", "");
    format!(
        "[[grants]]\nwho = [\"{wrong}\"]\nmay = {elsewhere}\nwhere = [\"elsewhere\"]\n\
         [[grants]]\nwho = [\"{right}\"]\nmay = {all}\n"
    )
}

fn free_port(scheme: fn(String) -> Endpoint) -> impl Fn(&Path, &str) -> Endpoint {
    move |_, _| scheme(free_address().to_string())
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Caller {
    Nobody,
    Wrong,
    Right,
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_is_refused_to_nobody_and_to_the_wrong_one_on_every_port() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let ca = Authority::new(path, "ca");
    let issue = |name| {
        let leaf = Leaf {
            name,
            ..Default::default()
        };
        ca.issue(path, name, &leaf)
    };
    let server = issue("server");
    let tls = ServerTls {
        certificate: server.certificate,
        key: server.key,
        client_ca: ca.certificate.clone(),
        client_certificates: config::tls::ClientCertificates::Optional,
        ..Default::default()
    };
    let with = |pair: Option<&Pair>| {
        let config = ClientTls {
            ca: ca.certificate.clone(),
            certificate: pair
                .map(|pair| pair.certificate.clone())
                .unwrap_or_default(),
            key: pair.map(|pair| pair.key.clone()).unwrap_or_default(),
            server_name: String::new(),
        };
        Credentials::of("tls", &config)
    };
    let none = Credentials::default();
    let own = format!("uid:{}", nix::unistd::geteuid());
    let off = ServerTls::default();
    let unix = |path: &Path, name: &str| Endpoint::Unix(path.join(format!("{name}.sock")));

    let encrypted = Scheduler::start(
        free_port(Endpoint::Tls),
        &tls,
        &grants("cn:right", "cn:wrong"),
    )
    .await;
    let plain = grants("cn:right", "cn:wrong");
    let plain = Scheduler::start(free_port(Endpoint::Tcp), &off, &plain).await;
    let right = Scheduler::start(unix, &off, &grants(&own, "uid:1")).await;
    let wrong = Scheduler::start(unix, &off, &grants("uid:1", &own)).await;
    let nobody = Scheduler::start(unix, &off, &grants("cn:right", "cn:wrong")).await;
    let mut served = 0;
    for (transport, caller, scheduler, credentials) in [
        ("TLS", Caller::Nobody, &encrypted, with(None)),
        (
            "TLS",
            Caller::Wrong,
            &encrypted,
            with(Some(&issue("wrong"))),
        ),
        (
            "TLS",
            Caller::Right,
            &encrypted,
            with(Some(&issue("right"))),
        ),
        ("plain", Caller::Nobody, &plain, none.clone()),
        ("Unix", Caller::Wrong, &nobody, none.clone()),
        ("Unix", Caller::Wrong, &wrong, none.clone()),
        ("Unix", Caller::Right, &right, none.clone()),
    ] {
        for ((port, path), said) in scheduler.ask(&credentials).await {
            let code = said.as_ref().map_or_else(Status::code, |()| Code::Ok);
            let text = said.as_ref().map_or_else(Status::message, |()| "");
            let is_open = path.starts_with("/grpc.health.v1.");
            let is_refused = match caller {
                Caller::Nobody => code == Code::Unauthenticated || code == Code::PermissionDenied,
                Caller::Wrong | Caller::Right => code == Code::PermissionDenied,
            };
            let is_elsewhere = code == Code::Unimplemented;
            let context = format!("{transport} {caller:?} {port} {path}: {said:?}");
            match caller {
                Caller::Nobody => assert!(is_refused || is_open, "{context}"),
                Caller::Wrong => {
                    assert!(is_refused || is_open || is_elsewhere, "{context}");
                }
                Caller::Right => {
                    let is_ours = !text.contains("nobody may call this method");
                    assert!(!is_refused || !is_ours, "{context}");
                    assert!(code != Code::Unauthenticated, "{context}");
                    served += usize::from(!is_elsewhere && is_ours);
                }
            }
            if is_refused {
                assert!(text.starts_with("Authorization: "), "{context}");
            }
            assert!(!text.contains("did not ask"), "{context}");
        }
    }
    assert!(served > 40, "{served}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_name_of_an_operation_gives_no_right() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let ca = Authority::new(path, "ca");
    let issue = |name| {
        let leaf = Leaf {
            name,
            ..Default::default()
        };
        ca.issue(path, name, &leaf)
    };
    let server = issue("server");
    let tls = ServerTls {
        certificate: server.certificate,
        key: server.key,
        client_ca: ca.certificate.clone(),
        client_certificates: config::tls::ClientCertificates::Optional,
        ..Default::default()
    };
    let text = "[[predeclared_platform_queues]]\nplatform = { OSFamily = \"linux\" }\n";
    let text = text.to_owned() + &grants("cn:right", "cn:wrong");
    let scheduler = Scheduler::start(free_port(Endpoint::Tls), &tls, &text).await;
    let client = |pair: Option<Pair>| {
        let pair = pair.map(|pair| (pair.certificate, pair.key));
        let (certificate, key) = pair.unwrap_or_default();
        let config = ClientTls {
            ca: ca.certificate.clone(),
            certificate,
            key,
            server_name: String::new(),
        };
        let [channel, _] = scheduler.channels(&Credentials::of("tls", &config));
        Client {
            channel,
            instance: String::new(),
        }
    };
    let (right, wrong) = (client(Some(issue("right"))), client(Some(issue("wrong"))));
    while call(&right.channel, "/grpc.health.v1.Health/Check")
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let task = Task::shell("exit 0");
    let action = right.prepare(&task).await.unwrap();
    let request = reapi::ExecuteRequest {
        action_digest: Some(action),
        ..Default::default()
    };
    let mut stream = right.execution().execute(request).await.unwrap();
    let name = stream.get_mut().message().await.unwrap().unwrap().name;
    let (uuid, _) = name.split_once('.').unwrap();
    let wait = async |client: &Client, name: &str| {
        let name = name.to_owned();
        let request = reapi::WaitExecutionRequest { name };
        let mut stream = client
            .execution()
            .wait_execution(request)
            .await?
            .into_inner();
        stream.message().await.map(drop)
    };
    wait(&right, &name).await.unwrap();
    wait(&right, uuid).await.unwrap();
    // The wrong one may do anything elsewhere: a name that says so leads to no operation of others.
    let elsewhere = operation_name("elsewhere", b"x", uuid.parse().unwrap());
    for (client, name, expected) in [
        (&wrong, name.as_str(), Code::PermissionDenied),
        (&wrong, uuid, Code::PermissionDenied),
        (&wrong, &elsewhere, Code::NotFound),
        (&client(None), &name, Code::Unauthenticated),
        (&client(None), &elsewhere, Code::Unauthenticated),
    ] {
        let status = wait(client, name).await.unwrap_err();
        assert_eq!(status.code(), expected, "{name}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_and_tokens_are_taken_up_by_a_reload_and_broken_ones_change_nothing() {
    let own = format!("uid:{}", nix::unistd::geteuid());
    let grant = |who: &str| format!("[[grants]]\nwho = [\"{who}\"]\nmay = [\"execute\"]\n");
    let (mine, others) = (grant(&own), grant("uid:4242"));
    let daemon = SchedulerProcess::start(&mine);
    daemon.says(0, "ready").await;
    let code = async || {
        let path = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
        let said = call(&daemon.channel(), path).await;
        said.map_or_else(|status| status.code(), |()| Code::Ok)
    };
    assert_eq!(code().await, Code::Ok);
    daemon.reload(&others, "reloaded key=grants").await;
    assert_eq!(code().await, Code::PermissionDenied);
    // One that is wrong, and one that names keys that are not there.
    daemon
        .reload("[[grants]]\nwho = [\"x\"]\n", "could not reload")
        .await;
    assert_eq!(code().await, Code::PermissionDenied);
    let keys = "tokens = { key_set = \"/nonexistent/keys\", audiences = [\"farm\"] }\n";
    daemon
        .reload(
            &(keys.to_owned() + &mine),
            "/nonexistent/keys: could not be read",
        )
        .await;
    assert_eq!(code().await, Code::PermissionDenied);
    let file = daemon.socket("keys");
    let secret = "A".repeat(43);
    fs::write(
        &file,
        format!(r#"{{"keys":[{{"kty":"oct","k":"{secret}"}}]}}"#),
    )
    .unwrap();
    let keys = keys.replace("/nonexistent/keys", file.to_str().unwrap());
    daemon
        .reload(&(keys.clone() + &mine), "reloaded key=tokens.key_set")
        .await;
    assert_eq!(code().await, Code::Ok);
    let mut shown = Request::new(reapi::GetCapabilitiesRequest::default());
    let value = "Bearer x".parse().unwrap();
    shown.metadata_mut().insert("authorization", value);
    let mut client = CapabilitiesClient::new(daemon.channel());
    let status = client.get_capabilities(shown).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    // Tokens count no longer.
    daemon.reload(&mine, "reloaded key=tokens.key_set").await;
    assert_eq!(code().await, Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_who_did_what() {
    use bb_remote_execution::proto::{
        buildqueuestate::{
            TerminateWorkersRequest, build_queue_state_client::BuildQueueStateClient,
        },
        longrunning::{CancelOperationRequest, operations_client::OperationsClient},
    };
    let own = format!("uid:{}", nix::unistd::geteuid());
    let daemon = SchedulerProcess::start(
        "[[predeclared_platform_queues]]\nplatform = { OSFamily = \"linux\" }\n",
    );
    daemon.says(0, "ready").await;
    let client = daemon.client();
    let action = client.prepare(&Task::shell("exit 0")).await.unwrap();
    let update = reapi::UpdateActionResultRequest {
        action_digest: Some(action.clone()),
        action_result: Some(reapi::ActionResult::default()),
        ..Default::default()
    };
    client
        .action_cache()
        .update_action_result(update)
        .await
        .unwrap();
    daemon.says(0, "an action result was written").await;
    let request = reapi::ExecuteRequest {
        action_digest: Some(action),
        skip_cache_lookup: true,
        ..Default::default()
    };
    let mut stream = client
        .execution()
        .execute(request)
        .await
        .unwrap()
        .into_inner();
    let name = stream.message().await.unwrap().unwrap().name;
    let mut operations = OperationsClient::new(daemon.channel());
    operations
        .cancel_operation(CancelOperationRequest { name })
        .await
        .unwrap();
    while stream.message().await.unwrap().is_some() {}
    let state = Endpoint::Unix(daemon.socket("state"));
    let request = TerminateWorkersRequest {
        worker_id_pattern: [("name".to_owned(), "w".to_owned())].into(),
    };
    let mut state = BuildQueueStateClient::new(daemon::connect(&state));
    state.terminate_workers(request).await.unwrap();
    let log = daemon.log();
    for words in [
        "an action result was written",
        "an operation was cancelled",
        "operation completed",
        "workers are to terminate",
    ] {
        let line = log.lines().find(|line| line.contains(words));
        let line = line.unwrap_or_else(|| panic!("{words}: {log}"));
        assert!(line.contains(&format!("client={own}")), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_is_told_what_he_may_do() {
    let own = format!("uid:{}", nix::unistd::geteuid());
    let text = format!(
        "[[grants]]\nwho = [\"{own}\"]\nmay = [\"execute\"]\nwhere = [\"a\"]\n\
         [[grants]]\nwho = [\"{own}\"]\nmay = [\"action_cache.write\"]\nwhere = [\"b\"]\n"
    );
    let unix = |path: &Path, name: &str| Endpoint::Unix(path.join(format!("{name}.sock")));
    let scheduler = Scheduler::start(unix, &ServerTls::default(), &text).await;
    scheduler.ask(&Credentials::default()).await;
    let [clients, _] = scheduler.channels(&Credentials::default());
    let told = async |instance: &str| {
        let request = reapi::GetCapabilitiesRequest {
            instance_name: instance.to_owned(),
        };
        let mut client = CapabilitiesClient::new(clients.clone());
        let said = client.get_capabilities(request).await?.into_inner();
        let cache = said.cache_capabilities.unwrap();
        Ok::<_, Status>((
            said.execution_capabilities.unwrap().exec_enabled,
            cache
                .action_cache_update_capabilities
                .unwrap()
                .update_enabled,
        ))
    };
    assert_eq!(told("a").await.unwrap(), (true, false));
    assert_eq!(told("b/c").await.unwrap(), (false, true));
    let status = told("c").await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let expected = format!("Authorization: {own} may not ");
    assert!(status.message().starts_with(&expected), "{status}");
}

/// The set-up of the manual: results come from workers alone.
#[tokio::test(flavor = "multi_thread")]
async fn clients_use_results_that_only_workers_may_write() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let grants = "[[grants]]\nwho = [\"cn:worker\"]\n\
                  may = [\"work\", \"cas.read\", \"cas.write\", \"action_cache.write\"]\n\
                  [[grants]]\nwho = [\"cn:client\"]\n\
                  may = [\"execute\", \"cas.read\", \"cas.write\", \"action_cache.read\"]\n";
    let farm = Farm::start_encrypted(Path::new("/var/tmp"), 2, directory.path(), grants).await;
    let client = farm.client();
    // So that Bazel does not even try.
    let told = CapabilitiesClient::new(client.channel.clone())
        .get_capabilities(reapi::GetCapabilitiesRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(told.execution_capabilities.unwrap().exec_enabled);
    let cache = told.cache_capabilities.unwrap();
    let update = cache.action_cache_update_capabilities.unwrap();
    assert!(!update.update_enabled);
    let mut task = Task::shell("echo result");
    task.action.do_not_cache = false;
    assert!(is_ok(&client.run(&task).await));
    let action = client.prepare(&task).await.unwrap();
    let again = reapi::ExecuteRequest {
        action_digest: Some(action.clone()),
        ..Default::default()
    };
    let mut stream = client
        .execution()
        .execute(again)
        .await
        .unwrap()
        .into_inner();
    let mut last = None;
    while let Some(operation) = stream.message().await.unwrap() {
        last = finished(&operation);
    }
    let response = last.unwrap();
    assert!(response.cached_result, "{response:?}");
    // Who asked for it is in the action's metadata, where Buildbarn has it.
    let metadata = response.result.unwrap().execution_metadata.unwrap();
    let user = metadata
        .auxiliary_metadata
        .iter()
        .find_map(proto::unpack::<proto::auth::AuthenticationMetadata>)
        .unwrap();
    let kind = user.public.unwrap().kind.unwrap();
    let name = prost_types::value::Kind::StringValue("cn:client".to_owned());
    assert_eq!(kind, name);
    let asked = reapi::GetActionResultRequest {
        action_digest: Some(action.clone()),
        ..Default::default()
    };
    let result = client
        .action_cache()
        .get_action_result(asked)
        .await
        .unwrap();
    let update = reapi::UpdateActionResultRequest {
        action_digest: Some(action),
        action_result: Some(result.into_inner()),
        ..Default::default()
    };
    let status = client
        .action_cache()
        .update_action_result(update)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(
        status.message(),
        "Authorization: cn:client may not \"action_cache.write\""
    );
}
