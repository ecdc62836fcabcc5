//! Values as people write them in TOML: durations and sizes with their units, addresses, endpoints.
//!
//! Every type here is parsed from one string, writes itself back as that string, and says in its
//! error what a right value looks like.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! from_string {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(<$type>::EXPECTED)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
from_string!(Duration, Size, ListenAddress, Endpoint);

/// A length of time, such as `"60s"`, `"15min"` or `"1h 30min"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duration(pub std::time::Duration);

impl Duration {
    const EXPECTED: &str = r#"a duration with its unit, such as "60s", "15min" or "1h 30min""#;
    /// So that the time in so long is a time.
    const LONGEST: std::time::Duration = std::time::Duration::from_secs(10 * 366 * 24 * 60 * 60);

    /// So many seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Duration(std::time::Duration::from_secs(seconds))
    }

    /// The value as the standard library has it.
    pub fn get(self) -> std::time::Duration {
        self.0
    }
}

impl FromStr for Duration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) if duration <= Self::LONGEST => Ok(Duration(duration)),
            Ok(_) => Err(format!("{text:?} is more than ten years")),
            Err(_) => Err(format!("{text:?} is no duration; write {}", Self::EXPECTED)),
        }
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number of bytes, such as `"10GiB"`, `"64KiB"` or `"500MB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl Size {
    const EXPECTED: &str = r#"a size with its unit, such as "10GiB", "64KiB" or "500MB""#;

    /// So many mebibytes.
    pub const fn mib(count: u64) -> Self {
        Size(count << 20)
    }

    /// So many gibibytes.
    pub const fn gib(count: u64) -> Self {
        Size(count << 30)
    }

    /// The number of bytes.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is no size; write {}", Self::EXPECTED);
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refuse)?;
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| refuse())?;
        let (_, factor) = UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim())
            .ok_or_else(refuse)?;
        number
            .checked_mul(*factor)
            .map(Size)
            .ok_or_else(|| format!("{text:?} is more than 16 EiB"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS[..4]
            .iter()
            .find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor))
            .unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// An address and a port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl ListenAddress {
    const EXPECTED: &str = r#"an address to listen on, such as "127.0.0.1:8980", "[::1]:8980" or "unix:/run/bb-runner/runner.sock""#;
}

impl ListenAddress {
    /// Whether a host cannot listen on both. Ports that the kernel chooses never meet.
    pub fn meets(&self, other: &ListenAddress) -> bool {
        match (self, other) {
            (ListenAddress::Tcp(a), ListenAddress::Tcp(b)) => {
                let all = a.ip().is_unspecified() || b.ip().is_unspecified();
                a.port() == b.port() && a.port() != 0 && (all || a.ip() == b.ip())
            }
            (a, b) => a == b,
        }
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) => absolute(path).map(ListenAddress::Unix),
            None => text
                .parse()
                .map(ListenAddress::Tcp)
                .map_err(|_| format!("{text:?} is no address; write {}", Self::EXPECTED)),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => address.fmt(f),
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where a gRPC peer is found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Endpoint {
    /// `host:port`, resolved at each connection.
    Tcp(String),
    /// The same, with TLS.
    Tls(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// A peer that there need not be; written as `""` where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionalEndpoint(pub Option<Endpoint>);

impl<'de> Deserialize<'de> for OptionalEndpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(OptionalEndpoint(None));
        }
        let endpoint = text.parse();
        let endpoint = endpoint
            .map_err(|error| serde::de::Error::custom(format!("{error}, or \"\" for none")))?;
        Ok(OptionalEndpoint(Some(endpoint)))
    }
}

impl Serialize for OptionalEndpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            None => serializer.serialize_str(""),
            Some(endpoint) => endpoint.serialize(serializer),
        }
    }
}

impl Endpoint {
    const EXPECTED: &str = r#"an endpoint, such as "grpc://storage.example:8980", "grpcs://storage.example:8980" for TLS, or "unix:/run/bb-runner/runner.sock""#;
}

impl Endpoint {
    /// Whether it is on this host, by what it is called.
    pub fn is_local(&self) -> bool {
        match self {
            Endpoint::Unix(_) => true,
            Endpoint::Tcp(authority) | Endpoint::Tls(authority) => {
                let host = authority
                    .rsplit_once(':')
                    .map_or(&**authority, |(host, _)| host);
                let host = host.trim_matches(['[', ']']);
                host == "localhost"
                    || host
                        .parse()
                        .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
            }
        }
    }

    /// Whether calls reach who listens at `address` on this host.
    pub fn is_at(&self, address: &ListenAddress) -> bool {
        match (self, address) {
            (Endpoint::Unix(a), ListenAddress::Unix(b)) => a == b,
            (Endpoint::Tcp(authority) | Endpoint::Tls(authority), ListenAddress::Tcp(address)) => {
                let Some((host, port)) = authority.rsplit_once(':') else {
                    return false;
                };
                let host = host.trim_matches(['[', ']']);
                let ip = match host {
                    "localhost" => Some(std::net::IpAddr::from([127, 0, 0, 1])),
                    host => host.parse().ok(),
                };
                let same = ip.is_some_and(|ip| {
                    ip == address.ip() || address.ip().is_unspecified() && ip.is_loopback()
                });
                same && port.parse() == Ok(address.port())
            }
            _ => false,
        }
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return absolute(path).map(Endpoint::Unix);
        }
        let refuse = || format!("{text:?} is no endpoint; write {}", Self::EXPECTED);
        let (authority, is_tls) = match text.strip_prefix("grpcs://") {
            Some(authority) => (authority, true),
            None => (text.strip_prefix("grpc://").unwrap_or(text), false),
        };
        let (host, port) = authority.rsplit_once(':').ok_or_else(refuse)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() || !(bracketed || host.chars().all(plain)) {
            return Err(refuse());
        }
        port.parse::<u16>().map_err(|_| refuse())?;
        let authority = authority.to_owned();
        Ok(match is_tls {
            true => Endpoint::Tls(authority),
            false => Endpoint::Tcp(authority),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(authority) => write!(f, "grpc://{authority}"),
            Endpoint::Tls(authority) => write!(f, "grpcs://{authority}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(format!(
            "unix:{path} is not absolute; write unix:/ and the rest of the path"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_write_themselves_as_they_are_read() {
        for text in ["10GiB", "64KiB", "500MiB", "7B"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        for text in ["1m", "1h 30m"] {
            assert_eq!(text.parse::<Duration>().unwrap().to_string(), text);
        }
        for text in ["127.0.0.1:8980", "[::1]:8980", "unix:/run/x.sock"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for text in [
            "grpc://host:1",
            "grpc://[::1]:8980",
            "grpcs://host:1",
            "unix:/run/x.sock",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_lacks_a_unit_or_a_port_is_refused_with_an_example() {
        for (error, example) in [
            ("10".parse::<Size>().unwrap_err(), "10GiB"),
            ("GiB".parse::<Size>().unwrap_err(), "10GiB"),
            ("10 parsecs".parse::<Size>().unwrap_err(), "10GiB"),
            ("99999999TiB".parse::<Size>().unwrap_err(), "EiB"),
            ("60".parse::<Duration>().unwrap_err(), "60s"),
            (
                "8980".parse::<ListenAddress>().unwrap_err(),
                "127.0.0.1:8980",
            ),
            ("unix:x".parse::<ListenAddress>().unwrap_err(), "unix:/"),
            ("host".parse::<Endpoint>().unwrap_err(), "grpc://"),
            ("http://host:1/".parse::<Endpoint>().unwrap_err(), "grpc://"),
            ("grpcs://host".parse::<Endpoint>().unwrap_err(), "grpcs://"),
        ] {
            assert!(error.contains(example), "{error}");
        }
    }
}
