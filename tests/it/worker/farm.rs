//! A worker's executor between a real store and a runner that runs commands as they are, all in
//! one process, on real file systems.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use bb_remote_execution::{
    config::{
        Duration as ConfiguredDuration, Endpoint, Size,
        scheduler::Embedded,
        storage::InstanceLimit,
        worker::{Inputs, Outputs},
    },
    daemon::{self, Services},
    digest::{Digest, DigestFunction},
    instance::InstanceName,
    proto::{
        reapi::{self, Action, Command, ExecuteResponse},
        runner::{
            CheckReadinessRequest, RunRequest, RunResponse,
            runner_client::RunnerClient,
            runner_server::{Runner, RunnerServer},
        },
    },
    storage::{Backend, Content, embedded::Store, serve},
    worker::{
        availability::Availability,
        browser_link::BrowserUrl,
        execute::{ExecutionPhase, Executor},
        inputs::{
            InputRoots, WorkerBuildDirectory,
            directory_cache::DirectoryCache,
            file_cache::{CacheLimits, FileCache},
        },
        task::AssignedTask,
    },
};
use prost::Message;
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

pub const FUNCTION: DigestFunction = DigestFunction::Sha256;

/// Calls of each method, in the order of their arrival.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<String>>>);

impl Calls {
    fn add(&self, path: &str) {
        let method = path.rsplit('/').next().unwrap_or_default();
        self.0.lock().unwrap().push(method.to_owned());
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

pub struct Farm {
    /// Cache and build directory.
    pub directory: tempfile::TempDir,
    _store: tempfile::TempDir,
    pub client: Backend,
    pub executor: Arc<Executor>,
    pub cache: Arc<FileCache>,
    pub calls: Calls,
    failing: Arc<Mutex<Option<tonic::Code>>>,
    runner: Endpoint,
    stop: CancellationToken,
}

impl Drop for Farm {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Clone, Copy)]
pub struct Settings {
    pub limits: CacheLimits,
    pub entries: u64,
    pub inputs: Inputs,
    /// Of all outputs of an action.
    pub outputs_size: u64,
    /// What the storage keeps of uploads, if it limits that.
    pub stored: Option<Size>,
    /// What the runner answers to every Run.
    pub failing: Option<tonic::Code>,
    /// Of a runner of another kind.
    pub group: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            limits: CacheLimits {
                bytes: 1 << 30,
                files: 1 << 20,
                minimum_free: 0,
            },
            entries: 64 << 20,
            inputs: Inputs::Shared,
            outputs_size: 1 << 30,
            stored: None,
            failing: None,
            group: None,
        }
    }
}

impl Farm {
    pub async fn start() -> Self {
        Self::start_with(Settings::default()).await
    }

    pub async fn start_with(settings: Settings) -> Self {
        Self::start_in(&std::env::temp_dir(), settings).await
    }

    /// Its runner says that it is ready, and fails every action.
    pub async fn start_failing(code: tonic::Code) -> Self {
        Self::start_with(Settings {
            failing: Some(code),
            ..Settings::default()
        })
        .await
    }

    pub fn mend_runner(&self) {
        *self.failing.lock().unwrap() = None;
    }

    /// What the worker has is in `place`; the store is elsewhere.
    pub async fn start_in(place: &Path, settings: Settings) -> Self {
        let directory = tempfile::tempdir_in(place).unwrap();
        let store_directory = tempfile::tempdir().unwrap();
        let limit = settings.stored.map(|maximum_size| InstanceLimit {
            instance_name_prefix: String::new(),
            maximum_size,
        });
        let embedded = Embedded {
            directory: store_directory.path().to_owned(),
            maximum_size: Size::gib(1),
            minimum_free: Size(0),
            instance_limits: limit.into_iter().collect(),
        };
        let store = tokio::task::spawn_blocking(move || Store::open_configured(&embedded).unwrap());
        let store = Arc::new(store.await.unwrap());
        let calls = Calls::default();
        let stop = CancellationToken::new();
        let capabilities = serve::capabilities(serve::Announcement {
            storage: Some(Backend::Embedded(store.clone())),
            ..Default::default()
        });
        let services = Services::default().add(capabilities);
        let routes = serve::add_to(services, &Backend::Embedded(store.clone())).into_routes();
        let storage = serve(routes, Some(calls.clone()), stop.clone()).await;
        let client = Backend::connect(&storage, &storage, Default::default());
        let failing = Arc::new(Mutex::new(settings.failing));
        let runner = Plain {
            build_directory: directory.path().join("build"),
            failing: failing.clone(),
        };
        let runner = Routes::new(RunnerServer::new(runner));
        let runner = serve(runner, None, stop.clone()).await;
        let (executor, cache) = executor(directory.path(), &client, &runner, settings).unwrap();
        Farm {
            directory,
            _store: store_directory,
            client,
            executor,
            cache,
            calls,
            failing,
            runner,
            stop,
        }
    }

