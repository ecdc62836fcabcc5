//! S3, Google Cloud Storage and Azure Blob Storage, by the crate object_store.

use std::{error::Error as StdError, ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use http::StatusCode;
use object_store::{
    GetOptions, GetRange, MultipartId, ObjectStore, ObjectStoreExt, RetryConfig,
    aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder,
    client::{HttpError, HttpErrorKind},
    gcp::GoogleCloudStorageBuilder,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::{
    attempt::{FailedAttempt, Pieces, WrittenPart},
    http::{HttpRefusal, HttpTransport},
    secrets::{AwsSecret, AzureSecret, GoogleSecret, Secret},
};
use crate::{
    config::object_storage::{Azure, Gcs, HttpEndpoint, ObjectService, S3},
    daemon::{Credentials, Failure},
    storage::{Error, retry::Transience},
};

/// How a client connects.
pub(super) struct Connecting<'c> {
    pub credentials: &'c Credentials,
    /// How long a server may be silent.
    pub timeout: Duration,
}

impl Connecting<'_> {
    fn transport(&self) -> HttpTransport {
        HttpTransport::new(self.credentials.clone(), self.timeout)
    }
}

/// Whoever asks tries again.
fn once() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// A bucket.
#[derive(Clone)]
pub(super) struct Cloud {
    objects: Arc<dyn ObjectStore>,
    parts: Arc<dyn MultipartStore>,
    service: ObjectService,
    /// For errors.
    place: Arc<str>,
    bucket: Arc<str>,
}

/// An object that is written in parts.
pub(super) struct CloudWrite {
    cloud: Cloud,
    path: Path,
    id: MultipartId,
}

impl Cloud {
    /// 10,000 parts of 64 MiB.
    pub(super) const LARGEST_VALUE: u64 = 10_000 * (64 << 20);
    pub(super) const CONCURRENCY: usize = 64;

    pub(super) fn s3(config: &S3, with: &Connecting<'_>) -> Result<Self, Failure> {
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(&config.bucket)
            .with_retry(once())
            .with_http_connector(with.transport());
        if !config.region.is_empty() {
            builder = builder.with_region(&config.region);
        }
        if config.endpoint.server.is_some() {
            let endpoint = config.endpoint.to_string();
            builder = builder.with_endpoint(endpoint).with_allow_http(true);
        }
        if let Some(secret) = Secret::of(ObjectService::S3, with.credentials) {
            builder = builder.with_credentials(Arc::new(AwsSecret(secret)));
        }
        let store = builder.build();
        Cloud::of(ObjectService::S3, &config.bucket, &config.endpoint, store)
    }

    pub(super) fn gcs(config: &Gcs, with: &Connecting<'_>) -> Result<Self, Failure> {
        let mut builder = GoogleCloudStorageBuilder::from_env()
            .with_bucket_name(&config.bucket)
            .with_retry(once())
            .with_http_connector(with.transport());
        if config.endpoint.server.is_some() {
            builder = builder.with_base_url(&config.endpoint.to_string());
        }
        if let Some(secret) = Secret::of(ObjectService::Gcs, with.credentials) {
            let secret = GoogleSecret::new(secret, with.transport());
            builder = builder.with_credentials(Arc::new(secret));
        }
        let store = builder.build();
        Cloud::of(ObjectService::Gcs, &config.bucket, &config.endpoint, store)
    }

    pub(super) fn azure(config: &Azure, with: &Connecting<'_>) -> Result<Self, Failure> {
        let mut builder = MicrosoftAzureBuilder::from_env()
            .with_account(&config.account)
            .with_container_name(&config.container)
            .with_retry(once())
            .with_http_connector(with.transport());
        if config.endpoint.server.is_some() {
            let endpoint = config.endpoint.to_string();
            builder = builder.with_endpoint(endpoint).with_allow_http(true);
        }
        if let Some(secret) = Secret::of(ObjectService::Azure, with.credentials) {
            builder = builder.with_credentials(Arc::new(AzureSecret(secret)));
        }
        let store = builder.build();
        let (bucket, endpoint) = (&config.container, &config.endpoint);
        Cloud::of(ObjectService::Azure, bucket, endpoint, store)
    }

    fn of<S: ObjectStore + MultipartStore>(
        service: ObjectService,
        bucket: &str,
        endpoint: &HttpEndpoint,
        store: object_store::Result<S>,
    ) -> Result<Self, Failure> {
        let store = store.map_err(|error| Failure::Configuration {
            key: service.section(),
            message: causes(&error),
        })?;
        let name = service.name();
        let place = match &endpoint.server {
            Some(_) => format!("{name} bucket {bucket} at {endpoint}"),
            None => format!("{name} bucket {bucket}"),
        };
        let store = Arc::new(store);
        Ok(Cloud {
            objects: store.clone(),
            parts: store,
            service,
            place: place.into(),
            bucket: bucket.into(),
        })
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// An object that is not there: an answer about the bucket is another one.
    pub(super) async fn probe(&self) -> Result<(), FailedAttempt> {
        let path = Path::from("bb-remote-execution-probe");
        match self.objects.get(&path).await {
            Ok(_) => Ok(()),
            Err(error) => self.absent_or(error).map(drop),
        }
    }

    pub(super) async fn size(&self, name: &str) -> Result<Option<u64>, FailedAttempt> {
        match self.objects.head(&Path::from(name)).await {
            Ok(object) => Ok(Some(object.size)),
            Err(error) => self.absent_or(error).map(|()| None),
        }
    }

    pub(super) async fn read(
        &self,
        name: &str,
        range: Range<u64>,
        size: u64,
    ) -> Result<Option<Pieces>, FailedAttempt> {
        let is_whole = range == (0..size);
        let options = GetOptions {
            range: (!is_whole).then_some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        match self.objects.get_opts(&Path::from(name), options).await {
            Ok(object) => {
                let cloud = self.clone();
                let pieces = object.into_stream();
                let pieces = pieces.map_err(move |error| cloud.failure(&error));
                Ok(Some(pieces.boxed()))
            }
            Err(error) => self.absent_or(error).map(|()| None),
        }
    }

    pub(super) async fn read_all(
        &self,
        name: &str,
        most: u64,
    ) -> Result<Option<Bytes>, FailedAttempt> {
        let object = match self.objects.get(&Path::from(name)).await {
            Ok(object) => object,
            Err(error) => return self.absent_or(error).map(|()| None),
        };
        let size = object.meta.size;
        let too_large = || {
            let text = format!("{}: object {name} has more than {most} bytes", self.place);
            FailedAttempt::permanent(Error::Internal(text))
        };
        if size > most {
            return Err(too_large());
        }
        let mut value = BytesMut::with_capacity(size as usize);
        let mut pieces = object.into_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| self.failure(&error))?;
            if (value.len() + piece.len()) as u64 > most {
                return Err(too_large());
            }
            value.extend_from_slice(&piece);
        }
        Ok(Some(value.freeze()))
    }

