//! What object stores' clients show: secrets in files, as they are at each call.

use std::{fmt, sync::Arc};

use object_store::{
    CredentialProvider, RetryConfig,
    aws::AwsCredential,
    azure::{AzureAccessKey, AzureCredential},
    gcp::{GcpCredential, GcpCredentialProvider, GoogleCloudStorageBuilder},
};
use parking_lot::Mutex;
use tonic::async_trait;

use super::http::HttpTransport;
use crate::{config::object_storage::ObjectService, daemon::Credentials};

/// A secret in a file that a key names.
pub(super) struct Secret {
    service: ObjectService,
    credentials: Credentials,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}

impl Secret {
    /// `None` where no file is named.
    pub(super) fn of(service: ObjectService, credentials: &Credentials) -> Option<Self> {
        credentials.secret(service.secret_key())?;
        Some(Secret {
            service,
            credentials: credentials.clone(),
        })
    }

    fn text(&self) -> Arc<String> {
        let text = self.credentials.secret(self.service.secret_key());
        text.unwrap_or_default()
    }

    fn wrong(&self, why: String) -> object_store::Error {
        object_store::Error::Generic {
            store: self.service.name(),
            source: format!("{}: {why}", self.service.secret_key()).into(),
        }
    }
}

/// A key of S3 from a file as the AWS tools have it.
#[derive(Debug)]
pub(super) struct AwsSecret(pub Secret);

#[async_trait]
impl CredentialProvider for AwsSecret {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let parsed = aws_credential(&self.0.text());
        parsed.map(Arc::new).map_err(|why| self.0.wrong(why))
    }
}

/// The first profile of a file, or its profile "default".
pub(super) fn aws_credential(text: &str) -> Result<AwsCredential, String> {
    let mut sections: Vec<(&str, Vec<(&str, &str)>)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'))
        {
            sections.push((name.trim(), Vec::new()));
        } else if let (Some((_, values)), Some((key, value))) =
            (sections.last_mut(), line.split_once('='))
        {
            values.push((key.trim(), value.trim()));
        }
    }
    let default = sections.iter().find(|(name, _)| *name == "default");
    let (_, values) = default.or(sections.first()).ok_or_else(|| {
        "it has no profile; write [default], aws_access_key_id = … and aws_secret_access_key = …, a line each".to_owned()
    })?;
    let value = |key: &str| {
        let found = values.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| (*value).to_owned())
    };
    let required =
        |key: &str| value(key).ok_or_else(|| format!("it has no {key}; write it below [default]"));
    Ok(AwsCredential {
        key_id: required("aws_access_key_id")?,
        secret_key: required("aws_secret_access_key")?,
        token: value("aws_session_token"),
    })
}

/// An access key of Azure.
#[derive(Debug)]
pub(super) struct AzureSecret(pub Secret);

#[async_trait]
impl CredentialProvider for AzureSecret {
    type Credential = AzureCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AzureCredential>> {
        let key = AzureAccessKey::try_new(&self.0.text());
        let key = key.map_err(|_| {
            let why = "it is no access key, which is base64; copy the account's key into it";
            self.0.wrong(why.to_owned())
        })?;
        Ok(Arc::new(AzureCredential::AccessKey(key)))
    }
}

/// A service account of Google's, for which tokens are fetched.
pub(super) struct GoogleSecret {
    secret: Secret,
    transport: HttpTransport,
    /// Of this text.
    current: Mutex<Option<(Arc<String>, GcpCredentialProvider)>>,
}

impl fmt::Debug for GoogleSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.secret.fmt(f)
    }
}

impl GoogleSecret {
    pub(super) fn new(secret: Secret, transport: HttpTransport) -> Self {
        GoogleSecret {
            secret,
            transport,
            current: Mutex::default(),
        }
    }

    fn provider(&self) -> object_store::Result<GcpCredentialProvider> {
        let text = self.secret.text();
        let mut current = self.current.lock();
        if let Some((of, provider)) = &*current
            && *of == text
        {
            return Ok(provider.clone());
        }
        let account = GoogleCloudStorageBuilder::new()
            .with_bucket_name("none")
            .with_service_account_key(text.as_str())
            .with_retry(RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            })
            .with_http_connector(self.transport.clone())
            .build()
            .map_err(|error| {
                let why = format!("it is no service account's JSON: {error}");
                self.secret.wrong(why)
            })?;
        let provider = account.credentials().clone();
        *current = Some((text, provider.clone()));
        Ok(provider)
    }
}

#[async_trait]
impl CredentialProvider for GoogleSecret {
    type Credential = GcpCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        self.provider()?.get_credential().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_aws_tools_has_a_key() {
        let key = aws_credential("# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=B==\n[other]\naws_access_key_id=C\n").unwrap();
        assert_eq!(
            (&*key.key_id, &*key.secret_key, key.token),
            ("A", "B==", None)
        );
        let key = aws_credential(
            "[ci]\naws_access_key_id=A\naws_secret_access_key=B\naws_session_token=T",
        )
        .unwrap();
        assert_eq!(key.token.as_deref(), Some("T"));
        assert!(aws_credential("A:B").unwrap_err().contains("[default]"));
        let error = aws_credential("[default]\naws_access_key_id=A").unwrap_err();
        assert!(error.contains("aws_secret_access_key"), "{error}");
    }
}
