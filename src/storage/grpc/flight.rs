//! Single flight: who asks for a blob that somebody is fetching waits for that one.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{digest::Digest, instance::InstanceName, storage::Error};

type Landing = Option<Result<Bytes, Error>>;
type Name = (InstanceName, Digest);

/// Reads under way.
#[derive(Clone, Default)]
pub struct Flights(Arc<Mutex<HashMap<Name, watch::Receiver<Landing>>>>);

pub enum Seat {
    /// Nobody else fetches it.
    Pilot(Pilot),
    Passenger(Passenger),
}

/// Whoever fetches. Dropped without having landed, its passengers must see for themselves.
pub struct Pilot {
    flights: Flights,
    name: Name,
    landing: watch::Sender<Landing>,
}

pub struct Passenger(watch::Receiver<Landing>);

impl Flights {
    pub fn board(&self, instance: &InstanceName, digest: &Digest) -> Seat {
        let name = (instance.clone(), *digest);
        let mut flights = self.0.lock();
        if let Some(landing) = flights.get(&name) {
            return Seat::Passenger(Passenger(landing.clone()));
        }
        let (landing, receiver) = watch::channel(None);
        flights.insert(name.clone(), receiver);
        Seat::Pilot(Pilot {
            flights: self.clone(),
            name,
            landing,
        })
    }
}

impl Pilot {
    pub fn digest(&self) -> &Digest {
        &self.name.1
    }

    /// To see one's own landing.
    pub fn passenger(&self) -> Passenger {
        Passenger(self.landing.subscribe())
    }

    pub fn land(self, result: Result<Bytes, Error>) {
        self.landing.send_replace(Some(result));
    }
}

impl Drop for Pilot {
    fn drop(&mut self) {
        self.flights.0.lock().remove(&self.name);
    }
}

impl Passenger {
    /// `None` when the pilot gave up.
    pub async fn arrive(mut self) -> Option<Result<Bytes, Error>> {
        let landed = self.0.wait_for(Option::is_some).await.ok()?;
        landed.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    #[tokio::test]
    async fn passengers_share_the_pilot_s_result_and_learn_when_there_is_none() {
        let flights = Flights::default();
        let (instance, digest) = (InstanceName::empty(), DigestFunction::Sha256.empty());
        let board = || flights.board(&instance, &digest);
        let Seat::Pilot(pilot) = board() else {
            panic!("the first is the pilot");
        };
        let Seat::Passenger(early) = board() else {
            panic!("the second is a passenger");
        };
        pilot.land(Ok(Bytes::from_static(b"x")));
        assert_eq!(early.arrive().await.unwrap().unwrap(), "x");
        let Seat::Pilot(pilot) = board() else {
            panic!("a new flight");
        };
        let Seat::Passenger(stranded) = board() else {
            panic!("its passenger");
        };
        drop(pilot);
        assert!(stranded.arrive().await.is_none());
        assert!(matches!(board(), Seat::Pilot(_)));
    }
}
