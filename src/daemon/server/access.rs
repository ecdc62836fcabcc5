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

use http::{HeaderMap, header::AUTHORIZATION};
use parking_lot::RwLock;
use tonic::{Request, Status};

use super::caller::CallerKey;
use crate::{
    auth::{AccountKind, Grants, Identity, Requirement, requirement},
    config::{
        self, Diagnostics,
        grants::{CallerPattern, Grant, Permission},
    },
    daemon::{Failure, Lifecycle, Peer, PeerCertificate, Tokens, tokens::TokenTurn},
    instance::InstanceName,
};

/// What a listener allows. Clones are handles of the same.
#[derive(Clone, Default)]
pub struct Policy(Arc<RwLock<Rules>>);

/// What is allowed from one reload to the next.
#[derive(Clone, Default)]
struct Rules {
    grants: Arc<Grants>,
    tokens: Option<Arc<Tokens>>,
}

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
    pub fn open(
        grants: &[Grant],
        tokens: &config::tokens::Tokens,
        lifecycle: &Lifecycle,
    ) -> Result<Self, Failure> {
        let policy = Policy::default();
        policy.replace(grants, tokens, lifecycle)?;
        Ok(policy)
    }

    /// From now on, something else is allowed; calls that are under way go on.
    pub fn replace(
        &self,
        grants: &[Grant],
        tokens: &config::tokens::Tokens,
        lifecycle: &Lifecycle,
    ) -> Result<(), Failure> {
        let before = self.0.read().tokens.clone();
        let tokens = match before.filter(|before| before.config() == tokens) {
            // Those that were verified still are.
            Some(same) => Some(same),
            None => Tokens::open(tokens, lifecycle)?,
        };
        let grants = Arc::new(Grants::new(grants, number_of));
        *self.0.write() = Rules { grants, tokens };
        Ok(())
    }

    /// Who calls: whoever has made the connection, or whose token is among the headers.
    pub(super) async fn authenticate(
        &self,
        connection: &Arc<Identity>,
        turn: &TokenTurn,
        headers: &HeaderMap,
    ) -> Result<Arc<Identity>, Status> {
        let tokens = self.0.read().tokens.clone();
        let Some(tokens) = tokens else {
            return Ok(connection.clone());
        };
        let refuse = |why: &str| Status::unauthenticated(format!("Authorization: {why}"));
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let token = match (given.next(), given.next()) {
            (None, _) => return Ok(connection.clone()),
            (Some(value), None) => value,
            (Some(_), Some(_)) => return Err(refuse("there are several authorization headers")),
        };
        let token = token.to_str().ok().and_then(|value| value.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token
            .ok_or_else(|| refuse("the authorization header is not \"Bearer\" and a token"))?;
        match tokens.verify(token.trim(), turn).await {
            Ok(identity) if connection.is_nobody() => Ok(identity),
            Ok(identity) => Ok(Arc::new(identity.and(connection))),
            Err(why) => Err(refuse(&format!("the token {why}"))),
        }
    }

    /// What somebody may do who asks for pages.
    pub(super) fn of_pages(&self, identity: &Arc<Identity>, caller: &CallerKey) -> PageAccess {
        PageAccess {
            caller: caller.to_string().into(),
            identity: identity.clone(),
            grants: self.0.read().grants.clone(),
        }
    }

    /// Whether somebody may call a method at all.
    pub(super) fn admit(&self, path: &str, identity: &Arc<Identity>) -> Result<Access, Status> {
        let grants = self.0.read().grants.clone();
        let requirement = match requirement(path) {
            Some(requirement) => requirement,
            // Where everybody may do everything, what is not served says so itself.
            None if grants.is_open() => Requirement::Nothing,
            None => {
                return Err(Status::permission_denied(
                    "Authorization: nobody may call this method",
                ));
            }
        };
        let may = |what| grants.allow_somewhere(identity, what);
        let (is_allowed, asked) = match requirement {
            Requirement::Nothing => (true, &[][..]),
            Requirement::Anywhere(what) => (may(what), &[what][..]),
            Requirement::InInstance(asked) => (asked.iter().any(|what| may(*what)), asked),
        };
        match is_allowed {
            true => Ok(Access {
                identity: identity.clone(),
                grants,
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
    caller: Arc<str>,
    identity: Arc<Identity>,
    grants: Arc<Grants>,
}

impl PageAccess {
    /// Whose share of what there is for all the request takes: who asks, or else from where.
    pub fn caller(&self) -> &str {
        &self.caller
    }

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

/// Where a caller calls from, as callers without identity are told apart: of IPv6 the first 64 bits.
/// `None` where it proved who it is, or nothing is known.
pub fn client_address<T>(request: &Request<T>) -> Option<String> {
    let access = Access::of(request);
    let peer = request.extensions().get()?;
    match CallerKey::of(&access.identity, peer) {
        CallerKey::Address(address) => Some(address.to_string()),
        CallerKey::Identity(_) | CallerKey::Unknown => None,
    }
}

/// Who calls, for the log's field `client`: what is known of him, else where he calls from.
pub fn client_name<T>(request: &Request<T>) -> String {
    let access = Access::of(request);
    match (access.identity.is_nobody(), request.extensions().get()) {
        (false, _) => access.identity.name().to_owned(),
        (true, Some(Peer::Tcp(Some(address)))) => address.ip().to_canonical().to_string(),
        (true, Some(Peer::Unix { uid, .. })) => format!("uid:{uid}"),
        (true, Some(Peer::Tcp(None)) | None) => "unknown".to_owned(),
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
