//! Where a scheduler listens, and what is served there.

use std::{collections::BTreeMap, time::Duration};

use axum::Router;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    config::{self, scheduler::Config, tls::ServerTls},
    daemon::{self, Failure, Lifecycle, Listener, PageLimits, Policy, ServerLimits},
};

/// A worker's report carries a whole ExecuteResponse.
pub(super) const LARGEST_REPORT: usize = 64 << 20;

/// A listener for each kind of caller.
pub(super) struct Listeners {
    pub clients: Listener,
    pub workers: Listener,
    pub state: Listener,
    pub web: Listener,
    /// `None` where it cannot be had, and nobody chose it.
    pub control: Option<Listener>,
}

/// What the callers of gRPC are served.
pub(super) struct ListenerRoutes {
    pub clients: Routes,
    pub workers: Routes,
    /// Also at the control socket.
    pub state: Routes,
}

impl Listeners {
    /// With the policy of the configuration, as it is after each reload.
    pub(super) fn open(config: &Config, lifecycle: &Lifecycle) -> Result<Self, Failure> {
        let policy = Policy::open(&config.grants, &config.tokens, lifecycle)?;
        // Who calls there is told by the kernel.
        let no_tokens = config::tokens::Tokens::default();
        let control_grants = daemon::control_grants(&config.grants);
        let control_policy = Policy::open(&control_grants, &no_tokens, lifecycle)?;
        lifecycle.apply_on_reload(&["grants", "tokens"], {
            let (policy, control_policy) = (policy.clone(), control_policy.clone());
            move |config: Config, lifecycle| {
                policy.replace(&config.grants, &config.tokens, lifecycle)?;
                let grants = daemon::control_grants(&config.grants);
                control_policy.replace(&grants, &no_tokens, lifecycle)
            }
        });
        let secured = |listener: Listener, (key, tls): (&'static str, &ServerTls)| {
            let listener = listener.with_tls(daemon::server_tls(key, tls, lifecycle)?);
            Ok::<_, Failure>(listener.with_policy(&policy))
        };
        Ok(Listeners {
            clients: secured(
                daemon::listen("clients", "clients.listen", &config.clients.listen, None)?,
                ("clients.tls", &config.clients.tls),
            )?,
            workers: secured(
                daemon::listen("workers", "workers.listen", &config.workers.listen, None)?,
                ("workers.tls", &config.workers.tls),
            )?,
            state: secured(
                daemon::listen("state", "state.listen", &config.state.listen, None)?,
                ("state.tls", &config.state.tls),
            )?,
            web: secured(
                daemon::listen("web", "web.listen", &config.web.listen, None)?,
                ("web.tls", &config.web.tls),
            )?,
            control: daemon::listen_if_possible(
                "control",
                "control.listen",
                &config.control.listen,
                config.control.is_default(),
                Some(daemon::control_permissions(&config.control.socket_group)?),
            )?
            .map(|listener| listener.with_policy(&control_policy)),
        })
    }

    /// By the names of their sockets.
    pub(super) fn addresses(&self) -> BTreeMap<String, String> {
        let mut addresses = BTreeMap::from([
            ("clients".to_owned(), self.clients.address()),
            ("workers".to_owned(), self.workers.address()),
            ("state".to_owned(), self.state.address()),
            ("web".to_owned(), self.web.address()),
        ]);
        if let Some(control) = &self.control {
            addresses.insert("control".to_owned(), control.address());
        }
        addresses
    }

    /// For the line of `systemctl status`.
    pub(super) fn status(&self) -> String {
        format!(
            "serving clients on {}, workers on {}, operators on {}, pages on {}",
            self.clients.address(),
            self.workers.address(),
            self.state.address(),
            self.web.address()
        )
    }

    /// Serves until `stopping`, and for a while longer what is under way.
    pub(super) async fn serve(
        self,
        config: &Config,
        routes: ListenerRoutes,
        pages: Router,
        stopping: &CancellationToken,
    ) -> Result<(), Failure> {
        let drain = config.shutdown.drain_timeout.get();
        let limits = limits(config);
        let worker_limits = ServerLimits {
            largest_message: LARGEST_REPORT as u64,
            ..limits.clone()
        };
        let serve = |listener, routes, limits| {
            daemon::serve_within(listener, routes, limits, stopping.clone(), drain)
        };
        tokio::try_join!(
            serve(self.clients, routes.clients, limits.clone()),
            serve(self.workers, routes.workers, worker_limits),
            daemon::serve_pages(
                self.web,
                pages,
                PageLimits::default(),
                stopping.clone(),
                drain
            ),
            serve(self.state, routes.state.clone(), limits),
            serve_control(self.control, routes.state, stopping, drain),
        )?;
        Ok(())
    }
}

async fn serve_control(
    control: Option<Listener>,
    routes: Routes,
    stopping: &CancellationToken,
    drain: Duration,
) -> Result<(), Failure> {
    match control {
        Some(control) => daemon::serve(control, routes, stopping.clone(), drain).await,
        None => {
            stopping.cancelled().await;
            Ok(())
        }
    }
}

fn limits(config: &Config) -> ServerLimits {
    let default = ServerLimits::default();
    ServerLimits {
        calls: match config.callers.maximum_calls {
            0 => default.calls,
            calls => calls,
        },
        requests_per_second: config.callers.requests_per_second,
        bytes_per_second: config.callers.bytes_per_second.get(),
        ..default
    }
}
