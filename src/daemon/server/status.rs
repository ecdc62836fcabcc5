//! What a gRPC status says of a failure, short enough for everybody's headers.
//!
//! A status travels in HTTP/2 headers, and a peer that gets more of them than it takes (8 KiB in
//! grpc-java and grpc-core, 16 KiB in hyper) may close the connection, with all calls on it. Messages
//! quote clients and actions, and percent-encoding makes three bytes of most of them. So all answers of
//! all listeners pass through here.

use http::{HeaderMap, HeaderName, HeaderValue};
use tonic::Status;

use super::budget::BudgetExhausted;

const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// Bytes of a message, percent-encoded.
const LONGEST_MESSAGE: usize = 2 << 10;
/// Bytes of details, in base64. Half of a message would be none, so longer ones are left out.
const LONGEST_DETAILS: usize = 4 << 10;
/// In place of what was left out, percent-encoded.
const CUT: &[u8] = b"... (shortened)";

pub(super) fn exhausted(error: BudgetExhausted) -> Status {
    Status::resource_exhausted(error.to_string())
}

pub(super) fn shorten(headers: &mut HeaderMap) {
    if let Some(message) = headers.get(MESSAGE)
        && message.len() > LONGEST_MESSAGE
    {
        let short = shortened(message.as_bytes());
        headers.insert(MESSAGE, short);
    }
    if headers
        .get(DETAILS)
        .is_some_and(|details| details.len() > LONGEST_DETAILS)
    {
        headers.remove(DETAILS);
    }
}

/// The beginning of a percent-encoded text, up to the end of a character.
fn shortened(message: &[u8]) -> HeaderValue {
    let mut end = LONGEST_MESSAGE - CUT.len();
    // Neither within %XX nor before one that goes on a character of UTF-8 (10xxxxxx).
    loop {
        let within = (1..3).any(|back| message.get(end.wrapping_sub(back)) == Some(&b'%'));
        let goes_on = message.get(end) == Some(&b'%')
            && matches!(
                message.get(end + 1),
                Some(b'8' | b'9' | b'A' | b'B' | b'a' | b'b')
            );
        if end == 0 || !(within || goes_on) {
            break;
        }
        end -= 1;
    }
    let mut short = message.get(..end).unwrap_or_default().to_vec();
    short.extend_from_slice(CUT);
    HeaderValue::from_bytes(&short).unwrap_or_else(|_| HeaderValue::from_static("(shortened)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn told(text: &str, details: usize) -> Status {
        let details = vec![7; details].into();
        let mut headers = Status::with_details(Code::InvalidArgument, text, details)
            .into_http::<()>()
            .into_parts()
            .0
            .headers;
        shorten(&mut headers);
        let length: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32)
            .sum();
        assert!(length < 8 << 10, "{length} bytes of headers");
        Status::from_header_map(&headers).unwrap()
    }

    #[test]
    fn a_short_message_and_its_details_are_left_alone() {
        let status = told("no %41 here: ä\n", 3000);
        assert_eq!(status.message(), "no %41 here: ä\n");
        assert_eq!(status.details().len(), 3000);
    }

    #[test]
    fn a_long_message_is_cut_between_characters_and_keeps_its_code() {
        for unit in ["x", "\n", "ä", "€", "🦀", "%", "%41", "ab🦀"] {
            for shift in 0..12 {
                let text = "y".repeat(shift) + &unit.repeat(100_000);
                let status = told(&text, 0);
                assert_eq!(status.code(), Code::InvalidArgument);
                let (kept, _) = status.message().split_once("... (shortened)").unwrap();
                assert!(kept.len() > 600 && text.starts_with(kept), "{kept:?}");
            }
        }
    }

    #[test]
    fn details_that_are_too_long_are_left_out() {
        let status = told("short", 4000);
        assert_eq!((status.message(), status.details().len()), ("short", 0));
    }
}
