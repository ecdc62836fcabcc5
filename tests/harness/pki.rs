//! Authorities, certificates and keys for tests, in files.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};

/// An authority, whose certificate is in a file.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate: PathBuf,
}

/// A certificate and its key, in files.
#[derive(Clone, Debug)]
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What a certificate says.
pub struct Leaf<'l> {
    pub name: &'l str,
    /// URIs, else names of hosts and addresses.
    pub alternative_names: &'l [&'l str],
    /// From when until when it is valid, as seconds from now.
    pub valid: (i64, i64),
    pub serial: u8,
}

impl Default for Leaf<'_> {
    fn default() -> Self {
        Leaf {
            name: "localhost",
            alternative_names: &["localhost", "127.0.0.1"],
            valid: (-3600, 3600),
            serial: 1,
        }
    }
}

impl Authority {
    /// Whose files are in `directory`, and begin with `name`.
    pub fn new(directory: &Path, name: &str) -> Authority {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let signed = parameters.self_signed(&key).unwrap();
        let certificate = directory.join(format!("{name}.pem"));
        fs::write(&certificate, signed.pem()).unwrap();
        Authority {
            issuer: Issuer::new(parameters, key),
            certificate,
        }
    }

    /// Files with a certificate of this authority and its key, which replace those there were.
    pub fn issue(&self, directory: &Path, file: &str, leaf: &Leaf) -> Pair {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        let names = &mut parameters.distinguished_name;
        names.push(DnType::CommonName, leaf.name);
        names.push(DnType::OrganizationalUnitName, "Builds");
        parameters.serial_number = Some(SerialNumber::from(vec![leaf.serial]));
        for name in leaf.alternative_names {
            parameters.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if name.contains("://") => SanType::URI((*name).try_into().unwrap()),
                Err(_) => SanType::DnsName((*name).try_into().unwrap()),
            });
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap().as_secs() as i64;
        let at = |shift: i64| date_time_ymd(1970, 1, 1) + Duration::from_secs((now + shift) as u64);
        (parameters.not_before, parameters.not_after) = (at(leaf.valid.0), at(leaf.valid.1));
        let key = KeyPair::generate().unwrap();
        let signed = parameters.signed_by(&key, &self.issuer).unwrap();
        let pair = Pair {
            certificate: directory.join(format!("{file}.pem")),
            key: directory.join(format!("{file}.key")),
        };
        let replace = |path: &Path, text: String, mode| {
            let new = path.with_extension("new");
            fs::write(&new, text).unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(mode)).unwrap();
            fs::rename(new, path).unwrap();
        };
        replace(&pair.key, key.serialize_pem(), 0o600);
        replace(&pair.certificate, signed.pem(), 0o644);
        pair
    }

    /// A file that says that the certificate of this number counts no longer.
    pub fn revoke(&self, path: &Path, serial: u8) {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2000, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(vec![1]),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(vec![serial]),
                revocation_time: date_time_ymd(2001, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        fs::write(path, list.pem().unwrap()).unwrap();
    }
}
