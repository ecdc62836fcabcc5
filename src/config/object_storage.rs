//! Object stores and Redis, in a configuration: where the blobs are, and which file has the secret.
//!
//! No secret is written here: a file has it, which is read again when it changes, or the environment.

#![expect(
    missing_docs,
    reason = "keys are described in bb_scheduler.toml(5) and bb_worker.toml(5), as a test sees to"
)]

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::LazyLock,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Diagnostics, Endpoint};

/// Whose protocol is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectService {
    S3,
    Gcs,
    Azure,
    Redis,
}

/// A bucket of S3, or of a server that speaks its protocol.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3 {
    pub bucket: String,
    /// Before the names of all objects.
    pub prefix: String,
    /// Empty for the environment's, or us-east-1.
    pub region: String,
    /// Empty for Amazon's.
    pub endpoint: HttpEndpoint,
    /// As that of the AWS tools; empty for the environment's, or those of the instance.
    pub credentials_file: PathBuf,
}

/// A bucket of Google Cloud Storage.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gcs {
    pub bucket: String,
    pub prefix: String,
    /// Empty for Google's.
    pub endpoint: HttpEndpoint,
    /// The JSON of a service account; empty for the environment's, or those of the instance.
    pub credentials_file: PathBuf,
}

/// A container of Azure Blob Storage.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Azure {
    pub account: String,
    pub container: String,
    pub prefix: String,
    /// Empty for Microsoft's.
    pub endpoint: HttpEndpoint,
    /// With an access key; empty for the environment's, or those of the instance.
    pub credentials_file: PathBuf,
}

/// A database of a Redis server.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Redis {
    pub endpoint: RedisEndpoint,
    pub database: u32,
    pub prefix: String,
    /// Empty for the default user.
    pub username: String,
    /// Empty for none.
    pub password_file: PathBuf,
}

/// All of these sections.
#[derive(Clone, Copy, Debug)]
pub struct ObjectStores<'c> {
    pub s3: &'c S3,
    pub gcs: &'c Gcs,
    pub azure: &'c Azure,
    pub redis: &'c Redis,
}

/// Nothing is in any of them.
static DEFAULTS: LazyLock<(S3, Gcs, Azure, Redis)> = LazyLock::new(Default::default);

impl Default for ObjectStores<'static> {
    fn default() -> Self {
        let (s3, gcs, azure, redis) = &*DEFAULTS;
        ObjectStores {
            s3,
            gcs,
            azure,
            redis,
        }
    }
}

/// The server of an object store; written as `""` for the service's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpEndpoint {
    pub server: Option<Endpoint>,
    /// Where the service is on that server: empty, or `/` and words with `/` between them.
    pub path: String,
}

/// A Redis server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisEndpoint(pub Endpoint);

impl Default for RedisEndpoint {
    fn default() -> Self {
        RedisEndpoint(Endpoint::Tcp("127.0.0.1:6379".to_owned()))
    }
}

/// A service's own server, at whatever address.
static PUBLIC: Endpoint = Endpoint::Tls(String::new());

impl ObjectService {
    pub const ALL: [ObjectService; 4] = [
        ObjectService::S3,
        ObjectService::Gcs,
        ObjectService::Azure,
        ObjectService::Redis,
    ];

    /// What `storage.cas` calls it.
    pub fn name(self) -> &'static str {
        match self {
            ObjectService::S3 => "s3",
            ObjectService::Gcs => "gcs",
            ObjectService::Azure => "azure",
            ObjectService::Redis => "redis",
        }
    }

    /// Its section.
    pub fn section(self) -> &'static str {
        match self {
            ObjectService::S3 => "storage.s3",
            ObjectService::Gcs => "storage.gcs",
            ObjectService::Azure => "storage.azure",
            ObjectService::Redis => "storage.redis",
        }
    }

    /// The key that names the file with its secret.
    pub fn secret_key(self) -> &'static str {
        match self {
            ObjectService::S3 => "storage.s3.credentials_file",
            ObjectService::Gcs => "storage.gcs.credentials_file",
            ObjectService::Azure => "storage.azure.credentials_file",
            ObjectService::Redis => "storage.redis.password_file",
        }
    }
}

