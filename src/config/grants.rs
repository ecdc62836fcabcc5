//! Of bb_scheduler.toml: who may do what where.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5), as a test sees to"
)]

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Diagnostics;
use crate::{instance::InstanceName, text::one_of};

/// One of the sections that are read from the top: the first one that is about a caller, what it asks
/// for, and where, decides.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grant {
    pub who: Vec<CallerPattern>,
    pub may: Vec<Permission>,
    pub may_not: Vec<Permission>,
    /// Instance names, with all that begin with one of them; empty for everywhere.
    pub r#where: Vec<String>,
}

/// What a caller asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub enum Permission {
    #[serde(rename = "execute")]
    Execute,
    #[serde(rename = "cas.read")]
    CasRead,
    #[serde(rename = "cas.write")]
    CasWrite,
    #[serde(rename = "action_cache.read")]
    ActionCacheRead,
    #[serde(rename = "action_cache.write")]
    ActionCacheWrite,
    #[serde(rename = "work")]
    Work,
    #[serde(rename = "see")]
    See,
    #[serde(rename = "steer")]
    Steer,
}

impl Permission {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Permission::Execute => "execute",
            Permission::CasRead => "cas.read",
            Permission::CasWrite => "cas.write",
            Permission::ActionCacheRead => "action_cache.read",
            Permission::ActionCacheWrite => "action_cache.write",
            Permission::Work => "work",
            Permission::See => "see",
            Permission::Steer => "steer",
        }
    }
}

/// Callers: all of them, or those who have an attribute whose value matches. In the pattern, `*` is any
/// text, also none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallerPattern {
    Anyone,
    Attribute { name: String, pattern: String },
}

/// What the kernel says of a caller on a Unix socket.
const OF_PROCESSES: [&str; 4] = ["user", "group", "uid", "gid"];
/// What certificates say.
const OF_CERTIFICATES: [&str; 7] = ["subject", "cn", "o", "ou", "dns", "uri", "email"];

/// What tokens say, besides `claim.NAME`.
const OF_TOKENS: [&str; 2] = ["sub", "iss"];

fn is_of_tokens(attribute: &str) -> bool {
    let claim = attribute.strip_prefix("claim.");
    OF_TOKENS.contains(&attribute) || claim.is_some_and(|claim| !claim.is_empty())
}

impl CallerPattern {
    /// Whether it matches whoever `other` does, as far as the texts tell.
    fn covers(&self, other: &CallerPattern) -> bool {
        match (self, other) {
            (CallerPattern::Anyone, _) => true,
            (_, CallerPattern::Anyone) => false,
            (
                CallerPattern::Attribute { name, pattern },
                CallerPattern::Attribute {
                    name: other_name,
                    pattern: other,
                },
            ) => name == other_name && matches(pattern, other),
        }
    }
}

/// Whether a text is one of those that a pattern means, in which `*` is any text.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    rest.ends_with(last)
}

impl FromStr for CallerPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "anyone" {
            return Ok(CallerPattern::Anyone);
        }
        let known = || {
            [
                &OF_PROCESSES[..],
                &OF_CERTIFICATES,
                &OF_TOKENS,
                &["claim.NAME"],
            ]
            .concat()
        };
        let Some((name, pattern)) = text.split_once(':') else {
            return Err(format!(
                "{text:?} is nobody; write \"anyone\", or an attribute of callers and its value, such as \
                 \"cn:worker*\" or \"user:bb-worker\"; attributes are {}",
                one_of(&known())
            ));
        };
        if name == "claim.NAME" || !known().contains(&name) && !is_of_tokens(name) {
            return Err(format!(
                "{name:?} in {text:?} is no attribute of callers; write {}",
                one_of(&known())
            ));
        }
        if pattern.is_empty() {
            return Err(format!(
                "{text:?} can match nobody; write a value, or {name}:* for whoever has one"
            ));
        }
        let is_number = matches!(name, "uid" | "gid");
        if is_number && !pattern.chars().all(|c| c.is_ascii_digit() || c == '*') {
            return Err(format!(
                "{text:?} can match nobody; a {name} is a number, and names go with \"user:\" or \"group:\""
            ));
        }
        if matches!(name, "user" | "group") && pattern.contains('*') {
            return Err(format!(
                "{text:?}: a {name} is one of this host's; write its whole name"
            ));
        }
        Ok(CallerPattern::Attribute {
            name: name.to_owned(),
            pattern: pattern.to_owned(),
        })
    }
}

impl fmt::Display for CallerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallerPattern::Anyone => f.write_str("anyone"),
            CallerPattern::Attribute { name, pattern } => write!(f, "{name}:{pattern}"),
        }
    }
}

