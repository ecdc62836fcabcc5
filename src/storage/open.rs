//! Making the back end that a configuration asks for.

use std::sync::Arc;

use super::{Backend, Error, Separate, embedded, grpc, object::ObjectStorage, shards::Shards};
use crate::{
    config::{
        Endpoint,
        object_storage::ObjectService,
        scheduler::{self as config, StorageLocation},
        storage::Places,
    },
    daemon::{self, Credentials, Failure},
};

impl Backend {
    /// A client of REAPI servers, which connects at the first call.
    pub fn connect(cas: &Endpoint, action_cache: &Endpoint, options: grpc::Options) -> Self {
        Backend::Grpc(grpc::Client::connect(cas, action_cache, options))
    }

    /// Clients of the servers that are named, which connect at the first call; within a runtime where
    /// there are shards or object stores. `embedded` is the store for what is embedded, or the cache of a CAS of objects.
    pub fn connect_to(
        places: &Places<'_>,
        embedded: Option<Arc<embedded::Store>>,
        options: &grpc::Options,
    ) -> Result<Self, Failure> {
        let shards = || Backend::Shards(Shards::start(places.shards, places.health, options));
        let store = || match &embedded {
            Some(store) => Ok(Backend::Embedded(store.clone())),
            None => Err(Failure::Configuration {
                key: "storage.cas",
                message: "there is no embedded store here".to_owned(),
            }),
        };
        let place = |location: &StorageLocation| match location {
            StorageLocation::Embedded => store(),
            StorageLocation::Endpoint(at) => Ok(Self::connect(at, at, options.clone())),
            StorageLocation::Shards => Ok(shards()),
            StorageLocation::Objects(service) => {
                let cache = embedded.clone().filter(|_| location == places.cas);
                let opened =
                    ObjectStorage::open(*service, &places.objects, places.health, cache, options)?;
                opened.warn_of_refusal();
                Ok(Backend::Objects(opened))
            }
        };
        match (places.cas, places.action_cache) {
            (StorageLocation::Endpoint(cas), StorageLocation::Endpoint(action_cache)) => {
                Ok(Self::connect(cas, action_cache, options.clone()))
            }
            (cas, action_cache) if cas == action_cache => place(cas),
            (cas, action_cache) => Ok(Backend::Separate(Arc::new(Separate {
                cas: place(cas)?,
                action_cache: place(action_cache)?,
            }))),
        }
    }

    /// Opens the embedded store, which blocks for up to a few seconds, or prepares to connect.
    pub fn open(config: &config::Storage, credentials: Credentials) -> Result<Self, Failure> {
        let places = config.places();
        let embedded = match places.has_embedded() {
            true => Some(open_embedded(&config.embedded)?),
            false => None,
        };
        let options = grpc::Options {
            credentials,
            ..Default::default()
        };
        Self::connect_to(&places, embedded, &options)
    }

    /// What would keep this storage from working.
    pub async fn probe(config: &config::Storage) -> Vec<Failure> {
        let places = config.places();
        let mut failures = Vec::new();
        if places.has_embedded() {
            let embedded = &config.embedded;
            failures.extend(embedded::probe(
                &embedded.directory,
                embedded.maximum_size.0,
            ));
        }
        let credentials = Credentials::of("storage.tls", &config.tls);
        let credentials = credentials
            .clone()
            .with_headers(config.call_headers(), None)
            // That is told by itself.
            .unwrap_or(credentials);
        let credentials = credentials
            .clone()
            .with_secrets(places.secret_files(), None)
            .unwrap_or(credentials);
        let options = grpc::Options {
            credentials,
            ..Default::default()
        };
        failures.extend(probe_servers(&places, &options).await);
        failures
    }

    /// Whether there is a storage at the other end.
    pub async fn answers(&self) -> Result<(), Error> {
        for place in [self.cas(), self.action_cache()] {
            place.answers().await?;
        }
        Ok(())
    }
}

/// Each server and service that does not answer, with the key that names it.
pub async fn probe_servers(places: &Places<'_>, options: &grpc::Options) -> Vec<Failure> {
    let mut servers: Vec<(&'static str, String, &Endpoint)> = Vec::new();
    for (key, place) in [
        ("storage.cas", places.cas),
        ("storage.action_cache", places.action_cache),
    ] {
        if let Some(endpoint) = place.endpoint()
            && servers.iter().all(|(_, _, other)| *other != endpoint)
        {
            servers.push((key, endpoint.to_string(), endpoint));
        }
    }
    if places.has_shards() {
        for shard in places.shards {
            for endpoint in &shard.endpoints {
                let name = format!("shard {} at {endpoint}", shard.name);
                servers.push(("storage.shards", name, endpoint));
            }
        }
    }
    let asked = servers.into_iter().map(|(key, name, endpoint)| async move {
        let client = grpc::Client::connect(endpoint, endpoint, options.clone());
        let error = client.probe().await.err()?;
        let message = format!("{name}: {error}; {}", remedy(&error));
        Some(Failure::Configuration { key, message })
    });
    let answers = futures::future::join_all(asked).await;
    let mut services = places.services();
    // That is told by itself.
    services.retain(|service| places.objects.is_complete(*service));
    let services = services.into_iter();
    let asked = services.map(|service| probe_service(service, places, options));
    let others = futures::future::join_all(asked).await;
    answers.into_iter().chain(others).flatten().collect()
}

/// What is wrong with an object store, or with Redis.
async fn probe_service(
    service: ObjectService,
    places: &Places<'_>,
    options: &grpc::Options,
) -> Option<Failure> {
    let key = service.section();
    let opened = match ObjectStorage::open(service, &places.objects, places.health, None, options) {
        Ok(opened) => opened,
        Err(failure) => return Some(failure),
    };
    let limit = options.timeouts.capabilities;
    let message = match tokio::time::timeout(limit, opened.probe()).await {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it did not answer within {} seconds", limit.as_secs()),
    };
    Some(Failure::Configuration { key, message })
}

/// What to do about a server that is none, or that does not answer.
fn remedy(error: &Error) -> &'static str {
    match error {
        Error::Invalid(_) => "write the port of a storage server",
        Error::Unavailable(_) => {
            "see that it runs there and can be reached from this host, or write where the storage is"
        }
        _ => {
            "see what its log says of this call, and what storage.tls, storage.authorization_file and storage.add_metadata show it"
        }
    }
}

fn open_embedded(config: &config::Embedded) -> Result<Arc<embedded::Store>, Failure> {
    let size = config.maximum_size.0;
    let directory = &config.directory;
    let store = embedded::Store::open_configured(config)?;
    tracing::info!(
        directory = %directory.display(),
        entries = store.count(),
        bytes = store.used(),
        "opened the embedded store"
    );
    if let Some(disk) = daemon::disk::space(directory)
        && store.used().saturating_add(disk.available) < size
    {
        tracing::warn!(
            directory = %directory.display(),
            left = %daemon::disk::rounded_to_mib(store.used() + disk.available),
            "the disk has less left for the embedded store than storage.embedded.maximum_size, \
             {}; lower that, or free space there",
            config.maximum_size
        );
    }
    Ok(Arc::new(store))
}
