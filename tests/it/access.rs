//! Who may call what: every method, asked by nobody, by the wrong one and by the right one, over TLS,
//! plain TCP and Unix sockets.

use std::{collections::BTreeMap, path::Path, time::Duration};

use bb_remote_execution::{
    config::{
        self, Endpoint,
        tls::{ClientTls, ServerTls},
    },
    daemon::{self, Channel, Credentials, Lifecycle},
    proto::{
        self, bytestream,
        reapi::{self, capabilities_client::CapabilitiesClient},
        remoteworker::{CurrentState, SynchronizeRequest, current_state},
    },
    scheduler,
};
use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::harness::{
    Farm, Task, digest_of, is_ok, is_root,
    pki::{Authority, Leaf, Pair},
};

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

/// What a method is asked with, so that it gets as far as to ask whether it may.
fn request(path: &str) -> Bytes {
    let blob = digest_of(b"blob");
    let (hash, size) = (&blob.hash, blob.size_bytes);
    let written = format!("uploads/1/blobs/{hash}/{size}");
    let message = match path.rsplit('/').next().unwrap() {
        "Read" => bytestream::ReadRequest {
            resource_name: format!("blobs/{hash}/{size}"),
            ..Default::default()
        }
        .encode_to_vec(),
        "Write" => bytestream::WriteRequest {
            resource_name: written,
            ..Default::default()
        }
        .encode_to_vec(),
        "QueryWriteStatus" => bytestream::QueryWriteStatusRequest {
            resource_name: written,
        }
        .encode_to_vec(),
        "Synchronize" => SynchronizeRequest {
            current_state: Some(CurrentState {
                worker_state: Some(current_state::WorkerState::Idle(())),
            }),
            platform: Some(reapi::Platform::default()),
            ..Default::default()
        }
        .encode_to_vec(),
        _ => Vec::new(),
    };
    message.into()
}

/// One call, until its first answer or its end.
async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await?;
    let mut asked = Request::new(request(path));
    // Workers' calls are held.
    asked.set_timeout(Duration::from_millis(500));
    let answer = client.server_streaming(asked, path.parse().unwrap(), Raw);
    let mut stream = answer.await?.into_inner();
    stream.message().await.map(drop)
}

/// The paths of all methods that there are.
fn methods() -> Vec<String> {
    let mut paths = Vec::new();
    for set in [
        proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ] {
        for file in prost_types::FileDescriptorSet::decode(set).unwrap().file {
            for service in &file.service {
                for method in &service.method {
                    let service = format!("{}.{}", file.package(), service.name());
                    paths.push(format!("/{service}/{}", method.name()));
                }
            }
        }
    }
    paths
}

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
    move |_, _| {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        scheme(socket.local_addr().unwrap().to_string())
    }
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
            // What it names is not there, whoever asks.
            let is_unknown = path.ends_with("/WaitExecution") && code == Code::NotFound;
            let is_refused = match caller {
                Caller::Nobody => code == Code::Unauthenticated || code == Code::PermissionDenied,
                Caller::Wrong | Caller::Right => code == Code::PermissionDenied,
            };
            let is_elsewhere = code == Code::Unimplemented;
            let context = format!("{transport} {caller:?} {port} {path}: {said:?}");
            match caller {
                Caller::Nobody => assert!(is_refused || is_open, "{context}"),
                Caller::Wrong => {
                    assert!(
                        is_refused || is_open || is_unknown || is_elsewhere,
                        "{context}"
                    );
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
    let mut task = Task::shell("echo result");
    task.action.do_not_cache = false;
    assert!(is_ok(&client.run(&task).await));
    let action = client.prepare(&task).await.unwrap();
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
