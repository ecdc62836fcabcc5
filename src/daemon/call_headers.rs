//! Headers that our clients show in each call: those of the configuration, as Buildbarn's `add_metadata`, and
//! the token in a file.

use std::{path::Path, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};

use super::{
    Failure, Lifecycle,
    reloadable::{Reloadable, read_small},
    tokens::LONGEST_TOKEN,
};
use crate::config::call_headers::CallHeaders as Config;

/// What is shown. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct CallHeaders {
    added: Arc<HeaderMap>,
    authorization: Option<Arc<Reloadable<HeaderValue>>>,
}

impl CallHeaders {
    /// As configured. The file is read again when it changes.
    pub(super) fn open(config: Config<'_>, lifecycle: Option<&Lifecycle>) -> Result<Self, Failure> {
        let pairs = config
            .add_metadata
            .iter()
            .flat_map(|added| added.values.iter().map(|value| (&added.header, value)));
        // The configuration's check refuses others.
        let parsed = pairs.filter_map(|(header, value)| {
            let name = HeaderName::from_bytes(header.as_bytes()).ok()?;
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        });
        let mut added = HeaderMap::new();
        for (name, value) in parsed {
            added.append(name, value);
        }
        let [_, key] = config.keys;
        let authorization = match config.authorization_file.as_os_str().is_empty() {
            true => None,
            false => {
                let opened = authorization(key, config.authorization_file);
                Some(opened.map_err(|message| Failure::Configuration { key, message })?)
            }
        };
        if let (Some(lifecycle), Some(file)) = (lifecycle, &authorization) {
            lifecycle.keep_fresh(file);
        }
        Ok(CallHeaders {
            added: Arc::new(added),
            authorization,
        })
    }

    /// Adds them to those of a call.
    pub(super) fn add_to(&self, headers: &mut HeaderMap) {
        for (name, value) in &*self.added {
            headers.append(name, value.clone());
        }
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, HeaderValue::clone(&authorization.value()));
        }
    }
}

/// The header that shows the token in a file.
fn authorization(key: &'static str, path: &Path) -> Result<Arc<Reloadable<HeaderValue>>, String> {
    let from = path.to_owned();
    Reloadable::open(key, [path.to_owned()], move || {
        let refuse = |why: &str| format!("{}: {why}", from.display());
        let data = read_small(&from)?;
        let token = data.trim_ascii();
        if token.is_empty() {
            return Err(refuse("it is empty; write a token into it"));
        }
        if token.len() > LONGEST_TOKEN {
            return Err(refuse("it is longer than a token may be, 12 KiB"));
        }
        if !token.iter().all(u8::is_ascii_graphic) {
            return Err(refuse(
                "it is not a file with one token; write nothing else into it, nor the word Bearer",
            ));
        }
        let header = HeaderValue::from_bytes(&[b"Bearer ", token].concat());
        let mut header = header.map_err(|_| refuse("it is not a file with one token"))?;
        header.set_sensitive(true);
        Ok(header)
    })
}
