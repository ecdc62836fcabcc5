//! The thread that makes room before anybody has to wait for it, saves recency now and then, and looks for
//! damage.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    recency,
    scrub::{self, Scrub},
    space::Space,
    uploads::Uploads,
};

pub(super) struct MaintenanceThread {
    space: Arc<Space>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MaintenanceThread {
    pub(super) fn start(space: Arc<Space>, uploads: Arc<Uploads>) -> Self {
        let own = space.clone();
        let thread = std::thread::Builder::new()
            .name("storage".to_owned())
            .spawn(move || own.maintain(&uploads))
            .inspect_err(|error| tracing::error!(%error, "could not start a thread"))
            .ok();
        MaintenanceThread { space, thread }
    }

    pub(super) fn stop(self) {
        self.space.maintenance.stop();
        if let Some(thread) = self.thread {
            let _ = thread.join();
        }
    }
}

impl Space {
    fn maintain(&self, uploads: &Uploads) {
        const ROUND: Duration = Duration::from_secs(10);
        const ROUNDS_PER_SAVING: u32 = 30;
        let mut rounds = 0;
        let mut scrub = Scrub::default();
        let mut mended = Instant::now();
        loop {
            let mut state = self.maintenance.state.lock();
            let quiet = !state.stopping
                && !state.space_is_short
                && self
                    .maintenance
                    .changed
                    .wait_for(&mut state, ROUND)
                    .timed_out();
            let stopping = state.stopping;
            state.space_is_short = false;
            drop(state);
            // What is there instead is left alone.
            let is_there = self.look_for_directory();
            if is_there && mended.elapsed() >= ROUND {
                self.mend_directories();
                mended = Instant::now();
            }
            if quiet {
                // So that order in time shows even when nothing is written.
                self.written.fetch_add(self.tick(), Ordering::Relaxed);
                rounds += 1;
            }
            if is_there && (stopping || rounds >= ROUNDS_PER_SAVING) {
                rounds = 0;
                if let Err(error) = recency::save(self) {
                    tracing::warn!(%error, "could not save when blobs were used");
                }
            }
            if stopping {
                return;
            }
            self.note_age();
            uploads.expire(Instant::now());
            if !is_there {
                continue;
            }
            self.measure_free_space(Instant::now());
            self.reclaim();
            if quiet {
                // 4 MiB a second: what reads that little is not noticed by who reads the rest.
                scrub.step(self, scrub::STEP);
            }
        }
    }
}
