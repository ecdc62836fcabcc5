//! Configurations of bb_scheduler.
//!
//! Long, since it is one table: who adds a key sees at once what is tried of those beside it.

use super::expect::{
    Expect::{Good, Refused, Waits, Warned},
    Row,
};

pub const SCHEDULER: &[Row] = &[
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
        Refused("nothing is stored for an instance name here"),
    ),
    (
        "storage.cas = \"redis\"\nstorage.action_cache = \"redis\"\nstorage.redis.endpoint = \"redis://127.0.0.1:1\"\nstorage.embedded.instance_limits = [{ maximum_size = \"16MiB\" }]",
        Refused("what is kept of another storage's blobs counts for nobody"),
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
        "storage.cas = \"s3\"\nstorage.s3 = { bucket = \"b\", endpoint = \"http://127.0.0.1:1/b\" }",
        Refused("the bucket has a key of its own"),
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
    ("scheduling.ended_call_timeout = \"0s\"", Good),
    ("scheduling.ended_call_timeout = \"1m\"", Good),
    (
        "scheduling.ended_call_timeout = 2",
        Refused("ended_call_timeout"),
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
