//! Addresses of blobs, which are bb_browser's.

use super::super::format::encode;
use crate::{
    digest::{Digest, DigestFunction},
    instance::InstanceName,
};

/// Whose blobs they are, and which function made their digests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::scheduler::web) struct Place {
    pub instance: InstanceName,
    pub function: DigestFunction,
}

impl Place {
    /// Of a page about a blob.
    pub(in crate::scheduler::web) fn address(&self, kind: &str, digest: &Digest) -> String {
        let mut address = String::from("/");
        for component in self.instance.components() {
            address.push_str(&encode(component));
            address.push('/');
        }
        format!(
            "{address}blobs/{}/{kind}/{}-{}/",
            self.function.name(),
            digest.hash_hex(),
            digest.size()
        )
    }

    /// Of a file's content, under its name.
    pub(in crate::scheduler::web) fn file_address(&self, digest: &Digest, name: &str) -> String {
        format!("{}{}", self.address("file", digest), encode(name))
    }
}

/// What an address is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlobAddress {
    pub place: Place,
    pub kind: String,
    pub digest: Digest,
    /// Behind the digest: names of files or directories.
    pub rest: Vec<String>,
}

/// `None` when it is an address of another kind.
pub(super) fn parse(path: &str) -> Option<Result<BlobAddress, String>> {
    let segments: Vec<String> = path.split('/').skip(1).map(decode).collect::<Option<_>>()?;
    let at = segments.iter().position(|segment| segment == "blobs")?;
    let [_, function, kind, blob, rest @ ..] = segments.get(at..)? else {
        return None;
    };
    let instance = segments.get(..at)?.join("/");
    let parse = || -> Result<BlobAddress, String> {
        let instance = InstanceName::parse(&instance).map_err(|error| error.to_string())?;
        let function = DigestFunction::ALL
            .into_iter()
            .find(|known| known.name() == function.as_str())
            .ok_or_else(|| format!("\"{function}\" is no digest function"))?;
        let digest = parse_digest(function, blob)?;
        Ok(BlobAddress {
            place: Place { instance, function },
            kind: kind.clone(),
            digest,
            rest: rest
                .iter()
                .filter(|name| !name.is_empty())
                .cloned()
                .collect(),
        })
    };
    Some(parse())
}

/// A hash and a size, with a hyphen between them.
pub(super) fn parse_digest(function: DigestFunction, text: &str) -> Result<Digest, String> {
    let parts = text.rsplit_once('-');
    let parts = parts.and_then(|(hash, size)| Some((hash, size.parse::<i64>().ok()?)));
    let (hash, size) = parts
        .ok_or_else(|| format!("\"{text}\" is no hash and size with a hyphen between them"))?;
    Digest::parse_parts(Some(function), hash, size).map_err(|error| error.to_string())
}

/// Percent-encoding taken away (RFC 3986, section 2.1).
pub(super) fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next())?, digit(rest.next())?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_bb_browser() {
        let hash = "a".repeat(64);
        let read = |path: &str| {
            parse(path).map(|parsed| {
                parsed.map(|address| {
                    let BlobAddress {
                        place,
                        kind,
                        digest,
                        rest,
                    } = address;
                    assert!(path.starts_with(&place.address(&kind, &digest)), "{path}");
                    (
                        place.instance.as_str().to_owned(),
                        kind,
                        digest.size(),
                        rest,
                    )
                })
            })
        };
        assert_eq!(
            read(&format!("/blobs/sha256/action/{hash}-12/")),
            Some(Ok((String::new(), "action".to_owned(), 12, vec![])))
        );
        assert_eq!(
            read(&format!("/a/b/blobs/sha256/tree/{hash}-12/x/%3Cy%3E/")),
            Some(Ok((
                "a/b".to_owned(),
                "tree".to_owned(),
                12,
                vec!["x".to_owned(), "<y>".to_owned()]
            )))
        );
        assert_eq!(parse("/operations"), None);
        assert_eq!(parse("/%zz/blobs"), None);
        for wrong in [
            format!("/blobs/sha255/action/{hash}-12/"),
            format!("/blobs/sha256/action/{hash}/"),
            format!("/blobs/sha1/action/{hash}-1/"),
            "/blobs/sha256/action/x-1/".to_owned(),
        ] {
            assert!(matches!(parse(&wrong), Some(Err(_))), "{wrong}");
        }
    }
}