impl<'c> ObjectStores<'c> {
    /// What leads to one.
    pub fn endpoint(&self, service: ObjectService) -> &'c Endpoint {
        let http = |endpoint: &'c HttpEndpoint| endpoint.server.as_ref().unwrap_or(&PUBLIC);
        match service {
            ObjectService::S3 => http(&self.s3.endpoint),
            ObjectService::Gcs => http(&self.gcs.endpoint),
            ObjectService::Azure => http(&self.azure.endpoint),
            ObjectService::Redis => &self.redis.endpoint.0,
        }
    }

    /// The file with its secret, where one is named.
    pub fn secret_file(&self, service: ObjectService) -> Option<&'c Path> {
        let file: &Path = match service {
            ObjectService::S3 => &self.s3.credentials_file,
            ObjectService::Gcs => &self.gcs.credentials_file,
            ObjectService::Azure => &self.azure.credentials_file,
            ObjectService::Redis => &self.redis.password_file,
        };
        (!file.as_os_str().is_empty()).then_some(file)
    }

    fn prefix(&self, service: ObjectService) -> &'c str {
        match service {
            ObjectService::S3 => &self.s3.prefix,
            ObjectService::Gcs => &self.gcs.prefix,
            ObjectService::Azure => &self.azure.prefix,
            ObjectService::Redis => &self.redis.prefix,
        }
    }

    fn is_written(&self, service: ObjectService) -> bool {
        match service {
            ObjectService::S3 => *self.s3 != S3::default(),
            ObjectService::Gcs => *self.gcs != Gcs::default(),
            ObjectService::Azure => *self.azure != Azure::default(),
            ObjectService::Redis => *self.redis != Redis::default(),
        }
    }

    /// What no host is needed to find wrong.
    /// `used` are those that are used, each with the key that says so.
    pub(super) fn validate(
        &self,
        used: &[(ObjectService, &'static str)],
        diagnostics: &mut Diagnostics,
    ) {
        for service in ObjectService::ALL {
            let (section, name) = (service.section(), service.name());
            let place = used.iter().find(|(other, _)| *other == service);
            let is_used = place.is_some();
            diagnostics.require(
                is_used || !self.is_written(service),
                section,
                format!("neither storage.cas nor storage.action_cache is \"{name}\", so that this does nothing; write cas = \"{name}\""),
            );
            diagnostics.require(
                is_prefix(self.prefix(service)),
                &format!("{section}.prefix"),
                "it is put before the names of objects; write words of letters, digits, - _ and . with / between them, such as \"farm/builds\", or nothing",
            );
            diagnostics.require(
                self.secret_file(service).is_none_or(Path::is_absolute),
                service.secret_key(),
                "the path must begin with /, since a daemon has no directory of its own to begin at",
            );
            if let Some((_, place)) = place {
                self.require_names(service, place, diagnostics);
            }
        }
        for (key, endpoint) in [
            ("storage.s3.endpoint", &self.s3.endpoint),
            ("storage.gcs.endpoint", &self.gcs.endpoint),
        ] {
            diagnostics.require(
                endpoint.path.is_empty(),
                key,
                "it is a server, without a path; the bucket has a key of its own",
            );
        }
        diagnostics.require(
            self.redis.username.is_empty() || !self.redis.password_file.as_os_str().is_empty(),
            "storage.redis.username",
            "a user needs a password; name the file that has it with storage.redis.password_file",
        );
    }

    /// Whether it is said where the blobs are.
    pub fn is_complete(&self, service: ObjectService) -> bool {
        self.names(service).iter().all(|(_, name)| !name.is_empty())
    }

    /// What says where the blobs are, by their keys.
    fn names(&self, service: ObjectService) -> Vec<(&'static str, &'c str)> {
        match service {
            ObjectService::S3 => vec![("storage.s3.bucket", &self.s3.bucket)],
            ObjectService::Gcs => vec![("storage.gcs.bucket", &self.gcs.bucket)],
            ObjectService::Azure => vec![
                ("storage.azure.account", &self.azure.account),
                ("storage.azure.container", &self.azure.container),
            ],
            ObjectService::Redis => Vec::new(),
        }
    }

    /// `place` is the key that says that it is used.
    fn require_names(&self, service: ObjectService, place: &str, diagnostics: &mut Diagnostics) {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        for (key, name) in self.names(service) {
            diagnostics.require(
                !name.is_empty(),
                place,
                format!("it is not said where the blobs are; write {key}, such as \"example-farm\", of one that was made before, with a life-cycle rule for what is old"),
            );
            diagnostics.require(
                name.chars().all(plain),
                key,
                "it is a name of letters, digits, - _ and ., such as \"example-farm\"",
            );
        }
    }
}

fn is_prefix(prefix: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_word = |word: &str| !matches!(word, "" | "." | "..") && word.chars().all(plain);
    prefix.is_empty() || prefix.split('/').all(is_word)
}

impl FromStr for HttpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(HttpEndpoint::default());
        }
        let refuse = || {
            format!(
                "{text:?} is no server of an object store; write \"https://objects.example\", \"http://127.0.0.1:9000\", or \"\" for the service's own"
            )
        };
        let (rest, is_tls) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => return Err(refuse()),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.strip_suffix('/').unwrap_or(path);
        if !is_prefix(path) {
            return Err(refuse());
        }
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let scheme = if is_tls { "grpcs" } else { "grpc" };
        let endpoint = match (has_port, is_tls) {
            (true, _) => format!("{scheme}://{authority}"),
            (false, true) => format!("{scheme}://{authority}:443"),
            (false, false) => format!("{scheme}://{authority}:80"),
        };
        let endpoint = endpoint.parse().map_err(|_| refuse())?;
        let before = if path.is_empty() { "" } else { "/" };
        Ok(HttpEndpoint {
            server: Some(endpoint),
            path: format!("{before}{path}"),
        })
    }
}