    /// Ends the worker and starts another one on the same directories.
    pub async fn restart(&mut self, settings: Settings) {
        let nowhere = self.directory.path().join("nowhere");
        fs::create_dir_all(&nowhere).unwrap();
        let (other, cache) = executor(&nowhere, &self.client, &self.runner, settings).unwrap();
        self.cache = cache;
        self.executor = other;
        // What cleans in the background holds the directories' locks a little longer, as does a process
        // that is being started and has yet to exec.
        let mut attempts = 0;
        let (executor, cache) = loop {
            let opened = executor(self.directory.path(), &self.client, &self.runner, settings);
            match opened {
                Ok(opened) => break opened,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempts < 1000 => {
                    attempts += 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        self.executor = executor;
        self.cache = cache;
    }

    pub async fn upload(&self, data: impl Into<bytes::Bytes>) -> reapi::Digest {
        let data = data.into();
        let digest = FUNCTION.digest_of(&data);
        self.client
            .upload(&InstanceName::empty(), vec![(digest, Content::Bytes(data))])
            .await
            .unwrap();
        digest.to_proto()
    }

    pub async fn upload_message(&self, message: &impl Message) -> reapi::Digest {
        self.upload(message.encode_to_vec()).await
    }

    pub async fn read(&self, digest: &Option<reapi::Digest>) -> Vec<u8> {
        let digest = Digest::parse_required(Some(FUNCTION), digest.as_ref()).unwrap();
        let instance = InstanceName::empty();
        let read = self.client.read(&instance, &digest, 1 << 30);
        read.await.unwrap().to_vec()
    }

    pub async fn read_message<M: Message + Default>(&self, digest: &Option<reapi::Digest>) -> M {
        M::decode(&*self.read(digest).await).unwrap()
    }

    /// A root with files of these contents; those with a `!` in front are executable.
    pub async fn root(&self, files: &[(&str, &str)]) -> reapi::Digest {
        let mut directories: BTreeMap<String, reapi::Directory> = BTreeMap::new();
        directories.insert(String::new(), reapi::Directory::default());
        for (path, content) in files {
            let (executable, path) = match path.strip_prefix('!') {
                Some(path) => (true, path),
                None => (false, *path),
            };
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            for (end, _) in parent.match_indices('/') {
                directories.entry(parent[..end].to_owned()).or_default();
            }
            directories
                .entry(parent.to_owned())
                .or_default()
                .files
                .push(reapi::FileNode {
                    name: name.to_owned(),
                    digest: Some(self.upload(content.to_string()).await),
                    is_executable: executable,
                    node_properties: None,
                });
        }
        let mut digests: HashMap<String, reapi::Digest> = HashMap::new();
        while let Some((path, directory)) = directories.pop_last() {
            let digest = self.upload_message(&directory).await;
            if path.is_empty() {
                return digest;
            }
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
            directories
                .entry(parent.to_owned())
                .or_default()
                .directories
                .push(reapi::DirectoryNode {
                    name: name.to_owned(),
                    digest: Some(digest.clone()),
                });
            digests.insert(path, digest);
        }
        unreachable!("the root comes last")
    }

    pub async fn task(&self, command: &Command, root: reapi::Digest) -> AssignedTask {
        let command = self.upload_message(command).await;
        self.task_of(Action {
            command_digest: Some(command),
            input_root_digest: Some(root),
            ..Default::default()
        })
    }

    pub fn task_of(&self, action: Action) -> AssignedTask {
        AssignedTask {
            instance: InstanceName::empty(),
            function: FUNCTION,
            digest: FUNCTION.digest_of(&action.encode_to_vec()),
            action,
            timeout: Duration::from_secs(60),
            queued_timestamp: None,
            auxiliary_metadata: Vec::new(),
            attempt: None,
            trace: None,
        }
    }

    pub async fn execute(&self, task: AssignedTask) -> ExecuteResponse {
        let (phase, _) = watch::channel(ExecutionPhase::FetchingInputs);
        let cancel = CancellationToken::new();
        self.executor.execute(0, task, &phase, &cancel).await
    }

    /// Runs a script in a root of these files.
    pub async fn shell(
        &self,
        script: &str,
        files: &[(&str, &str)],
        outputs: &[&str],
    ) -> ExecuteResponse {
        let root = self.root(files).await;
        let task = self.task(&shell(script, outputs), root).await;
        self.execute(task).await
    }

    pub async fn action_result(&self, task: &AssignedTask) -> Option<reapi::ActionResult> {
        self.client
            .action_result(&task.instance, &task.digest)
            .await
            .unwrap()
    }
}

pub fn shell(script: &str, outputs: &[&str]) -> Command {
    Command {
        arguments: ["sh", "-ec", script].map(str::to_owned).to_vec(),
        environment_variables: vec![reapi::command::EnvironmentVariable {
            name: "PATH".to_owned(),
            value: "/usr/bin:/bin".to_owned(),
        }],
        output_paths: outputs.iter().map(|path| path.to_string()).collect(),
        ..Default::default()
    }
}

fn executor(
    directory: &Path,
    client: &Backend,
    runner: &Endpoint,
    settings: Settings,
) -> io::Result<(Arc<Executor>, Arc<FileCache>)> {
    let cache = FileCache::open(&directory.join("cache"), settings.limits, client.clone())?;
    let cache = Arc::new(cache);
    let build_directory = WorkerBuildDirectory::open(&directory.join("build"), cache.clone(), 2)?;
    let executor = Executor {
        storage: client.clone(),
        inputs: InputRoots {
            storage: client.clone(),
            cache: cache.clone(),
            directories: Arc::new(DirectoryCache::new(
                client.clone(),
                16 << 20,
                settings.entries,
            )),
            build_directory,
            inputs: settings.inputs,
            group: settings.group,
        },
        runner: RunnerClient::new(daemon::connect(runner)),
        availability: Availability::new(runner),
        workers: vec![r#"{"hostname":"here"}"#.to_owned()],
        environment_variables: BTreeMap::from([("FROM_WORKER".to_owned(), "yes".to_owned())]),
        force_upload_trees_and_directories: false,
        outputs: Outputs {
            maximum_size: Size(settings.outputs_size),
            timeout: ConfiguredDuration::seconds(60),
        },
        browser_url: BrowserUrl::new("http://browser/"),
        metrics: Arc::default(),
        running: Arc::default(),
    };
    Ok((Arc::new(executor), cache))
}

async fn serve(routes: Routes, calls: Option<Calls>, stop: CancellationToken) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap().to_string());
    let count =
        tower::util::MapRequestLayer::new(move |request: tonic::codegen::http::Request<_>| {
            if let Some(calls) = &calls {
                calls.add(request.uri().path());
            }
            request
        });
    let server = tonic::transport::Server::builder()
        .layer(count)
        .add_routes(routes)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned());
    tokio::spawn(server);
    endpoint
}

/// A runner that runs commands as this user, and kills their process group when told to stop.
struct Plain {
    build_directory: PathBuf,
    failing: Arc<Mutex<Option<tonic::Code>>>,
}

#[tonic::async_trait]
impl Runner for Plain {
    async fn check_readiness(
        &self,
        request: Request<CheckReadinessRequest>,
    ) -> Result<Response<()>, Status> {
        match self.build_directory.join(&request.get_ref().path).is_dir() {
            true => Ok(Response::new(())),
            false => Err(Status::internal("no such directory")),
        }
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<RunResponse>, Status> {
        if let Some(code) = *self.failing.lock().unwrap() {
            return Err(Status::new(code, "no"));
        }
        let request = request.into_inner();
        let create = |path: &str| -> Result<Stdio, Status> {
            let file = fs::File::create_new(self.build_directory.join(path));
            file.map(Stdio::from)
                .map_err(|error| Status::internal(error.to_string()))
        };
        let action_directory = Path::new(&request.input_root_directory).parent().unwrap();
        let action_directory = fs::File::open(self.build_directory.join(action_directory)).unwrap();
        action_directory.lock().unwrap();
        let root = self.build_directory.join(&request.input_root_directory);
        let mut command = std::process::Command::new(&request.arguments[0]);
        command
            .args(&request.arguments[1..])
            .env_clear()
            .envs(&request.environment_variables)
            .env(
                "LOGS",
                self.build_directory.join(&request.server_logs_directory),
            )
            .env(
                "TMPDIR",
                self.build_directory.join(&request.temporary_directory),
            )
            .current_dir(root.join(&request.working_directory))
            .stdin(Stdio::null())
            .stdout(create(&request.stdout_path)?)
            .stderr(create(&request.stderr_path)?)
            .process_group(0);
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(|error| Status::invalid_argument(format!("cannot start: {error}")))?;
        let group = Group(child.id().unwrap());
        let status = child
            .wait()
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        drop(group);
        drop(action_directory);
        Ok(Response::new(RunResponse {
            exit_code: i64::from(status.code().unwrap_or(-status.signal().unwrap_or(1))),
            resource_usage: Vec::new(),
        }))
    }
}

/// Killed on drop.
struct Group(u32);

impl Drop for Group {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.0 as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    }
}
