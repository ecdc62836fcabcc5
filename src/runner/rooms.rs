//! Rooms that wait for actions, made ahead on a thread of its own.
//!
//! 1. Who takes one gets one that is usable now, or the reason why the last one could not be made.
//! 2. After a failure the thread tries again by itself, `RETRY_INTERVAL` later, whether or not
//!    somebody waits: a shortage that is over is noticed, and one that lasts costs little.
//! 3. `prove` holds when the last room that was to be made was made, less than `PROOF_AGE` ago; else
//!    one is made for it. So whoever asks for readiness again and again makes a room each
//!    `PROOF_AGE` at most.
//! 4. Whoever waits holds no lock, and can give up at any time.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::watch;

use super::{
    furnish::Workshop,
    room::{Plan, Room, RoomError},
};

/// Rooms that wait for actions.
const AHEAD: usize = 5;
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const PROOF_AGE: Duration = Duration::from_secs(10);
/// How long it may take to make one, on a host that is busy.
const FURNISH_TIMEOUT: Duration = Duration::from_secs(30);

/// Gives out rooms that a thread prepares ahead.
#[derive(Debug)]
pub struct Rooms {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    builder: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stock: Mutex<Stock>,
    /// The builder waits here.
    wanted: Condvar,
    /// Counts rooms that were made or could not be; all others wait here.
    attempts: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Stock {
    /// The oldest first.
    ready: VecDeque<Room>,
    last: Option<Attempt>,
    is_closed: bool,
}

#[derive(Debug)]
struct Attempt {
    at: Instant,
    failure: Option<RoomError>,
}

impl Rooms {
    pub fn open(plan: Plan) -> io::Result<Self> {
        let plan = Arc::new(plan);
        let shared = Arc::<Shared>::default();
        let builder = std::thread::Builder::new()
            .name("rooms".to_owned())
            .spawn({
                let (plan, shared) = (plan.clone(), shared.clone());
                move || shared.build(&plan)
            })?;
        Ok(Rooms {
            plan,
            shared,
            builder: Mutex::new(Some(builder)),
        })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// A room around the build directory that has this device and inode number, if one is ready.
    pub fn try_take(&self, build_directory: (u64, u64)) -> Option<Room> {
        let room = self.shared.pop().ok()??;
        let changes = self.plan.changes.count();
        room.is_usable(build_directory, changes).then_some(room)
    }

    /// The same, as soon as there is one.
    pub async fn take(&self, build_directory: (u64, u64)) -> Result<Room, RoomError> {
        let changes = self.plan.changes.count();
        // Each of those that are ready may be out of date, as may the one that is in the making.
        for _ in 0..AHEAD + 2 {
            let room = self.shared.next().await?;
            if room.is_usable(build_directory, changes) {
                return Ok(room);
            }
        }
        Err(RoomError::at("build directory")(io::Error::other(
            "it is replaced, or rooms are killed, all the time",
        )))
    }

    /// Whether it is known that a room can be made; `None` when `prove` must find out.
    pub fn is_proven(&self, build_directory: (u64, u64)) -> Option<Result<(), RoomError>> {
        let changes = self.plan.changes.count();
        let stock = self.shared.stock.lock();
        let last = stock.last.as_ref()?;
        match &last.failure {
            // At most `RETRY_INTERVAL` old.
            Some(failure) => Some(Err(failure.clone())),
            None if last.at.elapsed() > PROOF_AGE => None,
            None => {
                let newest = stock.ready.back()?;
                newest.is_usable(build_directory, changes).then_some(Ok(()))
            }
        }
    }

    /// Makes a room, whatever is ready. The error says why none can be made.
    pub async fn prove(&self) -> Result<(), RoomError> {
        let mut attempts = self.shared.attempts.subscribe();
        // In place of the oldest one.
        let oldest = {
            let mut stock = self.shared.stock.lock();
            match stock.ready.len() < AHEAD {
                true => None,
                false => stock.ready.pop_front(),
            }
        };
        // Its end takes a while.
        tokio::task::spawn_blocking(move || drop(oldest));
        self.shared.wanted.notify_one();
        self.shared.await_attempt(&mut attempts).await
    }

    /// Removes all rooms that nobody is in; there will be no others.
    pub fn close(&self) {
        let ready = {
            let mut stock = self.shared.stock.lock();
            stock.is_closed = true;
            std::mem::take(&mut stock.ready)
        };
        self.shared.wanted.notify_one();
        self.shared.attempts.send_modify(|_| ());
        drop(ready);
        if let Some(builder) = self.builder.lock().take() {
            let _ = builder.join();
        }
        if let Some(cgroups) = &self.plan.cgroups {
            cgroups.close();
        }
    }
}

impl Drop for Rooms {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// What the thread does, until closed.
    fn build(&self, plan: &Plan) {
        let mut workshop = None;
        let mut stock = self.stock.lock();
        while !stock.is_closed {
            if stock.ready.len() >= AHEAD {
                self.wanted.wait(&mut stock);
                continue;
            }
            if let Some(Attempt { at, failure }) = &stock.last
                && failure.is_some()
                && at.elapsed() < RETRY_INTERVAL
            {
                let until = *at + RETRY_INTERVAL;
                self.wanted.wait_until(&mut stock, until);
                continue;
            }
            let made = MutexGuard::unlocked(&mut stock, || match &mut workshop {
                Some(workshop) => Workshop::furnish(workshop, plan),
                none => none.insert(Workshop::open()?).furnish(plan),
            });
            let was_failing = stock
                .last
                .as_ref()
                .is_some_and(|last| last.failure.is_some());
            let failure = match made {
                Ok(room) => {
                    stock.ready.push_back(room);
                    None
                }
                Err(error) => Some(error),
            };
            match &failure {
                Some(error) if !was_failing => {
                    tracing::error!("{error}; no action can run until then")
                }
                None if was_failing => tracing::info!("rooms for actions can be made again"),
                _ => {}
            }
            stock.last = Some(Attempt {
                at: Instant::now(),
                failure,
            });
            self.attempts.send_modify(|attempts| *attempts += 1);
        }
        // One that was made while it was closed.
        let ready = std::mem::take(&mut stock.ready);
        drop(stock);
        drop(ready);
    }

    /// The oldest, if there is one.
    fn pop(&self) -> Result<Option<Room>, RoomError> {
        let mut stock = self.stock.lock();
        if stock.is_closed {
            return Err(RoomError::at("stop")(io::Error::other("bb_runner stops")));
        }
        let room = stock.ready.pop_front();
        drop(stock);
        if room.is_some() {
            self.wanted.notify_one();
        }
        Ok(room)
    }

    /// The oldest, as soon as there is one.
    async fn next(&self) -> Result<Room, RoomError> {
        let mut attempts = self.attempts.subscribe();
        loop {
            if let Some(room) = self.pop()? {
                return Ok(room);
            }
            self.await_attempt(&mut attempts).await?;
        }
    }

    /// Waits for an attempt that this receiver has not seen.
    async fn await_attempt(&self, attempts: &mut watch::Receiver<u64>) -> Result<(), RoomError> {
        let attempted = tokio::time::timeout(FURNISH_TIMEOUT, attempts.changed()).await;
        if attempted.is_err() {
            return Err(RoomError::at("wait")(io::Error::other(format!(
                "it was not made within {FURNISH_TIMEOUT:?}"
            ))));
        }
        let stock = self.stock.lock();
        match stock.last.as_ref().and_then(|last| last.failure.clone()) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}