    pub(super) async fn write(&self, name: &str, value: Bytes) -> Result<(), FailedAttempt> {
        let written = self.objects.put(&Path::from(name), value.into()).await;
        written.map(drop).map_err(|error| self.failure(&error))
    }

    pub(super) async fn begin(&self, name: &str) -> Result<CloudWrite, FailedAttempt> {
        let path = Path::from(name);
        let id = self.parts.create_multipart(&path).await;
        Ok(CloudWrite {
            cloud: self.clone(),
            path,
            id: id.map_err(|error| self.failure(&error))?,
        })
    }

    /// Nothing where an object is not there; an error of anything else.
    fn absent_or(&self, error: object_store::Error) -> Result<(), FailedAttempt> {
        let is_absent = match refusal(&error) {
            Some(refusal) => {
                refusal.status == StatusCode::NOT_FOUND && !is_about_the_bucket(refusal)
            }
            None => matches!(error, object_store::Error::NotFound { .. }),
        };
        match is_absent {
            true => Ok(()),
            false => Err(self.failure(&error)),
        }
    }

    /// What an error means, and who must act.
    fn failure(&self, error: &object_store::Error) -> FailedAttempt {
        let (place, section) = (&self.place, self.service.section());
        let Some(refusal) = refusal(error) else {
            let text = format!("{place}: {}", causes(error));
            let of_http = find::<HttpError>(error).map(HttpError::kind);
            return match of_http {
                Some(HttpErrorKind::Decode) | None => {
                    FailedAttempt::permanent(Error::Internal(text))
                }
                Some(_) => FailedAttempt::unavailable(text),
            };
        };
        let text = format!("{place}: {refusal}");
        if is_about_the_bucket(refusal) {
            let bucket = &self.bucket;
            return FailedAttempt::permanent(Error::Internal(format!(
                "{text}; make the bucket {bucket}, or correct {section}"
            )));
        }
        match refusal.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let key = self.service.secret_key();
                FailedAttempt::permanent(Error::Internal(format!(
                    "{text}; let whoever {key} names read, write and list in {}",
                    self.bucket
                )))
            }
            StatusCode::INSUFFICIENT_STORAGE => FailedAttempt {
                error: Error::Full(text),
                transience: Transience::Doubtful,
            },
            status if status.is_server_error() => FailedAttempt::unavailable(text),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT => {
                FailedAttempt::unavailable(text)
            }
            _ => FailedAttempt::permanent(Error::Internal(text)),
        }
    }
}

impl CloudWrite {
    pub(super) async fn part(
        &self,
        number: usize,
        data: Bytes,
    ) -> Result<WrittenPart, FailedAttempt> {
        let parts = &self.cloud.parts;
        let written = parts.put_part(&self.path, &self.id, number, data.into());
        match written.await {
            Ok(part) => Ok(WrittenPart(part.content_id)),
            Err(error) => Err(self.cloud.failure(&error)),
        }
    }

    pub(super) async fn finish(&self, parts: &[WrittenPart]) -> Result<(), FailedAttempt> {
        let ids = parts.iter().map(|part| PartId {
            content_id: part.0.clone(),
        });
        let store = &self.cloud.parts;
        let done = store.complete_multipart(&self.path, &self.id, ids.collect());
        let done = done.await;
        done.map(drop).map_err(|error| self.cloud.failure(&error))
    }

    pub(super) async fn abandon(&self) {
        let store = &self.cloud.parts;
        // A life-cycle rule of the bucket does it otherwise.
        let _ = store.abort_multipart(&self.path, &self.id).await;
    }
}

/// The bucket or container itself is wanting.
fn is_about_the_bucket(refusal: &HttpRefusal) -> bool {
    let code = refusal.code.as_str();
    matches!(
        code,
        "NoSuchBucket" | "ContainerNotFound" | "InvalidBucketName"
    ) || refusal.message.contains("bucket does not exist")
}

fn refusal(error: &object_store::Error) -> Option<&HttpRefusal> {
    find(error)
}

fn find<T: StdError + 'static>(error: &object_store::Error) -> Option<&T> {
    let mut all = std::iter::successors(Some(error as &(dyn StdError + 'static)), |error| {
        (*error).source()
    });
    all.find_map(|error| error.downcast_ref())
}

/// The last cause: those before it repeat it, with addresses.
fn causes(error: &object_store::Error) -> String {
    let all = std::iter::successors(Some(error as &(dyn StdError + 'static)), |error| {
        (*error).source()
    });
    all.last().map(ToString::to_string).unwrap_or_default()
}
