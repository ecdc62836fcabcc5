//! What the runner requires of its host before it can serve: privileges, users and groups that exist, and
//! numbers for actions' users that nobody else has.

use std::{collections::BTreeSet, fs, ops::Range};

use super::proc_self_status;
use crate::{config::runner::Config, daemon::Failure};

/// The capabilities that the runner requires, or has use for (capabilities(7)). The loopback interface of a network
/// namespace takes CAP_NET_ADMIN besides, which the probe of that layer tells.
const CAPABILITIES: [(u32, &str); 8] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (3, "CAP_FOWNER"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    // Both for namespaces; `sandbox` says what is missing without them.
    (18, "CAP_SYS_CHROOT"),
    (21, "CAP_SYS_ADMIN"),
];
/// How many of them, the last ones, are for namespaces only.
const NAMESPACE_CAPABILITIES: usize = 2;

/// Fails without the privileges that no action can be run without.
pub(super) fn check_capabilities() -> Result<(), Failure> {
    let missing = missing_capabilities(0);
    // Without those for namespaces, actions can be run, with less around them.
    let vital = &missing
        [..missing.len() - missing_capabilities(CAPABILITIES.len() - NAMESPACE_CAPABILITIES).len()];
    if vital.is_empty() {
        return Ok(());
    }
    Err(Failure::Configuration {
        key: "users",
        message: format!(
            "actions run as users of their own, which takes privileges; run bb_runner as root (it \
             lacks {})",
            vital.join(", ")
        ),
    })
}

/// Those of `CAPABILITIES` that this process lacks, from the given one on.
fn missing_capabilities(from: usize) -> Vec<&'static str> {
    let effective = proc_self_status::bits("CapEff:").unwrap_or(0);
    CAPABILITIES
        .iter()
        .skip(from)
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect()
}

/// Fails when a number of actions' users is somebody else's.
pub(super) fn check_users(config: &Config) -> Result<(), Failure> {
    let range = config.users.range();
    let own = nix::unistd::getuid().as_raw();
    let (allowed, _) = resolve_users(&config.allowed_users);
    let reason = if range.contains(&own) {
        Some(format!("bb_runner itself runs as user {own}"))
    } else if let Some(worker) = allowed.iter().find(|user| range.contains(user)) {
        Some(format!("allowed_users has user {worker}"))
    } else {
        collisions(&range).into_iter().next()
    };
    match reason {
        None => Ok(()),
        Some(reason) => Err(Failure::Configuration {
            key: "users.first",
            message: format!(
                "users {} to {} must be nobody else's, but {reason}; choose another range, or name \
                 those that are meant for actions bb-action…",
                range.start,
                range.end - 1
            ),
        }),
    }
}

/// The numbers of those users that exist, and the names of the others.
pub(super) fn resolve_users(names: &[String]) -> (BTreeSet<u32>, Vec<String>) {
    let mut known = BTreeSet::new();
    let mut unknown = Vec::new();
    for name in names {
        match (name.parse::<u32>(), nix::unistd::User::from_name(name)) {
            (Ok(number), _) => {
                known.insert(number);
            }
            (_, Ok(Some(user))) => {
                known.insert(user.uid.as_raw());
            }
            _ => unknown.push(name.clone()),
        }
    }
    (known, unknown)
}

/// What to do about a name of `allowed_users` that is no user's.
pub(super) fn unknown_user(name: String) -> Failure {
    Failure::Configuration {
        key: "allowed_users",
        message: format!(
            "there is no user {name:?} on this host; create it, or name the user that bb_worker \
             runs as"
        ),
    }
}

/// The number of the group that a key names.
fn group(key: &'static str, name: &str) -> Result<u32, Failure> {
    let found = match name.parse::<u32>() {
        Ok(number) => Some(number),
        Err(_) => nix::unistd::Group::from_name(name)
            .ok()
            .flatten()
            .map(|group| group.gid.as_raw()),
    };
    found.ok_or_else(|| Failure::Configuration {
        key,
        message: format!("there is no group {name:?} on this host; create it, or name another"),
    })
}

/// The numbers of `additional_groups`.
pub(super) fn resolve_groups(names: &[String]) -> Result<Vec<u32>, Failure> {
    names
        .iter()
        .map(|name| group("additional_groups", name))
        .collect()
}

/// The number of `socket_group`, if that is set.
pub(super) fn socket_group(config: &Config) -> Result<Option<u32>, Failure> {
    match config.socket_group.as_str() {
        "" => Ok(None),
        name => group("socket_group", name).map(Some),
    }
}

/// Entries of /etc/passwd and /etc/group in the range that are not there for actions, and ranges of
/// /etc/subuid and /etc/subgid that overlap it.
fn collisions(range: &Range<u32>) -> Vec<String> {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let mut found = Vec::new();
    for (file, kind) in [("/etc/passwd", "user"), ("/etc/group", "group")] {
        found.extend(accounts_in(range, &read(file), kind));
    }
    for file in ["/etc/subuid", "/etc/subgid"] {
        found.extend(delegated_in(range, &read(file), file));
    }
    found
}

/// Entries of passwd(5) or group(5) whose number is in the range, and whose name is not that of an action's user.
fn accounts_in(range: &Range<u32>, text: &str, kind: &str) -> Vec<String> {
    let account = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse::<u32>().ok()?;
        (range.contains(&id) && !name.starts_with("bb-action"))
            .then(|| format!("{kind} {name} ({id})"))
    };
    text.lines().filter_map(account).collect()
}

/// Lines of subuid(5) or subgid(5) that give somebody a number of the range, each as a reason for people.
fn delegated_in(range: &Range<u32>, text: &str, file: &str) -> Vec<String> {
    let delegated = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let first = fields.next()?.parse::<u64>().ok()?;
        let end = first.saturating_add(fields.next()?.parse().ok()?);
        (first < u64::from(range.end) && u64::from(range.start) < end)
            .then(|| format!("{file} gives {name} the numbers {first} to {}", end - 1))
    };
    text.lines().filter_map(delegated).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_others_have_are_told() {
        let accounts = "root:x:0:0::/:/bin/sh\nbb-action-58000:x:58000:\nann:x:58001:\n:::\nx\n";
        let range = 58_000..58_256;
        assert_eq!(accounts_in(&range, accounts, "user"), ["user ann (58001)"]);
        let delegated =
            "a:100000:65536\nb:58255:1\nc:58256:10\nd:57000:1000\ne:1:4294967295\nf:x:1\n";
        assert_eq!(
            delegated_in(&range, delegated, "/etc/subuid"),
            [
                "/etc/subuid gives b the numbers 58255 to 58255",
                "/etc/subuid gives e the numbers 1 to 4294967295"
            ]
        );
    }
}
