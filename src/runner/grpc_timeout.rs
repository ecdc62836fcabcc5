//! The timeout that a caller sends with a call: how long it waits for the answer.

use std::time::Duration;

use tonic::metadata::MetadataMap;

pub(super) const HEADER: &str = "grpc-timeout";

/// How long the caller waits from now on; `None` when it does not say, or not as gRPC over HTTP/2 wants it ("Timeout":
/// at most eight digits and a unit).
pub(super) fn of(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit_and_ill_formed_ones_are_none() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(HEADER, text.parse().unwrap());
            of(&metadata)
        };
        assert_eq!(of("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(of("3M"), Some(Duration::from_secs(180)));
        assert_eq!(of("4S"), Some(Duration::from_secs(4)));
        assert_eq!(of("99999999m"), Some(Duration::from_millis(99_999_999)));
        assert_eq!(of("5u"), Some(Duration::from_micros(5)));
        assert_eq!(of("6n"), Some(Duration::from_nanos(6)));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S"] {
            assert_eq!(of(wrong), None, "{wrong:?}");
        }
        assert_eq!(super::of(&MetadataMap::new()), None);
    }
}
