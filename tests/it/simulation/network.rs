//! The network, which loses and delays.

use super::*;

impl World {
    pub fn lost(&mut self) -> bool {
        !self.healed && self.random.chance(6)
    }

    pub fn delay(&mut self) -> Duration {
        match self.healed || self.random.chance(90) {
            true => self.random.up_to(20),
            false => self.random.up_to(20_000),
        }
    }

    /// Until an end notices that the other one is gone.
    pub fn notice(&mut self) -> Duration {
        match self.healed || self.random.chance(70) {
            true => self.random.up_to(200),
            false => self.random.up_to(80_000),
        }
    }
}
