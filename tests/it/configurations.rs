//! Right and wrong configurations: what `--check` says of each, and what a start makes of it.
//!
//! Each one is a drop-in for a configuration that is right, in a directory of its own.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::{
    Daemon, Farm, is_root,
    pki::{Authority, Leaf},
};

/// What is to be said, and done. The words are those that tell an administrator what is wrong.
#[derive(Clone, Copy, Debug)]
enum Expect {
    /// `--check` finds nothing, and a start complains of nothing.
    Good,
    /// Neither goes on.
    Refused(&'static str),
    /// `--check` refuses it; a start says the same, and goes on.
    Warned(&'static str),
    /// `--check` refuses it; a start waits for what is missing.
    Waits(&'static str),
}
use Expect::{Good, Refused, Waits, Warned};

type Row = (&'static str, Expect);

const SCHEDULER: &[Row] = &[
    ("", Good),
    ("log.level = \"debug\"", Good),
    ("[log]\nlevel = \"error\"", Good),
    ("storage.embedded.maximum_size = \"64MiB\"", Good),
    ("storage.embedded.maximum_size = \"1 GB\"", Good),
    ("scheduling.default_execution_timeout = \"1h 30min\"", Good),
    ("scheduling.worker_task_retry_count = 0", Good),
    ("scheduling.default_platform = {}", Good),
    ("scheduling.maximum_message_size = \"64MiB\"", Good),
    (
        "scheduling.idle_worker_synchronization_interval = \"1s\"",
        Good,
    ),
    (
        "clients.tls = { certificate = \"{dir}/server.pem\", key = \"{dir}/server.key\", client_ca = \"{dir}/ca.pem\" }",
        Good,
    ),
    (
        "clients.tls.certificate = \"{dir}/server.pem\"",
        Refused("of no use without clients.tls.key"),
    ),
    (
        "workers.tls = { certificate = \"{dir}/server.pem\", key = \"{dir}/late.key\" }",
        Refused("late.key: it is not the key of the certificate in"),
    ),
    (
        "workers.tls = { certificate = \"{dir}/file\", key = \"{dir}/late.key\" }",
        Refused("it has no certificate in PEM"),
    ),
    (
        "clients.tls = { certificate = \"{dir}/server.pem\", key = \"{dir}/none\" }",
        Refused("/none: could not be read: No such file"),
    ),
    (
        "clients.tls = { certificate = \"{dir}/late.pem\", key = \"{dir}/late.key\" }",
        Warned("late.pem: the certificate of \"OU=Builds,CN=localhost\" has expired at 20"),
    ),
    (
        "clients.tls = { certificate = \"{dir}/early.pem\", key = \"{dir}/early.key\" }",
        Warned("is not valid before 20"),
    ),
    (
        "clients.tls = { certificate = \"{dir}/nameless.pem\", key = \"{dir}/nameless.key\" }",
        Warned("it names no host (subjectAltName)"),
    ),
    (
        "clients.tls = { certificate = \"{dir}/server.pem\", key = \"{dir}/open.key\" }",
        Warned(
            "open.key: its mode is 0644, so that everybody on this host can use the key; chmod o= ",
        ),
    ),
    (
        "clients.tls.client_ca = \"{dir}/ca.pem\"",
        Refused("set clients.tls.certificate too"),
    ),
    (
        "clients.tls = { certificate = \"server.pem\", key = \"server.key\" }",
        Refused("must begin with /"),
    ),
    (
        "storage.tls.ca = \"{dir}/ca.pem\"",
        Refused("write \"grpcs://\" in place of \"grpc://\""),
    ),
    (
        "clients.tls.client_certificates = \"maybe\"",
        Refused("\"required\" or \"optional\""),
    ),
    (
        "[[grants]]\nwho = [\"user:root\", \"anyone\"]\nmay = [\"execute\"]\nwhere = [\"a/b\"]",
        Good,
    ),
    (
        "[[grants]]\nwho = [\"cn:x\"]\nmay = [\"execute\"]",
        Refused("\"cn:x\" can match nobody, since no port asks for certificates"),
    ),
    (
        "[[grants]]\nwho = [\"user:nobody-has-this-name\"]\nmay = [\"execute\"]",
        Warned("this host has no user of that name"),
    ),
    (
        "[[grants]]\nwho = [\"name:x\"]\nmay = [\"execute\"]",
        Refused("is no attribute of callers; write \"user\", \"group\""),
    ),
    (
        "[[grants]]\nwho = [\"anyone\"]\nmay = [\"exekute\"]",
        Refused("did you mean \"execute\"?"),
    ),
    (
        "[[grants]]\nwho = [\"anyone\"]\nmay = [\"execute\", \"see\"]\nwhere = [\"a\"]",
        Refused("\"see\" is about all instances"),
    ),
    (
        "[[grants]]\nwho = [\"anyone\"]\nmay = [\"see\"]\n[[grants]]\nwho = [\"uid:0\"]\nmay = [\"see\"]",
        Refused("number 1 decides all that this one says"),
    ),
    (
        "tokens = { key_set = \"{dir}/keys.json\", audiences = [\"farm\"] }",
        Good,
    ),
    (
        "tokens.key_set = \"{dir}/keys.json\"",
        Refused("tokens that were issued for other services would count here"),
    ),
    (
        "tokens = { key_set = \"{dir}/ca.pem\", audiences = [\"farm\"] }",
        Refused("it is no JSON Web Key Set"),
    ),
    (
        "tokens = { key_set = \"{dir}/none.json\", audiences = [\"farm\"] }",
        Refused("none.json: could not be read: No such file"),
    ),
    (
        "tokens = { key_set = \"{dir}/open.json\", audiences = [\"farm\"] }",
        Warned("can read the secret in it, and so be anybody; chmod o-r "),
    ),
    (
        "tokens = { key_set = \"{dir}/writable.json\", audiences = [\"farm\"] }",
        Warned("can write it, and so be anybody; chmod o-w "),
    ),
    (
        "tokens = { key_set = \"{dir}/kinds.json\", audiences = [\"farm\"] }",
        Warned(
            "kinds.json: the key \"short\" is a secret of less than 32 bytes, which can be guessed",
        ),
    ),
    (
        "tokens = { key_set = \"{dir}/useless.json\", audiences = [\"farm\"] }",
        Refused("key number 1 is for encryption, not for signatures"),
    ),
    (
        "callers = { requests_per_second = 500, bytes_per_second = \"100MiB\" }",
        Good,
    ),
    (
        "callers.maximum_calls = 999",
        Refused("less than 1000 are not enough"),
    ),
    (
        "callers.bytes_per_second = \"1KiB\"",
        Refused("no build would go on; write \"100MiB\""),
    ),
    (
        "storage.authorization_file = \"{dir}/none\"",
        Refused("/none: could not be read: No such file"),
    ),
    (
        "storage.authorization_file = \"{dir}/ca.pem\"",
        Refused("it is not a file with one token"),
    ),
    (
        "storage.add_metadata = [{ header = \"x-team\", values = [\"builds\"] }]",
        Good,
    ),
    (
        "storage.add_metadata = [{ header = \"X Team\", values = [\"builds\"] }]",
        Refused("is no name of a header; it is of a-z"),
    ),
    (
        "storage.add_metadata = [{ header = \"grpc-timeout\", values = [\"1S\"] }]",
        Refused("is said by gRPC itself; take it out"),
    ),
    (
        "storage = { authorization_file = \"{dir}/keys.json\", add_metadata = [{ header = \"authorization\", values = [\"Bearer x\"] }] }",
        Refused("is what storage.authorization_file is for; keep one"),
    ),
    (
        "tokens.audiences = [\"farm\"]",
        Refused("without keys no token counts"),
    ),
    (
        "[[grants]]\nwho = [\"claim.groups:x\"]\nmay = [\"execute\"]",
        Refused("can match nobody, since no token counts; set tokens.key_set"),
    ),
    ("shutdown.drain_timeout = \"0s\"", Good),
    ("shutdown.drain_timeout = \"80s\"", Good),
    ("clients.listen = \"unix:{dir}/clients.sock\"", Good),
    ("clients.listen = \"127.0.0.1:0\"", Good),
    ("storage.embedded.directory = \"{dir}/not/yet\"", Good),
    // Misspelt.
    (
        "clients.listn = \"127.0.0.1:1\"",
        Refused("did you mean listen?"),
    ),
    (
        "[client]\nlisten = \"127.0.0.1:1\"",
        Refused("did you mean clients?"),
    ),
    (
        "storage.embeded.directory = \"/x\"",
        Refused("did you mean embedded?"),
    ),
    (
        "maximum_size = \"1GiB\"",
        Refused("did you mean storage.embedded.maximum_size?"),
    ),
    (
        "storage.embedded.maximumSizeBytes = 1",
        Refused("did you mean maximum_size?"),
    ),
    (
        "[scheduling]\ndrain_timeout = \"1s\"",
        Refused("did you mean shutdown.drain_timeout?"),
    ),
    (
        "[scheduling]\nxyzzy = 1",
        Refused("there is no key xyzzy in [scheduling]; there are"),
    ),
    (
        "log.level = \"verbose\"",
        Refused("write \"error\", \"warn\", \"info\", \"debug\" or \"trace\""),
    ),
    ("log.level = \"inof\"", Refused("did you mean \"info\"?")),
    // Of another type.
    (
        "storage.embedded.maximum_size = 10",
        Refused("is the number 10; write a size with its unit"),
    ),
    (
        "storage.embedded.maximum_size = \"10\"",
        Refused("\"10\" is no size"),
    ),
    (
        "storage.embedded.maximum_size = \"10 parsecs\"",
        Refused("is no size"),
    ),
    (
        "storage.embedded.maximum_size = \"-1GiB\"",
        Refused("is no size"),
    ),
    (
        "storage.embedded.maximum_size = \"99999999TiB\"",
        Refused("more than 16 EiB"),
    ),
    (
        "scheduling.worker_task_retry_count = -1",
        Refused("write a whole number from 0"),
    ),
    (
        "scheduling.worker_task_retry_count = \"9\"",
        Refused("without quotes"),
    ),
    (
        "scheduling.worker_task_retry_count = 9.5",
        Refused("write a whole number"),
    ),
    (
        "scheduling.worker_task_retry_count = 99999999999",
        Refused("to 4294967295"),
    ),
    (
        "scheduling.default_platform = \"linux\"",
        Refused("KEY = VALUE"),
    ),
    (
        "scheduling.default_platform = { OSFamily = 1 }",
        Refused("write a text in quotes"),
    ),
    ("storage = \"embedded\"", Refused("write [storage]")),
    (
        "[[shutdown]]\ndrain_timeout = \"1s\"",
        Refused("single brackets"),
    ),
    ("log = \"debug\"", Refused("write [log]")),
    ("log.level = true", Refused("log.level is true; write")),
    (
        "scheduling.default_execution_timeout = 60",
        Refused("a duration with its unit"),
    ),
    (
        "scheduling.default_execution_timeout = \"60\"",
        Refused("a duration with its unit"),
    ),
    (
        "scheduling.default_execution_timeout = \"soon\"",
        Refused("a duration with its unit"),
    ),
    (
        "scheduling.default_execution_timeout = \"-1s\"",
        Refused("a duration with its unit"),
    ),
    (
        "scheduling.maximum_execution_timeout = \"1000000 years\"",
        Refused("more than ten years"),
    ),
    // No TOML.
    ("clients.listen = 127.0.0.1:8980", Refused("not TOML")),
    ("[clients\nlisten = 1", Refused("not TOML")),
    ("= 5", Refused("not TOML")),
    (
        "log.level = \"info\"\nlog.level = \"warn\"",
        Refused("not TOML: duplicate key"),
    ),
    ("log.level = \"info", Refused("not TOML")),
    // Addresses.
    ("clients.listen = \"8980\"", Refused("is no address; write")),
    (
        "clients.listen = \"localhost:8980\"",
        Refused("is no address; write"),
    ),
    (
        "clients.listen = \"unix:x.sock\"",
        Refused("is not absolute"),
    ),
    (
        "workers.listen = \"127.0.0.1:{clients}\"",
        Refused("clients.listen has the same port"),
    ),
    (
        "workers.listen = \"0.0.0.0:{clients}\"",
        Refused("clients.listen has the same port"),
    ),
    (
        "workers.listen = \"192.0.2.1:{clients}\"",
        Refused("must be one of this host's"),
    ),
    (
        "workers.listen = \"127.0.0.1:{busy}\"",
        Refused("listens there; stop it, or choose another"),
    ),
    (
        "workers.listen = \"unix:{dir}/none/x.sock\"",
        Refused("create the directory"),
    ),
    (
        "workers.listen = \"unix:{dir}/file\"",
        Refused("workers.listen"),
    ),
    // Storage.
    ("storage.cas = \"grpc://127.0.0.1:1\"", Waits("storage.cas")),
    (
        "storage.action_cache = \"grpc://127.0.0.1:1\"",
        Waits("storage.action_cache"),
    ),
    (
        "storage.cas = \"shards\"",
        Refused("there are no storage.shards"),
    ),
    (
        "storage.shards = [{ name = \"a\", endpoints = [\"grpc://127.0.0.1:1\"] }]",
        Refused("write cas = \"shards\""),
    ),
    (
        "storage.cas = \"shards\"\nstorage.shards = [{ name = \"a\", endpoints = [\"grpc://127.0.0.1:1\"] }]",
        Waits("shard a at grpc://127.0.0.1:1"),
    ),
    (
        "storage.cas = \"shards\"\nstorage.shards = [{ endpoints = [\"grpc://127.0.0.1:1\"] }]",
        Refused("a name of its own"),
    ),
    (
        "storage.cas = \"shards\"\nstorage.shards = [{ name = \"a\", endpoints = [] }]",
        Refused("up to 8 that mirror each other"),
    ),
    (
        "storage.cas = \"shards\"\nstorage.shards = [{ name = \"a\", weight = 0, endpoints = [\"grpc://127.0.0.1:1\"] }]",
        Refused("from 1 to 1000000"),
    ),
    (
        "storage.cas = \"shards\"\nstorage.shards = [{ name = \"a\", endpoints = [\"grpc://127.0.0.1:{clients}\"] }]",
        Refused("this scheduler's own port"),
    ),
    ("storage.health.faults = 0", Refused("3 is a good start")),
    (
        "storage.embedded = { maximum_size = \"64MiB\", instance_limits = [{ instance_name_prefix = \"a\", maximum_size = \"16MiB\" }] }",
        Good,
    ),
    (
        "[[storage.embedded.instance_limits]]\ninstance_name_prefix = \"a\"",
        Refused("less than 16MiB cannot hold the outputs of a build"),
    ),
    (
        "[[storage.embedded.instance_limits]]\nmaximum_size = \"1TiB\"",
        Refused("it exceeds storage.embedded.maximum_size"),
    ),
    (
        "storage.embedded.instance_limits = [{ maximum_size = \"16MiB\" }, { maximum_size = \"17MiB\" }]",
        Refused("\"\" has a limit already"),
    ),
    (
        "storage.embedded.instance_limits = [{ instance_name_prefix = \"a//b\", maximum_size = \"16MiB\" }]",
        Refused("two in a row"),
    ),
    (
        "storage.cas = \"grpc://127.0.0.1:1\"\nstorage.action_cache = \"grpc://127.0.0.1:1\"\nstorage.embedded.instance_limits = [{ maximum_size = \"16MiB\" }]",
        Refused("there is no store to limit"),
    ),
    (
        "storage.health.timeout = \"1ms\"",
        Refused("less than 100ms"),
    ),
    (
        "storage.cas = \"grpc://127.0.0.1:1\"\nstorage.action_cache = \"grpc://127.0.0.1:1\"",
        Waits("storage.cas"),
    ),
    (
        "storage.cas = \"grpc://127.0.0.1:{clients}\"\nstorage.action_cache = \"grpc://127.0.0.1:{clients}\"",
        Refused("this scheduler's own port"),
    ),
    ("storage.cas = \"grpcs://a:1\"", Waits("storage.cas")),
    ("storage.cas = \"http://a:1/\"", Refused("grpc://")),
    ("storage.cas = \"embeded\"", Refused("or \"embedded\"")),
    // Object stores and Redis.
    ("storage.cas = \"s3\"", Refused("write storage.s3.bucket")),
    (
        "storage.cas = \"azure\"\nstorage.azure.container = \"c\"",
        Refused("write storage.azure.account"),
    ),
    ("storage.s3.bucket = \"b\"", Refused("write cas = \"s3\"")),
    (
        "storage.cas = \"redis\"\nstorage.redis.endpoint = \"127.0.0.1:1\"",
        Refused("redis://redis.example:6379"),
    ),
    (
        "storage.cas = \"s3\"\nstorage.s3 = { bucket = \"b\", endpoint = \"http://127.0.0.1:1\", prefix = \"/a\" }",
        Refused("such as \"farm/builds\""),
    ),
    (
        "storage.cas = \"s3\"\nstorage.s3 = { bucket = \"b\", endpoint = \"http://127.0.0.1:1\", credentials_file = \"key\" }",
        Refused("must begin with /"),
    ),
    (
        "storage.cas = \"s3\"\nstorage.s3 = { bucket = \"b\", endpoint = \"http://127.0.0.1:1\", secret_access_key = \"x\" }",
        Refused("there is no key secret_access_key"),
    ),
    (
        "storage.action_cache = \"redis\"\nstorage.redis.endpoint = \"redis://127.0.0.1:1\"",
        Waits("storage.redis"),
    ),
    (
        "storage.cas = \"redis\"\nstorage.redis.username = \"u\"",
        Refused("storage.redis.password_file"),
    ),
    (
        "storage.embedded.maximum_size = \"0B\"",
        Refused("less than 16MiB"),
    ),
    (
        "storage.embedded.maximum_size = \"100000TiB\"",
        Warned("more than the whole disk"),
    ),
    (
        "storage.embedded.directory = \"storage\"",
        Refused("write an absolute path"),
    ),
    (
        "storage.embedded.directory = \"/\"",
        Refused("others have files there"),
    ),
    (
        "storage.embedded.directory = \"/home\"",
        Refused("others have files there"),
    ),
    (
        "storage.embedded.directory = \"{dir}/../x\"",
        Refused("without .."),
    ),
    (
        "storage.embedded.directory = \"{dir}/file\"",
        Refused("storage.embedded.directory"),
    ),
    // Intervals of nothing, and others that cannot be meant.
    (
        "scheduling.default_execution_timeout = \"0s\"",
        Refused("would fail at once"),
    ),
    (
        "scheduling.maximum_execution_timeout = \"0s\"",
        Refused("every action would be refused"),
    ),
    (
        "scheduling.execution_update_interval = \"0s\"",
        Refused("without end"),
    ),
    (
        "scheduling.operation_with_no_waiters_timeout = \"0s\"",
        Refused("would not find its result"),
    ),
    (
        "scheduling.abandoned_operation_timeout = \"0s\"",
        Refused("would find its action cancelled"),
    ),
    ("scheduling.lost_worker_retry_count = 0", Good),
    ("scheduling.action_cache_lookup = false", Good),
    (
        "scheduling.worker_invocation_stickiness_limits = [\"1s\", \"3s\"]",
        Good,
    ),
    (
        "scheduling.limits.queued_operations = 0",
        Refused("nothing would be let in; write how many"),
    ),
    ("scheduling.limits.kept_results = 0", Good),
    ("scheduling.ignored_platform_properties = [\"*\"]", Good),
    (
        "scheduling.ignored_platform_properties = [\"a*b\"]",
        Refused("is no pattern; write a property's name"),
    ),
    (
        "state.listen = \"127.0.0.1:{clients}\"",
        Refused("clients.listen has the same port"),
    ),
    (
        "web.listen = \"127.0.0.1:{clients}\"",
        Refused("give each a port of its own, such as 127.0.0.1:7982"),
    ),
    (
        "web.url = \"farm.example\"",
        Refused("it must begin with http:// or https://"),
    ),
    ("web.url = \"https://farm.example/\"", Good),
    (
        "state.directory = \"/etc\"",
        Refused("choose a directory of its own, such as /var/lib/bb-scheduler/state"),
    ),
    (
        "state.directory = \"{dir}/storage/state\"",
        Refused("one of them is in the other; choose a directory"),
    ),
    (
        "action_router.static_platform = { a = \"1\" }",
        Refused("set that, or take this out"),
    ),
    (
        "action_router.invocation_key_extractors = [\"tool_invocation_id\", \"tool_invocation_id\"]",
        Refused("name each once"),
    ),
    (
        "action_router.invocation_key_extractors = [\"user\"]",
        Refused("tool_invocation_id"),
    ),
    (
        "action_router.invocation_key_extractors = [\"authenticated_user\"]",
        Good,
    ),
    ("scheduling.minimum_priority = -2147483648", Good),
    (
        "scheduling.minimum_priority = 1",
        Refused("write 0 or below"),
    ),
    (
        "scheduling.maximum_priority = -1",
        Refused("write 0 or above"),
    ),
    ("action_router.remote = \"grpc://127.0.0.1:1\"", Good),
    ("action_router.remote = \"x\"", Refused("or \"\" for none")),
    (
        "[[action_router_backends]]\ninstance_name_prefix = \"a/b\"\naction_router = { invocation_key_extractors = [] }",
        Good,
    ),
    (
        "[[action_router_backends]]\ninstance_name_prefix = \"blobs\"",
        Refused("write \"\" for all instance names"),
    ),
    (
        "[[action_router_backends]]\n[[action_router_backends]]",
        Refused("keep one of them"),
    ),
    (
        "[[predeclared_platform_queues]]\nplatform = { cpus = \"16\" }\nsize_classes = [1, 4]\nat_least = [\"cpus\"]\nany_value = [\"image\"]",
        Good,
    ),
    (
        "[[predeclared_platform_queues]]\n[[predeclared_platform_queues]]",
        Refused("list all size_classes there"),
    ),
    (
        "[[predeclared_platform_queues]]\nsize_classes = [4, 1]",
        Refused("in ascending order"),
    ),
    (
        "[[predeclared_platform_queues]]\nsize_classes = []",
        Refused("[0] where workers have none"),
    ),
    (
        "[[predeclared_platform_queues]]\nsize_classes = [0, 1]",
        Refused("each is above 0"),
    ),
    (
        "[[predeclared_platform_queues]]\nplatform = { \"resources:cpu\" = \"1\" }",
        Refused("is ignored by scheduling.ignored_platform_properties"),
    ),
    (
        "[[predeclared_platform_queues]]\nplatform = { cpus = \"many\" }\nat_least = [\"cpus\"]",
        Refused("has no number for \"cpus\"; write how much"),
    ),
    (
        "[[predeclared_platform_queues]]\nplatform = { cpus = \"1\" }\nat_least = [\"cpus\"]\nany_value = [\"cpus\"]",
        Refused("is in any_value, too; keep one"),
    ),
    (
        "[[predeclared_platform_queues]]\nplatforms = {}",
        Refused("did you mean platform?"),
    ),
    (
        "scheduling.busy_worker_synchronization_interval = \"0s\"",
        Refused("without end"),
    ),
    (
        "scheduling.idle_worker_synchronization_interval = \"0s\"",
        Refused("without end"),
    ),
    (
        "scheduling.worker_with_no_synchronizations_timeout = \"0s\"",
        Refused("taken for dead"),
    ),
    (
        "scheduling.worker_with_no_synchronizations_timeout = \"500ms\"",
        Refused("taken for dead"),
    ),
    (
        "\"clients.listen\" = \"127.0.0.1:1\"",
        Refused("write clients.listen without quotes"),
    ),
    (
        "scheduling.platform_queue_with_no_workers_timeout = \"0s\"",
        Refused("last worker"),
    ),
    (
        "scheduling.default_execution_timeout = \"5h\"",
        Refused("it exceeds scheduling.maximum"),
    ),
    (
        "scheduling.maximum_message_size = \"0B\"",
        Refused("Actions would not fit"),
    ),
    (
        "scheduling.maximum_message_size = \"65MiB\"",
        Refused("mistake of its client"),
    ),
    (
        "scheduling.default_platform = { \"\" = \"x\" }",
        Refused("needs a name"),
    ),
    (
        "shutdown.drain_timeout = \"90s\"",
        Warned("TimeoutStopSec="),
    ),
    ("shutdown.drain_timeout = \"1h\"", Warned("TimeoutStopSec=")),
];

const WORKER: &[Row] = &[
    ("", Good),
    (
        "cache.maximum_size = \"1GiB\"\ncache.maximum_files = 1000",
        Good,
    ),
    ("storage.browser_url = \"https://browser.example/\"", Good),
    ("storage.download_concurrency = 1", Good),
    (
        "runners = [{ endpoint = \"unix:{dir}/runner.sock\", concurrency = 16 }]",
        Good,
    ),
    (
        "runners = [{ endpoint = \"unix:{dir}/runner.sock\", concurrency = 1, platform = {} }, \
         { endpoint = \"unix:{dir}/runner.sock\", concurrency = 1, inputs = \"private\" }]",
        Good,
    ),
    (
        "cache.maximum_sise = \"1GiB\"",
        Refused("did you mean maximum_size?"),
    ),
    (
        "[cache]\nbuild_directory = \"/x\"",
        Refused("above the first line with brackets"),
    ),
    ("[runners]\nconcurrency = 1", Refused("write [[runners]]")),
    (
        "runners = [{ conccurency = 1 }]",
        Refused("did you mean concurrency?"),
    ),
    ("runners = []", Refused("at least one [[runners]]")),
    (
        "runners = [1]",
        Refused("an item of runners is the number 1"),
    ),
    (
        "runners = [{ concurrency = -1 }]",
        Refused("write a whole number"),
    ),
    ("runners = [{ concurrency = 501 }]", Refused("at most 500")),
    (
        "runners = [{ endpoint = \"unix:{dir}/runner.sock\", concurrency = 17 }]",
        Warned("bb_runner.toml has 16; lower it"),
    ),
    (
        "runners = [{ inputs = \"copied\" }]",
        Refused("write \"shared\", \"hardlinks\" or \"private\""),
    ),
    (
        "runners = [{ platform = { \"\" = \"x\" } }]",
        Refused("needs a name"),
    ),
    (
        "runners = [{ worker_id = { \"\" = \"x\" } }]",
        Refused("needs a name"),
    ),
    (
        "runners = [{ environment_variables = { \"a=b\" = \"x\" } }]",
        Refused("cannot be a variable"),
    ),
    (
        "runners = [{ environment_variables = { A = 1 } }]",
        Refused("write a text in quotes"),
    ),
    (
        "runners = [{ instance_name_prefix = \"a//b\" }]",
        Refused("runners.instance_name_prefix"),
    ),
    (
        "runners = [{ size_class = -1 }]",
        Refused("write a whole number"),
    ),
    (
        "runners = [{}, {}]",
        Refused("every action would run twice"),
    ),
    (
        "runners = [{ worker_id = { a = \"1\" } }, { worker_id = { a = \"1\" } }]",
        Refused("every action would run twice"),
    ),
    (
        "runners = [{ endpoint = \"unix:{dir}/nobody.sock\" }]",
        Waits("is bb_runner running"),
    ),
    (
        "scheduler.endpoint = \"grpc://127.0.0.1:1\"",
        Waits("does not serve workers"),
    ),
    (
        "scheduler.endpoint = \"grpc://127.0.0.1:{clients}\"",
        Waits("what answers there is something else; set it to the workers' port"),
    ),
    (
        "scheduler.endpoint = \"127.0.0.1\"",
        Refused("is no endpoint; write"),
    ),
    (
        "storage.cas = \"grpc://127.0.0.1:{workers}\"\nstorage.action_cache = \"grpc://127.0.0.1:{workers}\"",
        Waits("is no Content Addressable Storage"),
    ),
    ("storage.download_concurrency = 0", Refused("at least 1")),
    (
        "storage.upload_concurrency = 1000000000",
        Refused("no storage serves more"),
    ),
    (
        "storage.maximum_message_size = \"0B\"",
        Refused("from \"64KiB\" to \"1GiB\""),
    ),
    ("storage.browser_url = \"browser\"", Refused("http://")),
    (
        "storage.force_upload_trees_and_directories = \"yes\"",
        Refused("write true or false"),
    ),
    (
        "cache.maximum_size = \"0B\"",
        Refused("the inputs of no action would fit"),
    ),
    (
        "cache.maximum_files = 0",
        Refused("the inputs of no action would fit"),
    ),
    (
        "cache.maximum_directories_size = \"0B\"",
        Refused("the input root of no action"),
    ),
    (
        "cache.maximum_size = \"100000TiB\"",
        Warned("more than the whole disk"),
    ),
    (
        "cache.minimum_free = \"100000TiB\"",
        Warned("more than the whole disk"),
    ),
    (
        "cache.directory = \"cache\"",
        Refused("write an absolute path"),
    ),
    (
        "cache.directory = \"/\"",
        Refused("choose a directory of its own"),
    ),
    (
        "cache.directory = \"{dir}/file\"",
        Refused("cache.directory"),
    ),
    (
        "build_directory = \"/home\"",
        Refused("choose a directory of its own"),
    ),
    (
        "build_directory = \"/tmp\"",
        Refused("choose a directory of its own"),
    ),
    (
        "build_directory = \"{dir}/worker/cache/build\"",
        Refused("neither inside nor around"),
    ),
    (
        "build_directory = \"{dir}/worker\"",
        Refused("neither inside nor around"),
    ),
    (
        "build_directory = \"{dir}/worker/other\"",
        Warned("give both the same build_directory"),
    ),
    (
        "build_directory = \"{dir}/papers\"",
        Refused("no worker made"),
    ),
    (
        "build_directory = \"/dev/shm/bb-unmade-build\"",
        Refused("/dev/shm/bb-unmade-build and cache.directory"),
    ),
    (
        "shutdown.drain_timeout = \"10min\"",
        Warned("TimeoutStopSec="),
    ),
];

const RUNNER: &[Row] = &[
    ("", Good),
    ("root = \"input\"", Good),
    ("clean_temporary_directories = [\"{dir}/clean\"]", Good),
    ("run_command_cleaner = [\"true\"]", Good),
    ("emulator = [\"/usr/bin/env\"]", Good),
    ("writable_directories = [\"{dir}/clean\"]", Good),
    ("limits.memory = \"0B\"\nlimits.processors = 2", Good),
    ("socket_mode = \"0600\"", Good),
    ("additional_groups = [\"0\"]", Good),
    ("lisen = \"unix:/x\"", Refused("did you mean listen?")),
    (
        "listen = \"127.0.0.1:1\"",
        Refused("callers are known by their Unix user"),
    ),
    (
        "listen = \"unix:{dir}/none/x.sock\"",
        Refused("create the directory"),
    ),
    ("socket_mode = 660", Refused("socket_mode")),
    ("socket_mode = \"0999\"", Refused("is no file mode")),
    (
        "socket_mode = \"0600\"\nallowed_users = [\"1\"]",
        Warned("cannot connect"),
    ),
    (
        "socket_group = \"no-such-group\"",
        Refused("there is no group"),
    ),
    (
        "additional_groups = [\"no-such-group\"]",
        Refused("there is no group"),
    ),
    (
        "allowed_users = [\"no-such-user\"]",
        Waits("there is no user"),
    ),
    (
        "allowed_users = \"bb-worker\"",
        Refused("write a list in brackets"),
    ),
    (
        "build_directory = \"build\"",
        Refused("write an absolute path"),
    ),
    (
        "build_directory = \"/home\"",
        Refused("choose a directory of its own"),
    ),
    ("build_directory = \"{dir}/none\"", Waits("could not find")),
    (
        "build_directory = \"{dir}/closed/build\"",
        Waits("chmod o+x"),
    ),
    ("users.first = 0", Refused("belong to the system")),
    ("users.count = 0", Refused("at least one user")),
    ("users.count = 501", Refused("at most 500")),
    ("users = { first = 65530, count = 8 }", Refused("nobody")),
    (
        "users = { first = 61200, count = 8 }",
        Refused("DynamicUser"),
    ),
    ("users.first = 5000000000", Refused("to 4294967295")),
    (
        "root = \"/no/such/root\"",
        Refused("unpack a root file system"),
    ),
    (
        "root = \"{dir}/clean\"",
        Refused("must have a directory proc"),
    ),
    ("root = \"image\"", Refused("is no root")),
    (
        "root = \"input\"\ncontainment.mounts = \"off\"",
        Refused("takes containment.mounts"),
    ),
    (
        "emulator = [\"/no/such/emulator\"]",
        Warned("could not be found"),
    ),
    ("emulator = [\"qemu\"]", Warned("whole path")),
    ("emulator = [\"{dir}/file\"]", Warned("chmod +x")),
    ("emulator = [\"\"]", Refused("write a program first")),
    (
        "run_command_cleaner = [\"/no/such/cleaner\"]",
        Warned("could not be found"),
    ),
    (
        "run_command_cleaner = [\"no-such-cleaner\"]",
        Warned("there is no such program"),
    ),
    (
        "writable_directories = [\"/no/such/directory\"]",
        Warned("create it, or leave it out"),
    ),
    (
        "writable_directories = [\"x\"]",
        Refused("write an absolute path"),
    ),
    ("writable_directories = [\"/\"]", Refused("/ is everything")),
    (
        "clean_temporary_directories = [\"/home\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"/\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"/var/lib\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"{dir}\"]",
        Refused("cannot be without"),
    ),
    (
        "clean_temporary_directories = [\"{dir}/link\"]",
        Refused("leads to /etc"),
    ),
    (
        "clean_temporary_directories = [\"{dir}/none\"]",
        Warned("create it, or leave it out"),
    ),
    (
        "readiness_checking_pathnames = [\"/no/such\"]",
        Waits("could not find /no/such"),
    ),
    (
        "containment.mounts = \"on\"",
        Refused("write \"auto\", \"require\" or \"off\""),
    ),
    (
        "containment.network = \"off\"",
        Refused("write \"auto\", \"none\" or \"host\""),
    ),
    (
        "containment.hidden_paths = [\"/usr\"]",
        Refused("no command runs without /usr"),
    ),
    ("limits.processes = 3", Refused("at least 16")),
    ("limits.processes = 5000000", Refused("at most 4194304")),
    (
        "limits.processors = -1.0",
        Refused("write a number such as 2.0"),
    ),
    (
        "limits.processors = nan",
        Refused("write a number such as 2.0"),
    ),
    ("limits.memory = \"1MiB\"", Refused("less than 16MiB")),
    (
        "limits.log_size = \"100000TiB\"",
        Warned("more than the whole disk"),
    ),
    (
        "set_tmpdir_environment_variable = 1",
        Refused("write true or false"),
    ),
    (
        "termination_grace = \"60s\"\nshutdown.drain_timeout = \"60s\"",
        Warned("TimeoutStopSec="),
    ),
];

/// Put before the log of a start whose exit code is not that of a wrong configuration.
const NOT_TOLD: &str = "not EX_CONFIG:";

/// A program with its configuration, where drop-ins are put.
struct Trial<'d> {
    program: &'static str,
    directory: &'d Path,
    name: &'static str,
}

/// Killed when a row does not go as it should.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Trial<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command
            .arg("--config")
            .arg(self.directory.join(format!("{}.toml", self.name)))
            .stdin(Stdio::null());
        command
    }

    /// Whether `--check` is content, and what it said on standard error.
    fn check(&self) -> (bool, String) {
        let output = self.command().arg("--check").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        match output.status.code() {
            Some(0) => (true, said),
            Some(78) => (false, said),
            other => panic!("{other:?}: {said}"),
        }
    }

    /// Whether a start came up, and what it logged until then.
    fn start(&self) -> (bool, String) {
        let place = self.directory.join("notify");
        let _ = fs::remove_file(&place);
        let notify = UnixDatagram::bind(&place).unwrap();
        notify
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let log = self.directory.join("trial.log");
        let mut running = Running(
            self.command()
                .env("NOTIFY_SOCKET", &place)
                .stdout(Stdio::null())
                .stderr(fs::File::create(&log).unwrap())
                .spawn()
                .unwrap(),
        );
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut buffer = [0; 4096];
        let came_up = loop {
            if let Ok(length) = notify.recv(&mut buffer)
                && String::from_utf8_lossy(&buffer[..length]).contains("READY=1")
            {
                break true;
            }
            if let Some(status) = running.0.try_wait().unwrap() {
                let log = fs::read_to_string(&log).unwrap();
                // Else systemd would start it again and again.
                let is_told = status.code() == Some(78);
                let log = if is_told {
                    log
                } else {
                    format!("{NOT_TOLD} {log}")
                };
                return (false, log);
            }
            assert!(Instant::now() < deadline, "neither ready nor gone");
        };
        if came_up {
            // SAFETY: the number is that of a child that was not waited for.
            unsafe { libc::kill(running.0.id() as i32, libc::SIGTERM) };
            running.0.wait().unwrap();
        }
        (came_up, fs::read_to_string(&log).unwrap())
    }

    /// What is not as it should be.
    fn judge(&self, text: &str, expect: Expect) -> Vec<String> {
        let drop_ins = self.directory.join(format!("{}.toml.d", self.name));
        fs::create_dir_all(&drop_ins).unwrap();
        let drop_in = drop_ins.join("50.toml");
        fs::write(&drop_in, text).unwrap();
        let mut wrong = Vec::new();
        let mut must = |right: bool, what: &str, said: &str| {
            if !right {
                wrong.push(format!("{} with {text:?}: {what}: {said}", self.name));
            }
        };
        let (good, said) = self.check();
        let (came_up, log) = self.start();
        let warns = |words: &str| {
            log.lines()
                .any(|line| line.contains("WARN") && line.contains(words))
        };
        match expect {
            Good => {
                must(good, "wrongly bad", &said);
                must(came_up, "does not start", &log);
                must(!warns(".toml"), "complains at the start", &log);
            }
            Refused(words) | Warned(words) | Waits(words) => {
                must(!good, "wrongly good", &said);
                must(said.contains(words), words, &said);
                // Where it is wrong: the drop-in and a line of it, or a key at its default.
                let place = format!("{}:", drop_in.display());
                let has_place = said.contains(&place) || matches!(expect, Waits(_));
                must(has_place, "no file and line", &said);
                for foreign in [
                    "u32",
                    "u64",
                    "usize",
                    "f64",
                    "struct ",
                    "invalid type",
                    "expected ",
                ] {
                    must(!said.contains(foreign), "not in words of people", &said);
                }
            }
        }
        match expect {
            Good => {}
            Refused(words) => {
                must(!came_up && !log.starts_with(NOT_TOLD), "starts", &log);
                must(log.contains(words), "a start says something else", &log);
            }
            Warned(words) => must(came_up && warns(words), "a start does not warn", &log),
            Waits(_) => must(came_up, "does not start", &log),
        }
        fs::remove_file(&drop_in).unwrap();
        wrong
    }

    fn judge_all(&self, rows: &[Row], fill: impl Fn(&str) -> String) {
        let wrong: Vec<String> = rows
            .iter()
            .flat_map(|(text, expect)| self.judge(&fill(text), *expect))
            .collect();
        assert!(
            wrong.is_empty(),
            "{} diagnostics:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
    }
}

/// What rows name: a file, a directory to empty, a link to a vital one, one that is closed.
fn furnish(directory: &Path) {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(directory.join("file"), "").unwrap();
    for name in ["clean", "build", "closed", "closed/build"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    std::os::unix::fs::symlink("/etc", directory.join("link")).unwrap();
    let closed = fs::Permissions::from_mode(0o700);
    fs::set_permissions(directory.join("closed"), closed).unwrap();
}

#[test]
fn there_are_117_configurations_and_more() {
    assert!(SCHEDULER.len() + WORKER.len() + RUNNER.len() >= 117);
}

#[test]
fn of_each_configuration_of_the_scheduler_check_says_what_a_start_makes_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    furnish(path);
    let free = || {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        (socket.local_addr().unwrap().port().to_string(), socket)
    };
    let (busy, _held) = free();
    let ((clients, first), (workers, second)) = (free(), free());
    drop((first, second));
    let dir = path.display().to_string();
    let text = format!(
        "clients.listen = \"127.0.0.1:{clients}\"\nworkers.listen = \"127.0.0.1:{workers}\"\n\
         state.listen = \"unix:{dir}/state.sock\"\n\
         web.listen = \"unix:{dir}/web.sock\"\n\
         storage.embedded.directory = \"{dir}/storage\"\nstorage.embedded.maximum_size = \"32MiB\"\n"
    );
    fs::write(path.join("bb_scheduler.toml"), text).unwrap();
    let authority = Authority::new(path, "ca");
    for (name, valid, names) in [
        ("server", (-60, 86400), &["localhost"][..]),
        ("late", (-7200, -3600), &["localhost"]),
        ("early", (3600, 7200), &["localhost"]),
        ("nameless", (-60, 86400), &[]),
    ] {
        let leaf = Leaf {
            valid,
            alternative_names: names,
            ..Default::default()
        };
        authority.issue(path, name, &leaf);
    }
    let (secret, short) = ("A".repeat(43), "A".repeat(40));
    let good = format!(r#"{{"kty":"oct","k":"{secret}"}}"#);
    let wrong = format!(r#"{{"kty":"oct","kid":"short","k":"{short}"}}"#);
    let other = format!(r#"{{"kty":"oct","k":"{secret}","use":"enc"}}"#);
    for (name, keys, mode) in [
        ("keys", &good, 0o640),
        ("open", &good, 0o644),
        ("writable", &good, 0o662),
        ("kinds", &format!("{good},{wrong}"), 0o640),
        ("useless", &other, 0o640),
    ] {
        let file = path.join(format!("{name}.json"));
        fs::write(&file, format!(r#"{{"keys":[{keys}]}}"#)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::copy(path.join("server.key"), path.join("open.key")).unwrap();
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(path.join("open.key"), open).unwrap();
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_scheduler"),
        directory: path,
        name: "bb_scheduler",
    };
    trial.judge_all(SCHEDULER, |text| {
        text.replace("{dir}", &dir)
            .replace("{clients}", &clients)
            .replace("{busy}", &busy)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn of_each_configuration_of_the_worker_check_says_what_a_start_makes_of_it() {
    if !is_root() {
        return;
    }
    let mut farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let limit = Duration::from_secs(60);
    farm.terminate(Daemon::Worker, limit).unwrap();
    let path = farm.path().to_owned();
    fs::write(path.join("file"), "").unwrap();
    let papers = path.join("papers/letter");
    fs::create_dir(papers.parent().unwrap()).unwrap();
    fs::write(&papers, "").unwrap();
    let (dir, clients) = (path.display().to_string(), farm.port());
    let workers = clients + 1;
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_worker"),
        directory: &path,
        name: "bb_worker",
    };
    tokio::task::block_in_place(|| {
        trial.judge_all(WORKER, |text| {
            text.replace("{dir}", &dir)
                .replace("{clients}", &clients.to_string())
                .replace("{workers}", &workers.to_string())
        });
    });
    assert!(papers.exists());
    assert!(!Path::new("/dev/shm/bb-unmade-build").exists());
}

#[test]
fn of_each_configuration_of_the_runner_check_says_what_a_start_makes_of_it() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    furnish(path);
    let dir = path.display().to_string();
    let first = 2_100_000_000 + std::process::id() % 50_000 * 40;
    let text = format!(
        "listen = \"unix:{dir}/runner.sock\"\nbuild_directory = \"{dir}/build\"\n\
         allowed_users = []\nusers = {{ first = {first}, count = 8 }}\n"
    );
    fs::write(path.join("bb_runner.toml"), text).unwrap();
    let trial = Trial {
        program: env!("CARGO_BIN_EXE_bb_runner"),
        directory: path,
        name: "bb_runner",
    };
    trial.judge_all(RUNNER, |text| text.replace("{dir}", &dir));
}

#[test]
fn what_the_daemon_itself_holds_is_good_and_what_another_holds_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let free = || {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap().port()
    };
    let text = format!(
        "clients.listen = \"127.0.0.1:{1}\"\nworkers.listen = \"unix:{0}/workers.sock\"\n\
         state.listen = \"unix:{0}/state.sock\"\n\
         web.listen = \"unix:{0}/web.sock\"\n\
         storage.embedded = {{ directory = \"{0}/storage\", maximum_size = \"32MiB\" }}\n",
        path.display(),
        free(),
    );
    for name in ["bb_scheduler.toml", "other.toml"] {
        fs::write(path.join(name), &text).unwrap();
    }
    let scheduler = |config: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bb_scheduler"));
        command.arg("--config").arg(path.join(config));
        command
    };
    let place = path.join("notify");
    let notify = UnixDatagram::bind(&place).unwrap();
    let mut running = Running(
        scheduler("bb_scheduler.toml")
            .env("NOTIFY_SOCKET", &place)
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut buffer = [0; 4096];
    while let Ok(length) = notify.recv(&mut buffer) {
        if String::from_utf8_lossy(&buffer[..length]).contains("READY=1") {
            break;
        }
    }
    let output = scheduler("bb_scheduler.toml").arg("--check").output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let process = format!("bb_scheduler (process {}", running.0.id());
    assert_eq!(said.matches(&process).count(), 5, "{said}");

    let output = scheduler("other.toml").arg("--check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert_eq!(said.matches(&process).count(), 5, "{said}");
    assert!(
        said.contains("bb_scheduler.toml) listens there; stop it"),
        "{said}"
    );
    running.0.kill().unwrap();
}
