//! Where results are looked at, for links in messages to clients.

use parking_lot::Mutex;

/// The configured one, or else the pages that the scheduler tells of.
#[derive(Debug)]
pub struct BrowserUrl {
    configured: Option<String>,
    told: Mutex<Option<String>>,
}

impl BrowserUrl {
    /// Empty for what the scheduler says.
    pub fn new(configured: &str) -> Self {
        BrowserUrl {
            configured: Some(configured.to_owned()).filter(|url| !url.is_empty()),
            told: Mutex::new(None),
        }
    }

    /// What the scheduler has said last; a scheduler of another kind says nothing.
    pub(super) fn tell(&self, url: Option<String>) {
        let mut told = self.told.lock();
        if *told != url {
            *told = url;
        }
    }

    /// `None` when there is none.
    pub fn get(&self) -> Option<String> {
        self.configured.clone().or_else(|| self.told.lock().clone())
    }
}