impl fmt::Display for HttpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = |authority: &str, port: &str| match authority.strip_suffix(port) {
            Some(host) => host.to_owned(),
            None => authority.to_owned(),
        };
        match &self.server {
            Some(Endpoint::Tls(authority)) => write!(f, "https://{}", default(authority, ":443"))?,
            Some(Endpoint::Tcp(authority)) => write!(f, "http://{}", default(authority, ":80"))?,
            Some(Endpoint::Unix(_)) | None => {}
        }
        f.write_str(&self.path)
    }
}

impl FromStr for RedisEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "{text:?} is no Redis server; write \"redis://redis.example:6379\", \"rediss://redis.example:6379\" for TLS, or \"unix:/run/redis/redis-server.sock\""
            )
        };
        let with_port = |authority: &str| {
            let (_, port) = authority.rsplit_once(':').unwrap_or_default();
            match port.parse::<u16>() {
                Ok(_) => authority.to_owned(),
                Err(_) => format!("{authority}:6379"),
            }
        };
        let endpoint = if let Some(authority) = text.strip_prefix("rediss://") {
            format!("grpcs://{}", with_port(authority))
        } else if let Some(authority) = text.strip_prefix("redis://") {
            format!("grpc://{}", with_port(authority))
        } else if text.starts_with("unix:") {
            text.to_owned()
        } else {
            return Err(refuse());
        };
        endpoint.parse().map(RedisEndpoint).map_err(|_| refuse())
    }
}

impl fmt::Display for RedisEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Endpoint::Tls(authority) => write!(f, "rediss://{authority}"),
            Endpoint::Tcp(authority) => write!(f, "redis://{authority}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

macro_rules! as_string {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
as_string!(HttpEndpoint, RedisEndpoint);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_write_themselves_as_they_are_read() {
        for text in [
            "",
            "https://objects.example",
            "http://127.0.0.1:9000",
            "https://[::1]:9",
            "http://127.0.0.1:10000/devstoreaccount1",
        ] {
            assert_eq!(text.parse::<HttpEndpoint>().unwrap().to_string(), text);
        }
        for text in [
            "redis://a:6379",
            "rediss://a.example:1",
            "unix:/run/redis.sock",
        ] {
            assert_eq!(text.parse::<RedisEndpoint>().unwrap().to_string(), text);
        }
        let default: RedisEndpoint = "redis://a".parse().unwrap();
        assert_eq!(default.to_string(), "redis://a:6379");
        for text in [
            "objects.example",
            "ftp://a",
            "http://a/b?c",
            "http://a/../b",
            "https://user:secret@a",
        ] {
            let error = text.parse::<HttpEndpoint>().unwrap_err();
            assert!(error.contains("https://objects.example"), "{error}");
        }
        for text in ["a:6379", "redis://user:secret@a:1", "unix:x"] {
            let error = text.parse::<RedisEndpoint>().unwrap_err();
            assert!(error.contains("redis://redis.example:6379"), "{error}");
        }
    }

    #[test]
    fn prefixes_are_words_with_slashes_between_them() {
        assert!(
            ["", "a", "farm/builds", "a.b-c_d"]
                .iter()
                .all(|prefix| is_prefix(prefix))
        );
        assert!(
            !["/", "/a", "a/", "a//b", "..", "a b", "ä"]
                .iter()
                .any(|prefix| is_prefix(prefix))
        );
    }
}
