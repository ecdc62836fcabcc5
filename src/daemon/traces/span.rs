//! A span, and how OTLP has it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{
    metadata::TraceContext,
    proto::opentelemetry::{
        common::v1::{AnyValue, KeyValue, any_value},
        trace::v1::{self as otlp, span::SpanKind, status::StatusCode},
    },
    text::cut,
};

/// Bytes of one attribute, name or error.
const LONGEST_TEXT: usize = 1 << 10;

/// Something that was done for an action.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its own name between programs.
    pub context: TraceContext,
    /// The span that it is part of; `None` for the first one of a trace.
    pub parent: Option<u64>,
    /// What was done, of few different values.
    pub name: String,
    /// Whether it is the answer to a call.
    pub is_server: bool,
    /// When it began.
    pub start: SystemTime,
    /// When it was over.
    pub end: SystemTime,
    /// More about it.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A value of an attribute.
#[derive(Clone, Debug)]
pub enum Attribute {
    /// Cut where it is long.
    Text(String),
    /// A number.
    Integer(i64),
}

/// As OTLP has it.
pub(super) fn encode(span: Span) -> otlp::Span {
    let Span {
        context,
        parent,
        name,
        is_server,
        start,
        end,
        attributes,
        error,
    } = span;
    let start_time_unix_nano = unix_nanoseconds(start);
    otlp::Span {
        trace_id: context.trace.to_be_bytes().to_vec().into(),
        span_id: context.span.to_be_bytes().to_vec().into(),
        parent_span_id: parent
            .map(|parent| parent.to_be_bytes().to_vec().into())
            .unwrap_or_default(),
        name: shortened(name),
        kind: match is_server {
            true => SpanKind::Server,
            false => SpanKind::Internal,
        } as i32,
        start_time_unix_nano,
        // A clock that was set back makes nothing end before it began.
        end_time_unix_nano: unix_nanoseconds(end).max(start_time_unix_nano),
        attributes: attributes
            .into_iter()
            .map(|(key, value)| attribute(key, value))
            .collect(),
        status: error.map(|message| otlp::Status {
            message: shortened(message),
            code: StatusCode::Error as i32,
        }),
    }
}

/// An attribute of a span or of who sends it.
pub(super) fn attribute(key: &str, value: Attribute) -> KeyValue {
    let value = match value {
        Attribute::Text(text) => any_value::Value::StringValue(shortened(text)),
        Attribute::Integer(number) => any_value::Value::IntValue(number),
    };
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
    }
}

fn shortened(mut text: String) -> String {
    cut(&mut text, LONGEST_TEXT);
    text
}

fn unix_nanoseconds(time: SystemTime) -> u64 {
    let since: Duration = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_encoded_as_otlp_says() {
        let start = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let span = Span {
            context: TraceContext {
                trace: 1,
                span: 2,
                is_sampled: true,
            },
            parent: Some(3),
            name: "run".to_owned(),
            is_server: false,
            start,
            end: start - Duration::from_secs(5),
            attributes: vec![("a", Attribute::Text("é".repeat(LONGEST_TEXT)))],
            error: Some("broken".to_owned()),
        };
        let encoded = encode(span);
        assert_eq!(encoded.trace_id.len(), 16);
        assert_eq!(encoded.trace_id.last(), Some(&1));
        assert_eq!(&*encoded.span_id, [0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(&*encoded.parent_span_id, [0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(encoded.start_time_unix_nano, 1_700_000_000_000_000_000);
        assert_eq!(encoded.end_time_unix_nano, encoded.start_time_unix_nano);
        let value = encoded.attributes[0].value.clone().unwrap().value.unwrap();
        assert_eq!(
            value,
            any_value::Value::StringValue("é".repeat(LONGEST_TEXT / 2) + "…")
        );
        assert_eq!(encoded.status.unwrap().code, StatusCode::Error as i32);
    }
}
