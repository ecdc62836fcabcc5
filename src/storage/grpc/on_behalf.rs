//! Who calls to storage are made for: the RequestMetadata that an action's client sent goes along, so that
//! a storage's logs and limits know whose they are (REAPI: RequestMetadata), and the span that they are part
//! of (W3C Trace Context).

use bytes::Bytes;
use tonic::{
    Request, Status,
    metadata::{AsciiMetadataValue, BinaryMetadataValue, MetadataValue},
    service::Interceptor,
};

use crate::metadata::{REQUEST_METADATA_HEADER, TRACEPARENT, TraceContext};

struct CarriedHeaders {
    request_metadata: Option<BinaryMetadataValue>,
    traceparent: Option<AsciiMetadataValue>,
}

tokio::task_local! {
    static CARRIED: CarriedHeaders;
}

/// Does work whose calls carry this RequestMetadata, encoded, and are part of this span.
pub async fn on_behalf_of<F: Future>(
    metadata: Option<Bytes>,
    trace: Option<TraceContext>,
    work: F,
) -> F::Output {
    let carried = CarriedHeaders {
        request_metadata: metadata.map(|metadata| MetadataValue::from_bytes(&metadata)),
        traceparent: trace.and_then(|trace| trace.to_string().parse().ok()),
    };
    CARRIED.scope(carried, work).await
}

/// Adds the headers to calls.
#[derive(Clone, Debug)]
pub(super) struct AddCarriedHeaders;

impl Interceptor for AddCarriedHeaders {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        // Calls that are for nobody in particular have none.
        let _ = CARRIED.try_with(|carried| {
            let headers = request.metadata_mut();
            if let Some(value) = &carried.request_metadata {
                headers.insert_bin(REQUEST_METADATA_HEADER, value.clone());
            }
            if let Some(value) = &carried.traceparent {
                headers.insert(TRACEPARENT, value.clone());
            }
        });
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_carry_the_headers_of_the_work_that_they_are_part_of() {
        let call = || AddCarriedHeaders.call(Request::new(())).unwrap();
        let carried = |request: Request<()>| {
            let headers = request.metadata();
            let value = headers.get_bin(REQUEST_METADATA_HEADER);
            (
                value.map(|value| value.to_bytes().unwrap()),
                TraceContext::of(headers.as_ref()),
            )
        };
        let metadata = Bytes::from_static(b"\x22\x03abc");
        let trace = TraceContext::parse("00-000000000000000000000000000000ab-00000000000000cd-01");
        let inside = on_behalf_of(Some(metadata.clone()), trace, async { call() }).await;
        assert_eq!(carried(inside), (Some(metadata), trace));
        let inside = on_behalf_of(None, None, async { call() }).await;
        assert_eq!(carried(inside), (None, None));
        assert_eq!(carried(call()), (None, None));
    }
}
