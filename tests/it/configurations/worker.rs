//! Configurations of bb_worker.

use super::expect::{
    Expect::{Good, Refused, Waits, Warned},
    Row,
};

pub const WORKER: &[Row] = &[
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
