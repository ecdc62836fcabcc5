//! What wakes the thread of `maintenance`.

use parking_lot::{Condvar, Mutex};

/// Space is short, or the store is being closed.
#[derive(Default)]
pub(super) struct MaintenanceSignal {
    pub state: Mutex<MaintenanceState>,
    pub changed: Condvar,
}

impl MaintenanceSignal {
    pub(super) fn space_is_short(&self) {
        self.state.lock().space_is_short = true;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }
}

#[derive(Default)]
pub(super) struct MaintenanceState {
    pub space_is_short: bool,
    pub stopping: bool,
}
