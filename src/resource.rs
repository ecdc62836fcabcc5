//! ByteStream resource names (REAPI: ContentAddressableStorage; the service `ByteStream`).

#![warn(missing_docs)]

use uuid::Uuid;

use crate::{
    digest::{Digest, DigestError, DigestFunction},
    instance::{InstanceName, InstanceNameError},
    proto::{self, reapi, rpc},
    text::shorten,
};

/// REAPI: Compressor.Value, those that this farm knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compressor {
    /// The content as it is.
    #[default]
    Identity,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compressor {
    /// The compressor's value in messages.
    pub const fn to_proto(self) -> i32 {
        match self {
            Compressor::Identity => reapi::compressor::Value::Identity as i32,
            Compressor::Zstd => reapi::compressor::Value::Zstd as i32,
        }
    }

    /// `None` for one that is not known.
    pub fn from_proto(value: i32) -> Option<Self> {
        [Compressor::Identity, Compressor::Zstd]
            .into_iter()
            .find(|compressor| compressor.to_proto() == value)
    }
}

/// `[INSTANCE/]blobs/[FUNCTION/]HASH/SIZE`, or `[INSTANCE/]compressed-blobs/zstd/[FUNCTION/]HASH/SIZE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadName {
    /// Whose blob it is.
    pub instance: InstanceName,
    /// Which blob it is.
    pub digest: Digest,
    /// How it is sent.
    pub compressor: Compressor,
}

/// `[INSTANCE/]uploads/UUID/blobs/[FUNCTION/]HASH/SIZE[/ANYTHING]`, or
/// `[INSTANCE/]uploads/UUID/compressed-blobs/zstd/[FUNCTION/]HASH/SIZE[/ANYTHING]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteName {
    /// Whose blob it is.
    pub instance: InstanceName,
    /// What the client calls this upload. It should be a UUID; any text is taken.
    pub upload: String,
    /// Which blob it is.
    pub digest: Digest,
    /// How it is sent.
    pub compressor: Compressor,
}

/// Bytes of a name: twice an instance name and a path. A server remembers names of uploads.
pub const LONGEST_NAME: usize = 6 << 10;

