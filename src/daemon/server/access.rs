//! Whether a call is allowed, at the server's edge: what `auth` decides, as gRPC statuses.
//!
//! 1. Every call of a listener that has grants passes `Policy::admit`, which knows what its method asks
//!    for, and refuses methods that it does not know.
//! 2. Where the instance matters, the service asks `Access::require` once it knows it. An answer of one
//!    that has not is withheld.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tonic::{Request, Status};

use crate::{
    auth::{AccountKind, Grants, Identity, Requirement, requirement},
    config::{
        Diagnostics,
        grants::{CallerPattern, Grant, Permission},
    },
    daemon::{Peer, PeerCertificate},
    instance::InstanceName,
};

/// What a listener allows. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Policy(Arc<Grants>);

/// What one call may do; in the extensions of its request.
#[derive(Clone, Debug)]
pub struct Access {
    identity: Arc<Identity>,
    grants: Arc<Grants>,
    requirement: Requirement,
    is_asked: Arc<AtomicBool>,
}

impl Policy {
    /// As configured, with the users and groups of this host.
    pub fn new(grants: &[Grant]) -> Self {
        Policy(Arc::new(Grants::new(grants, number_of)))
    }

    /// What somebody may do who asks for pages.
    pub(super) fn of_pages(&self, identity: &Arc<Identity>) -> PageAccess {
        PageAccess {
            identity: identity.clone(),
            grants: self.0.clone(),
        }
    }

    /// Whether somebody may call a method at all.
    pub(super) fn admit(&self, path: &str, identity: &Arc<Identity>) -> Result<Access, Status> {
        let requirement = match requirement(path) {
            Some(requirement) => requirement,
            // Where everybody may do everything, what is not served says so itself.
            None if self.0.is_open() => Requirement::Nothing,
            None => {
                return Err(Status::permission_denied(
                    "Authorization: nobody may call this method",
                ));
            }
        };
        let may = |what| self.0.allow_somewhere(identity, what);
        let (is_allowed, asked) = match requirement {
            Requirement::Nothing => (true, &[][..]),
            Requirement::Anywhere(what) => (may(what), &[what][..]),
            Requirement::InInstance(asked) => (asked.iter().any(|what| may(*what)), asked),
        };
        match is_allowed {
            true => Ok(Access {
                identity: identity.clone(),
                grants: self.0.clone(),
                requirement,
                is_asked: Arc::default(),
            }),
            false => Err(denied(identity, asked, None)),
        }
    }
}

/// What a request for a page may do; in its extensions. Everything where no server of ours asks.
#[derive(Clone, Debug, Default)]
pub struct PageAccess {
    identity: Arc<Identity>,
    grants: Arc<Grants>,
}

impl PageAccess {
    /// Who asks.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether the caller may do something with some instance.
    pub fn may_somewhere(&self, what: Permission) -> bool {
        self.grants.allow_somewhere(&self.identity, what)
    }

    /// Whether the caller may do something with an instance.
    pub fn may(&self, what: Permission, instance: &InstanceName) -> bool {
        self.grants.allow(&self.identity, what, instance)
    }

    /// Why not, for the caller.
    pub fn refusal(&self, what: Permission, instance: Option<&InstanceName>) -> String {
        denied(&self.identity, &[what], instance)
            .message()
            .to_owned()
    }
}

impl Access {
    /// What the server says that a call may do; everything where no server of ours calls.
    pub fn of<T>(request: &Request<T>) -> Self {
        let found = request.extensions().get().cloned();
        found.unwrap_or_else(|| Access {
            identity: Arc::default(),
            grants: Arc::default(),
            requirement: Requirement::Nothing,
            is_asked: Arc::default(),
        })
    }

    /// Who calls.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Refuses a call whose caller may not do with an instance what its method does.
    pub fn require(&self, instance: &InstanceName) -> Result<(), Status> {
        self.is_asked.store(true, Ordering::Relaxed);
        let Requirement::InInstance(asked) = self.requirement else {
            return Ok(());
        };
        match asked.iter().any(|what| self.may(*what, instance)) {
            true => Ok(()),
            false => Err(denied(&self.identity, asked, Some(instance))),
        }
    }

    /// Whether the caller may do something with an instance.
    pub fn may(&self, what: Permission, instance: &InstanceName) -> bool {
        self.grants.allow(&self.identity, what, instance)
    }

    /// The status in place of an answer that nobody has allowed.
    pub(super) fn check_asked(&self) -> Result<(), Status> {
        let is_needed =
            matches!(self.requirement, Requirement::InInstance(_)) && !self.grants.is_open();
        match is_needed && !self.is_asked.load(Ordering::Relaxed) {
            true => Err(Status::internal(
                "Authorization: the service did not ask whether the caller may do this",
            )),
            false => Ok(()),
        }
    }
}

fn denied(who: &Identity, asked: &[Permission], place: Option<&InstanceName>) -> Status {
    let asked: Vec<&str> = asked.iter().map(|what| what.name()).collect();
    let asked = crate::text::one_of(&asked);
    let place = match place {
        Some(place) => format!(" with instance {:?}", place.as_str()),
        None => String::new(),
    };
    match who.is_nobody() {
        true => Status::unauthenticated(format!(
            "Authorization: callers who show no certificate and no token may not {asked}{place}"
        )),
        false => Status::permission_denied(format!(
            "Authorization: {} may not {asked}{place}",
            crate::text::shorten(who.name())
        )),
    }
}

/// Who is at the other end of a connection.
pub(super) fn identify(peer: &Peer, certificate: Option<&PeerCertificate>) -> Identity {
    match (peer, certificate) {
        (_, Some(certificate)) => {
            Identity::of_certificate(&certificate.subject, &certificate.names)
        }
        (Peer::Unix { uid, gid, .. }, None) => Identity::of_process(*uid, *gid),
        (Peer::Tcp(_), None) => Identity::nobody(),
    }
}

fn number_of(kind: AccountKind, name: &str) -> Option<u32> {
    use nix::unistd::{Group, User};
    match kind {
        AccountKind::User => User::from_name(name).ok()?.map(|user| user.uid.as_raw()),
        AccountKind::Group => Group::from_name(name).ok()?.map(|group| group.gid.as_raw()),
    }
}

/// Users and groups in grants that this host does not have.
pub fn warn_grants(grants: &[Grant], diagnostics: &mut Diagnostics) {
    for (number, grant) in grants.iter().enumerate() {
        for who in &grant.who {
            let CallerPattern::Attribute { name, pattern } = who else {
                continue;
            };
            let kind = match name.as_str() {
                "user" => AccountKind::User,
                "group" => AccountKind::Group,
                _ => continue,
            };
            if number_of(kind, pattern).is_none() {
                diagnostics.add(
                    format!("grants.{number}.who"),
                    format!("\"{who}\" can match nobody: this host has no {name} of that name"),
                );
            }
        }
    }
}
