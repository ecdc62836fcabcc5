//! Where daemons are watched and steered: their control sockets, where their own commands ask them, and where
//! workers and runners have their metrics.

use serde::{Deserialize, Serialize};

use super::{Diagnostics, ListenAddress, path_error};

/// A section `[control]` whose socket is at a path of its own.
macro_rules! control {
    ($(#[$doc:meta])* $name:ident, $path:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            /// Ignored for a socket that systemd passes under the name `control`.
            pub listen: ListenAddress,
            /// A name or a number, of those who may ask besides root; empty for the daemon's own group.
            pub socket_group: String,
        }

        impl Default for $name {
            fn default() -> Self {
                $name {
                    listen: ListenAddress::Unix($path.into()),
                    socket_group: String::new(),
                }
            }
        }

        impl $name {
            /// What no host is needed to find wrong.
            pub fn validate(&self, diagnostics: &mut Diagnostics) {
                check(&self.listen, diagnostics);
            }

            /// Whether nobody has chosen the address.
            pub fn is_default(&self) -> bool {
                self.listen == Self::default().listen
            }
        }
    };
}

control! {
    /// Of bb_scheduler.toml(5).
    SchedulerControl, "/run/bb-scheduler/control.sock"
}

control! {
    /// Of bb_worker.toml(5).
    WorkerControl, "/run/bb-worker/control.sock"
}

control! {
    /// Of bb_runner.toml(5).
    RunnerControl, "/run/bb-runner/control.sock"
}

/// A section `[metrics]` with a port of its own.
macro_rules! metrics {
    ($(#[$doc:meta])* $name:ident, $port:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            /// Ignored for a socket that systemd passes under the name `metrics`.
            pub listen: ListenAddress,
        }

        impl Default for $name {
            fn default() -> Self {
                $name {
                    listen: ListenAddress::Tcp(([127, 0, 0, 1], $port).into()),
                }
            }
        }

        impl $name {
            /// Whether nobody has chosen the address.
            pub fn is_default(&self) -> bool {
                *self == Self::default()
            }
        }
    };
}

metrics! {
    /// Of bb_worker.toml(5).
    WorkerMetrics, 7983
}

metrics! {
    /// Of bb_runner.toml(5).
    RunnerMetrics, 7984
}

fn check(listen: &ListenAddress, diagnostics: &mut Diagnostics) {
    match listen {
        ListenAddress::Tcp(_) => diagnostics.add(
            "control.listen",
            "a TCP address does not tell who calls; write \"unix:\" and a path",
        ),
        ListenAddress::Unix(path) => {
            if let Some(reason) = path_error(path) {
                diagnostics.add("control.listen", reason);
            }
        }
    }
}