impl<'de> Deserialize<'de> for CallerPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for CallerPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What no host is needed to find wrong. `has_certificates` when some port asks clients for them,
/// `has_tokens` when some count.
pub fn validate(
    grants: &[Grant],
    has_certificates: bool,
    has_tokens: bool,
    diagnostics: &mut Diagnostics,
) {
    for (number, grant) in grants.iter().enumerate() {
        let key = |name: &str| format!("grants.{number}.{name}");
        diagnostics.require(
            !grant.who.is_empty(),
            &key("who"),
            "it is about nobody; write callers, such as [\"cn:worker*\"], or [\"anyone\"]",
        );
        diagnostics.require(
            !grant.may.is_empty() || !grant.may_not.is_empty(),
            &key("may"),
            "it says nothing; write what these callers may do, such as [\"execute\", \"cas.read\"]",
        );
        for both in grant.may.iter().filter(|it| grant.may_not.contains(it)) {
            let text = format!("{:?} is among may, too; leave one of them out", both.name());
            diagnostics.add(key("may_not"), text);
        }
        let mut named = grant.may.iter().chain(&grant.may_not);
        let whole = named.find(|it| matches!(it, Permission::See | Permission::Steer));
        if let Some(whole) = whole
            && !grant.r#where.is_empty()
        {
            let text = format!(
                "{:?} is about all instances, wherever this says; say that in [[grants]] of its own, without \
                 where",
                whole.name()
            );
            diagnostics.add(key("where"), text);
        }
        for name in &grant.r#where {
            if let Err(error) = InstanceName::parse(name) {
                diagnostics.add(key("where"), error.to_string());
            }
        }
        for who in &grant.who {
            if let CallerPattern::Attribute { name, .. } = who
                && OF_CERTIFICATES.contains(&name.as_str())
                && !has_certificates
            {
                diagnostics.add(
                    key("who"),
                    format!(
                        "\"{who}\" can match nobody, since no port asks for certificates; set \
                         clients.tls.client_ca or workers.tls.client_ca"
                    ),
                );
            }
        }
        for who in &grant.who {
            if let CallerPattern::Attribute { name, .. } = who
                && is_of_tokens(name)
                && !has_tokens
            {
                diagnostics.add(
                    key("who"),
                    format!(
                        "\"{who}\" can match nobody, since no token counts; set tokens.key_set"
                    ),
                );
            }
        }
        if let Some(before) = hidden_by(grants, number) {
            diagnostics.add(
                format!("grants.{number}"),
                format!(
                    "[[grants]] number {} decides all that this one says; put this one before it, or \
                     leave it out",
                    before + 1
                ),
            );
        }
    }
}

/// An earlier one that decides whatever this one would.
fn hidden_by(grants: &[Grant], number: usize) -> Option<usize> {
    let grant = grants.get(number)?;
    let asked = || grant.may.iter().chain(&grant.may_not);
    grants.iter().take(number).position(|before| {
        let decides = |it: &Permission| before.may.contains(it) || before.may_not.contains(it);
        let is_about = |who: &CallerPattern| before.who.iter().any(|other| other.covers(who));
        let is_within = |name: &String| {
            before.r#where.is_empty() || before.r#where.iter().any(|prefix| begins(name, prefix))
        };
        let is_everywhere = grant.r#where.is_empty() && !is_within(&String::new());
        asked().all(decides)
            && grant.who.iter().all(is_about)
            && grant.r#where.iter().all(is_within)
            && !is_everywhere
            && asked().next().is_some()
    })
}

fn begins(name: &str, prefix: &str) -> bool {
    match (InstanceName::parse(name), InstanceName::parse(prefix)) {
        (Ok(name), Ok(prefix)) => name.strip_prefix(&prefix).is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_text() {
        for (pattern, text, expected) in [
            ("worker", "worker", true),
            ("worker", "worker1", false),
            ("worker*", "worker", true),
            ("worker*", "worker1", true),
            ("*.example", "a.b.example", true),
            ("*.example", "example", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "acb", false),
            ("a*a", "a", false),
            ("*", "", true),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn what_says_nothing_or_comes_too_late_is_told() {
        let told = |text: &str| {
            #[derive(Deserialize)]
            struct Grants {
                grants: Vec<Grant>,
            }
            let parsed: Grants = toml::from_str(text).unwrap();
            let mut diagnostics = Diagnostics::default();
            validate(&parsed.grants, true, true, &mut diagnostics);
            let found = diagnostics.into_errors(std::path::Path::new("/x"));
            found.iter().map(ToString::to_string).collect::<String>()
        };
        let first =
            "[[grants]]\nwho = [\"cn:*\"]\nmay = [\"execute\", \"work\"]\nwhere = [\"a\"]\n";
        for (text, words) in [
            (
                "who = [\"cn:x\"]\nmay = [\"work\"]\nwhere = [\"a/b\"]",
                "number 1 decides",
            ),
            (
                "who = [\"cn:x\"]\nmay_not = [\"work\"]\nwhere = [\"a/b\"]",
                "number 1 decides",
            ),
            ("who = [\"cn:x\"]\nmay = [\"work\"]", ""),
            (
                "who = [\"cn:x\"]\nmay = [\"see\", \"work\"]\nwhere = [\"a\"]",
                "about all instances",
            ),
            ("who = [\"ou:x\"]\nmay = [\"work\"]\nwhere = [\"a\"]", ""),
            ("who = [\"anyone\"]\nmay = [\"work\"]\nwhere = [\"a\"]", ""),
            ("may = [\"work\"]", "about nobody"),
            ("who = [\"anyone\"]", "says nothing"),
            (
                "who = [\"anyone\"]\nmay = [\"see\"]\nwhere = [\"a/\"]",
                "where",
            ),
        ] {
            let text = format!("{first}[[grants]]\n{text}");
            let said = told(&text);
            assert!(
                said.contains(words) && said.is_empty() == words.is_empty(),
                "{text}: {said}"
            );
        }
    }
}
