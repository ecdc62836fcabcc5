//! Who calls to storage are made for: the RequestMetadata that an action's client sent goes along, so that
//! a storage's logs and limits know whose they are (REAPI: RequestMetadata).

use bytes::Bytes;
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::Interceptor,
};

use crate::metadata::REQUEST_METADATA_HEADER;

tokio::task_local! {
    static REQUEST_METADATA: BinaryMetadataValue;
}

/// Does work whose calls carry this RequestMetadata, encoded; without one they carry none.
pub async fn on_behalf_of<F: Future>(metadata: Option<Bytes>, work: F) -> F::Output {
    match metadata {
        Some(metadata) => {
            let value = MetadataValue::from_bytes(&metadata);
            REQUEST_METADATA.scope(value, work).await
        }
        None => work.await,
    }
}

/// Adds the header to calls.
#[derive(Clone, Debug)]
pub(super) struct AddRequestMetadata;

impl Interceptor for AddRequestMetadata {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        // Calls that are for nobody in particular have none.
        let _ = REQUEST_METADATA.try_with(|value| {
            request
                .metadata_mut()
                .insert_bin(REQUEST_METADATA_HEADER, value.clone())
        });
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_carry_the_metadata_of_the_work_that_they_are_part_of() {
        let call = || AddRequestMetadata.call(Request::new(())).unwrap();
        let carried = |request: Request<()>| {
            let value = request.metadata().get_bin(REQUEST_METADATA_HEADER);
            value.map(|value| value.to_bytes().unwrap())
        };
        let metadata = Bytes::from_static(b"\x22\x03abc");
        let inside = on_behalf_of(Some(metadata.clone()), async { call() }).await;
        assert_eq!(carried(inside), Some(metadata));
        assert_eq!(carried(on_behalf_of(None, async { call() }).await), None);
        assert_eq!(carried(call()), None);
    }
}
