//! The decision: a function of who calls, what is asked for, and where.

use super::identity::Identity;
use crate::{
    config::grants::{CallerPattern, Grant, Permission, matches},
    instance::InstanceName,
};

/// What an administrator allows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grants(Vec<GrantRule>);

#[derive(Clone, Debug, PartialEq)]
struct GrantRule {
    who: Vec<CallerPattern>,
    may: Vec<Permission>,
    may_not: Vec<Permission>,
    /// Empty for everywhere.
    places: Vec<InstanceName>,
}

/// What a name of the host is the name of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountKind {
    /// A user.
    User,
    /// A group.
    Group,
}

impl Grants {
    /// `number_of` is the number of a user or a group of this host; one that has none is matched by
    /// nobody.
    pub fn new(grants: &[Grant], number_of: impl Fn(AccountKind, &str) -> Option<u32>) -> Self {
        let numbered = |who: &CallerPattern| match who {
            CallerPattern::Attribute { name, pattern } => {
                let (kind, attribute) = match name.as_str() {
                    "user" => (AccountKind::User, "uid"),
                    "group" => (AccountKind::Group, "gid"),
                    _ => return Some(who.clone()),
                };
                number_of(kind, pattern).map(|number| CallerPattern::Attribute {
                    name: attribute.to_owned(),
                    pattern: number.to_string(),
                })
            }
            CallerPattern::Anyone => Some(CallerPattern::Anyone),
        };
        let rule = |grant: &Grant| GrantRule {
            who: grant.who.iter().filter_map(numbered).collect(),
            may: grant.may.clone(),
            may_not: grant.may_not.clone(),
            places: grant
                .r#where
                .iter()
                .filter_map(|name| InstanceName::parse(name).ok())
                .collect(),
        };
        Grants(grants.iter().map(rule).collect())
    }

    /// Whether there are none, so that all is allowed.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a caller may do something with an instance.
    pub fn allow(&self, who: &Identity, what: Permission, place: &InstanceName) -> bool {
        let is_there = |rule: &&GrantRule| {
            let begins = |prefix: &InstanceName| place.strip_prefix(prefix).is_some();
            rule.places.is_empty() || rule.places.iter().any(begins)
        };
        self.is_open()
            || self
                .about(who, what)
                .find(is_there)
                .is_some_and(|rule| rule.may.contains(&what))
    }

    /// Whether a caller may do something with some instance, as far as no instance is known.
    pub fn allow_somewhere(&self, who: &Identity, what: Permission) -> bool {
        // Exceptions for some places leave others to the rules behind them.
        let decides = |rule: &&GrantRule| rule.places.is_empty() || rule.may.contains(&what);
        self.is_open()
            || self
                .about(who, what)
                .find(decides)
                .is_some_and(|rule| rule.may.contains(&what))
    }

    /// The rules that say something of a caller and a permission, in their order.
    fn about(&self, who: &Identity, what: Permission) -> impl Iterator<Item = &GrantRule> {
        self.0.iter().filter(move |rule| {
            (rule.may.contains(&what) || rule.may_not.contains(&what))
                && rule.who.iter().any(|pattern| is_meant(pattern, who))
        })
    }
}

fn is_meant(pattern: &CallerPattern, who: &Identity) -> bool {
    match pattern {
        CallerPattern::Anyone => true,
        CallerPattern::Attribute { name, pattern } => {
            who.values(name).any(|value| matches(pattern, value))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(text: &str) -> Grants {
        #[derive(serde::Deserialize)]
        struct File {
            grants: Vec<Grant>,
        }
        let file: File = toml::from_str(text).unwrap();
        Grants::new(&file.grants, |kind, name| {
            (kind == AccountKind::User && name == "builder").then_some(7)
        })
    }

    fn named(name: &str) -> Identity {
        Identity::of_certificate("CN=x", &[("cn", name.to_owned())])
    }

    #[test]
    fn without_grants_all_is_allowed_and_with_one_nothing_else_is() {
        let place = InstanceName::empty();
        let open = Grants::default();
        assert!(open.allow(&Identity::nobody(), Permission::Steer, &place));
        assert!(open.allow_somewhere(&Identity::nobody(), Permission::Steer));
        let one = grants("[[grants]]\nwho = [\"cn:worker*\"]\nmay = [\"work\"]\n");
        assert!(one.allow(&named("worker1"), Permission::Work, &place));
        for (who, what) in [
            (named("worker1"), Permission::Execute),
            (named("stranger"), Permission::Work),
            (Identity::nobody(), Permission::Work),
            (Identity::of_process(0, 0), Permission::Work),
        ] {
            assert!(!one.allow(&who, what, &place), "{who:?} {what:?}");
            assert!(!one.allow_somewhere(&who, what), "{who:?} {what:?}");
        }
    }

    #[test]
    fn the_first_grant_that_is_about_a_question_answers_it() {
        let all = grants(
            "[[grants]]\nwho = [\"cn:intern\"]\nmay_not = [\"execute\"]\nwhere = [\"release\"]\n\
             [[grants]]\nwho = [\"cn:*\", \"user:builder\", \"user:unknown\"]\nmay = [\"execute\"]\n\
             [[grants]]\nwho = [\"anyone\"]\nmay = [\"cas.read\"]\nwhere = [\"public\", \"a/b\"]\n",
        );
        let place = |name: &str| InstanceName::parse(name).unwrap();
        let execute = |who: &Identity, name| all.allow(who, Permission::Execute, &place(name));
        assert!(!execute(&named("intern"), "release"));
        assert!(!execute(&named("intern"), "release/1"));
        assert!(execute(&named("intern"), "releases"));
        assert!(execute(&named("other"), "release"));
        assert!(execute(&Identity::of_process(7, 1), "release"));
        assert!(!execute(&Identity::of_process(8, 7), "release"));
        assert!(all.allow_somewhere(&named("intern"), Permission::Execute));
        let nobody = Identity::nobody();
        for (name, expected) in [("public/x", true), ("a/b", true), ("a", false), ("", false)] {
            assert_eq!(
                all.allow(&nobody, Permission::CasRead, &place(name)),
                expected
            );
        }
        assert!(all.allow_somewhere(&nobody, Permission::CasRead));
        assert!(!all.allow_somewhere(&nobody, Permission::Execute));
    }
}
