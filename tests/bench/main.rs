//! Benchmarks: each prints what it measured, and asserts nothing about time.
//!
//! usage: cargo bench --bench farm [-- NAME [ARGUMENT...]]

#![expect(unreachable_pub, reason = "nobody imports from a benchmark")]

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../harness/mod.rs"]
mod harness;

mod actions;
mod cas;
mod endpoint;
mod noop;
mod queue;
mod roots;
mod runs;
mod secure;
mod shards;
mod soak;
mod stores;
mod stream;
mod watched;
mod wire;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let (name, rest) = match arguments.split_first() {
        Some((name, rest)) => (name.as_str(), rest),
        None => ("all", &[][..]),
    };
    let mut known = false;
    for (benchmark, run) in [
        ("actions", actions::run as fn(&[String])),
        ("cas", cas::run),
        ("endpoint", endpoint::run),
        ("noop", noop::run),
        ("queue", queue::run),
        ("roots", roots::run),
        ("runs", runs::run),
        ("secure", secure::run),
        ("shards", shards::run),
        ("soak", soak::run),
        ("stores", stores::run),
        ("stream", stream::run),
        ("watched", watched::run),
        ("wire", wire::run),
    ] {
        if name == "all" || name == benchmark {
            known = true;
            run(rest);
        }
    }
    if !known {
        eprintln!(
            "no benchmark {name:?}; there are: actions, cas, endpoint, noop, queue, roots, runs, secure, shards, soak, stores, stream, watched, wire"
        );
        std::process::exit(2);
    }
}

/// What KEY=VALUE says.
fn number(arguments: &[String], key: &str, default: usize) -> usize {
    let given = arguments
        .iter()
        .find_map(|text| text.strip_prefix(key)?.strip_prefix('='));
    given.map_or(default, |text| text.parse().unwrap())
}
