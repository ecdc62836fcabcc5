//! ByteStream resource names (REAPI: ContentAddressableStorage; the service `ByteStream`).

#![warn(missing_docs)]

use uuid::Uuid;

use crate::{
    digest::{Digest, DigestError, DigestFunction},
    instance::{InstanceName, InstanceNameError},
    proto::{self, rpc},
    text::shorten,
};

/// `[INSTANCE/]blobs/[FUNCTION/]HASH/SIZE`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadName {
    /// Whose blob it is.
    pub instance: InstanceName,
    /// Which blob it is.
    pub digest: Digest,
}

/// `[INSTANCE/]uploads/UUID/blobs/[FUNCTION/]HASH/SIZE[/ANYTHING]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteName {
    /// Whose blob it is.
    pub instance: InstanceName,
    /// What the client calls this upload. It should be a UUID; any text is taken.
    pub upload: String,
    /// Which blob it is.
    pub digest: Digest,
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
    #[error("resource name {0:?} asks for compression, which this server does not announce")]
    Compressed(String),
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
        let (digest, rest) = parse_blob(name, &parts[at..])?
            .ok_or_else(|| ResourceNameError::NotARead(shorten(name)))?;
        if !rest.is_empty() {
            return Err(ResourceNameError::NotARead(shorten(name)));
        }
        Ok(ReadName {
            instance: InstanceName::parse(&parts[..at].join("/"))?,
            digest,
        })
    }

    /// The name under which a blob is read.
    pub fn format(instance: &InstanceName, digest: &Digest) -> String {
        join(instance, &blob_name(digest))
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
        let (digest, _) = parse_blob(name, &parts[at + 2..])?
            .ok_or_else(|| ResourceNameError::NotAWrite(shorten(name)))?;
        Ok(WriteName {
            instance: InstanceName::parse(&parts[..at].join("/"))?,
            upload: (*upload).to_owned(),
            digest,
        })
    }

    /// The name under which a blob is written.
    pub fn format(instance: &InstanceName, upload: Uuid, digest: &Digest) -> String {
        join(instance, &format!("uploads/{upload}/{}", blob_name(digest)))
    }
}

/// `blobs/[FUNCTION/]HASH/SIZE`: also the subject of a MISSING violation (REAPI: Execute).
pub fn blob_name(digest: &Digest) -> String {
    match digest.function() {
        function if function.is_told_by_length() => format!("blobs/{digest}"),
        function => format!("blobs/{}/{digest}", function.name()),
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

/// Reads `blobs/[FUNCTION/]HASH/SIZE` and gives what follows it. `None`: too few parts.
fn parse_blob<'a>(
    name: &str,
    parts: &'a [&'a str],
) -> Result<Option<(Digest, &'a [&'a str])>, ResourceNameError> {
    match parts.first() {
        Some(&"blobs") => {}
        Some(&"compressed-blobs") => return Err(ResourceNameError::Compressed(shorten(name))),
        _ => return Ok(None),
    }
    let mut rest = &parts[1..];
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
    Ok(Some((Digest::parse_parts(function, hash, number)?, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_formatting_and_parsing() {
        for instance in ["", "a", "a/b"] {
            let instance = InstanceName::parse(instance).unwrap();
            for function in DigestFunction::ALL {
                let digest = function.digest_of(b"x");
                let name = ReadName::format(&instance, &digest);
                assert_eq!(
                    ReadName::parse(&name).unwrap(),
                    ReadName {
                        instance: instance.clone(),
                        digest
                    }
                );
                let upload = Uuid::nil();
                let name = WriteName::format(&instance, upload, &digest) + "/a.txt";
                assert_eq!(
                    WriteName::parse(&name).unwrap(),
                    WriteName {
                        instance: instance.clone(),
                        upload: upload.to_string(),
                        digest
                    }
                );
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
            &format!("compressed-blobs/zstd/{hash}/1"),
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