/// The sender must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "its message says what each of these is")]
pub enum ResourceNameError {
    #[error("resource name {0:?} is not [INSTANCE/]blobs/[FUNCTION/]HASH/SIZE")]
    NotARead(String),
    #[error("resource name {0:?} is not [INSTANCE/]uploads/UUID/blobs/[FUNCTION/]HASH/SIZE")]
    NotAWrite(String),
    #[error(
        "resource name {0:?} asks for a compressor other than zstd, which this server does not announce"
    )]
    OtherCompressor(String),
    #[error("size {1:?} in resource name {0:?} is not a number")]
    Size(String, String),
    #[error(
        "resource name {0:?} has {1} bytes, more than {LONGEST_NAME}; use a UUID for each upload"
    )]
    TooLong(String, usize),
    #[error(transparent)]
    Instance(#[from] InstanceNameError),
    #[error(transparent)]
    Digest(#[from] DigestError),
}

impl ReadName {
    /// What a resource name says.
    pub fn parse(name: &str) -> Result<Self, ResourceNameError> {
        let parts = split(name)?;
        let Some(at) = parts
            .iter()
            .position(|part| matches!(*part, "blobs" | "compressed-blobs"))
        else {
            return Err(ResourceNameError::NotARead(shorten(name)));
        };
        let (compressor, digest, rest) = parse_blob(name, &parts[at..])?
            .ok_or_else(|| ResourceNameError::NotARead(shorten(name)))?;
        if !rest.is_empty() {
            return Err(ResourceNameError::NotARead(shorten(name)));
        }
        Ok(ReadName {
            instance: InstanceName::parse(&parts[..at].join("/"))?,
            digest,
            compressor,
        })
    }

    /// The name under which a blob is read as it is.
    pub fn format(instance: &InstanceName, digest: &Digest) -> String {
        Self::format_as(instance, digest, Compressor::Identity)
    }

    /// The name under which a blob is read compressed, or as it is.
    pub fn format_as(instance: &InstanceName, digest: &Digest, compressor: Compressor) -> String {
        join(instance, &name_as(digest, compressor))
    }
}

impl WriteName {
    /// What a resource name says.
    pub fn parse(name: &str) -> Result<Self, ResourceNameError> {
        let parts = split(name)?;
        let Some(at) = parts.iter().position(|part| *part == "uploads") else {
            return Err(ResourceNameError::NotAWrite(shorten(name)));
        };
        let Some(upload) = parts.get(at + 1).filter(|upload| !upload.is_empty()) else {
            return Err(ResourceNameError::NotAWrite(shorten(name)));
        };
        // Whatever follows the size is the client's own.
        let (compressor, digest, _) = parse_blob(name, &parts[at + 2..])?
            .ok_or_else(|| ResourceNameError::NotAWrite(shorten(name)))?;
        Ok(WriteName {
            instance: InstanceName::parse(&parts[..at].join("/"))?,
            upload: (*upload).to_owned(),
            digest,
            compressor,
        })
    }

    /// The name under which a blob is written as it is.
    pub fn format(instance: &InstanceName, upload: Uuid, digest: &Digest) -> String {
        Self::format_as(instance, upload, digest, Compressor::Identity)
    }

    /// The name under which a blob is written compressed, or as it is.
    pub fn format_as(
        instance: &InstanceName,
        upload: Uuid,
        digest: &Digest,
        compressor: Compressor,
    ) -> String {
        let blob = name_as(digest, compressor);
        join(instance, &format!("uploads/{upload}/{blob}"))
    }

    /// The name of the same upload as it would be without compression.
    pub fn uncompressed(&self) -> String {
        let (upload, blob) = (&self.upload, blob_name(&self.digest));
        join(&self.instance, &format!("uploads/{upload}/{blob}"))
    }
}

/// `blobs/[FUNCTION/]HASH/SIZE`: also the subject of a MISSING violation (REAPI: Execute).
pub fn blob_name(digest: &Digest) -> String {
    name_as(digest, Compressor::Identity)
}

fn name_as(digest: &Digest, compressor: Compressor) -> String {
    let start = match compressor {
        Compressor::Identity => "blobs",
        Compressor::Zstd => "compressed-blobs/zstd",
    };
    match digest.function() {
        function if function.is_told_by_length() => format!("{start}/{digest}"),
        function => format!("{start}/{}/{digest}", function.name()),
    }
}

/// FAILED_PRECONDITION with one MISSING violation per digest, and no other detail: clients upload
/// the blobs and try again only if every violation says so (REAPI: Execute).
pub fn missing_blobs(message: impl Into<String>, digests: &[Digest]) -> rpc::Status {
    let failure = rpc::PreconditionFailure {
        violations: digests
            .iter()
            .map(|digest| rpc::precondition_failure::Violation {
                r#type: "MISSING".to_owned(),
                subject: blob_name(digest),
                description: String::new(),
            })
            .collect(),
    };
    rpc::Status {
        code: rpc::Code::FailedPrecondition as i32,
        message: message.into(),
        details: vec![proto::pack(&failure)],
    }
}

fn split(name: &str) -> Result<Vec<&str>, ResourceNameError> {
    if name.len() > LONGEST_NAME {
        return Err(ResourceNameError::TooLong(shorten(name), name.len()));
    }
    Ok(name.split('/').collect())
}

fn join(instance: &InstanceName, rest: &str) -> String {
    if instance.is_empty() {
        rest.to_owned()
    } else {
        format!("{instance}/{rest}")
    }
}

/// How a blob is sent, which it is, and what follows its name.
type ParsedBlob<'a> = (Compressor, Digest, &'a [&'a str]);

/// Reads `blobs/[FUNCTION/]HASH/SIZE`, or the same compressed, and gives what follows it. `None`: too
/// few parts.
fn parse_blob<'a>(
    name: &str,
    parts: &'a [&'a str],
) -> Result<Option<ParsedBlob<'a>>, ResourceNameError> {
    let (compressor, mut rest) = match parts {
        ["blobs", rest @ ..] => (Compressor::Identity, rest),
        ["compressed-blobs", "zstd", rest @ ..] => (Compressor::Zstd, rest),
        ["compressed-blobs", ..] => {
            return Err(ResourceNameError::OtherCompressor(shorten(name)));
        }
        _ => return Ok(None),
    };
    let function = rest.first().and_then(|part| {
        DigestFunction::ALL
            .into_iter()
            .find(|function| function.name().eq_ignore_ascii_case(part))
    });
    if function.is_some() {
        rest = &rest[1..];
    }
    let [hash, size, rest @ ..] = rest else {
        return Ok(None);
    };
    let number: i64 = size
        .parse()
        .map_err(|_| ResourceNameError::Size(shorten(name), shorten(size)))?;
    let digest = Digest::parse_parts(function, hash, number)?;
    Ok(Some((compressor, digest, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_formatting_and_parsing() {
        for instance in ["", "a", "a/b"] {
            let instance = InstanceName::parse(instance).unwrap();
            let compressors = [Compressor::Identity, Compressor::Zstd];
            let each = DigestFunction::ALL
                .into_iter()
                .flat_map(|f| compressors.map(|c| (f, c)));
            for (function, compressor) in each {
                let digest = function.digest_of(b"x");
                let name = ReadName::format_as(&instance, &digest, compressor);
                assert_eq!(
                    ReadName::parse(&name).unwrap(),
                    ReadName {
                        instance: instance.clone(),
                        digest,
                        compressor,
                    }
                );
                let upload = Uuid::nil();
                let name = WriteName::format_as(&instance, upload, &digest, compressor) + "/a.txt";
                let parsed = WriteName::parse(&name).unwrap();
                assert_eq!(
                    parsed,
                    WriteName {
                        instance: instance.clone(),
                        upload: upload.to_string(),
                        digest,
                        compressor,
                    }
                );
                let plain = WriteName::format(&instance, upload, &digest);
                assert_eq!(parsed.uncompressed(), plain);
            }
        }
    }

    #[test]
    fn ill_formed_names_are_refused() {
        let hash = "a".repeat(64);
        for bad in [
            "",
            "blobs",
            "blobs/x",
            "a/b",
            &format!("blobs/{hash}"),
            &format!("blobs/{hash}/x"),
            &format!("blobs/{hash}/-1"),
            &format!("blobs/{hash}/1/2"),
            &format!("a//blobs/{hash}/1"),
            &format!("compressed-blobs/brotli/{hash}/1"),
            &format!("compressed-blobs/{hash}/1"),
            &format!("compressed-blobs/zstd/{hash}"),
            &format!("uploads/u/blobs/{hash}/1"),
        ] {
            assert!(ReadName::parse(bad).is_err(), "{bad:?}");
        }
        for bad in [
            "uploads",
            "uploads/",
            "uploads/u",
            "uploads/u/blobs",
            "uploads/u/x/y/z",
            &format!("uploads//blobs/{hash}/1"),
            &format!("blobs/{hash}/1"),
        ] {
            assert!(WriteName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_refused_whatever_makes_it_long() {
        let blob = format!("blobs/{}/1", "a".repeat(64));
        let fits = |name: &str| WriteName::parse(name).is_ok();
        let with_tail = |length| format!("uploads/u/{blob}/") + &"t".repeat(length);
        let room = LONGEST_NAME - with_tail(0).len();
        assert!(fits(&with_tail(room)));
        for long in [
            with_tail(room + 1),
            format!("uploads/{}/{blob}", "u".repeat(15_000_000)),
            format!("{}/uploads/u/{blob}", "i".repeat(LONGEST_NAME)),
        ] {
            let error = WriteName::parse(&long).unwrap_err();
            assert!(matches!(error, ResourceNameError::TooLong(..)), "{error}");
            assert!(error.to_string().len() < 400);
            assert!(ReadName::parse(&long).is_err());
        }
    }
}
