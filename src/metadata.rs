//! Request metadata: what travels in headers beside a message, between this project's daemons or
//! from its clients.

#![warn(missing_docs)]

use std::{fmt, str::FromStr};

use prost::Message;
use tonic::{Request, Response, metadata::MetadataValue};
use uuid::Uuid;

use crate::{instance::InstanceName, proto::reapi::RequestMetadata};

/// REAPI: RequestMetadata, serialised.
pub const REQUEST_METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// Between this project's worker and runner: whose the input files are.
const INPUTS_HEADER: &str = "bb-inputs";
const PRIVATE: &str = "private";

/// Between this project's worker and scheduler: whose blobs the reported action works with.
/// Buildbarn's worker does not say, and its scheduler does not ask.
const INSTANCE_HEADER: &str = "bb-instance-name-bin";

/// Between this project's worker and scheduler: which one of the worker's calls this is.
const CALL_HEADER: &str = "bb-call";

/// Between this project's worker and scheduler: which of all starts of the worker this is.
const START_HEADER: &str = "bb-start";

/// Between this project's worker and scheduler: where the scheduler's pages are.
const PAGES_HEADER: &str = "bb-pages";
const LONGEST_PAGES: usize = 1 << 10;

/// W3C Trace Context: in a header, and among desired_state.Executing.w3c_trace_context.
pub const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// This project's member of a `tracestate`: which attempt a recorded trace is about.
const ATTEMPT_MEMBER: &str = "bb=";

/// Between this project's worker and runner: which worker asks.
const WORKER_HEADER: &str = "bb-worker-bin";
/// Longer ones are left out, since all headers of a call are at most 16 KiB.
const LONGEST_WORKER: usize = 2 << 10;

/// Says of which instance the action is that a worker reports.
pub fn set_instance<T>(request: &mut Request<T>, instance: &InstanceName) {
    let value = MetadataValue::from_bytes(instance.as_str().as_bytes());
    request.metadata_mut().insert_bin(INSTANCE_HEADER, value);
}

/// The instance that `set_instance` set; `None` when the header is absent or no instance name.
pub fn instance_of<T>(request: &Request<T>) -> Option<InstanceName> {
    let value = request.metadata().get_bin(INSTANCE_HEADER)?;
    let data = value.to_bytes().ok()?;
    InstanceName::parse(std::str::from_utf8(&data).ok()?).ok()
}

/// Says where the scheduler's pages are.
pub fn set_pages<T>(response: &mut Response<T>, url: &str) {
    if let Ok(value) = url.parse() {
        response.metadata_mut().insert(PAGES_HEADER, value);
    }
}

/// What `set_pages` said; `None` when the header is absent or no URL.
pub fn pages_of<T>(response: &Response<T>) -> Option<String> {
    let url = response.metadata().get(PAGES_HEADER)?.to_str().ok()?;
    let is_url = url.starts_with("http://") || url.starts_with("https://");
    (is_url && url.len() <= LONGEST_PAGES).then(|| url.to_owned())
}

/// What a request is made for, so that all daemons' logs name an action alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActionContext {
    /// The hash of the action's digest (REAPI: RequestMetadata.action_id); empty when it is unknown.
    pub action: String,
    /// Which handing-out of the action, if that is known.
    pub attempt: Option<Attempt>,
    /// A worker's labels as JSON, as in ExecutedActionMetadata.worker.
    pub worker: Option<String>,
    /// The span that the request is part of, if it is recorded.
    pub trace: Option<TraceContext>,
}

impl ActionContext {
    /// A request whose headers say all this.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let metadata = RequestMetadata {
            action_id: self.action.clone(),
            ..Default::default()
        };
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
        headers.insert_bin(REQUEST_METADATA_HEADER, value);
        if let Some(worker) = &self.worker
            && worker.len() <= LONGEST_WORKER
        {
            headers.insert_bin(WORKER_HEADER, MetadataValue::from_bytes(worker.as_bytes()));
        }
        for (name, value) in trace_headers(self.attempt, self.trace.as_ref()) {
            if let Ok(value) = value.parse() {
                request.metadata_mut().insert(name, value);
            }
        }
        request
    }

    /// What `request` attached, as far as it did.
    pub fn of<T>(request: &Request<T>) -> Self {
        let headers = request.metadata();
        let bytes = |name: &str| headers.get_bin(name)?.to_bytes().ok();
        let metadata = bytes(REQUEST_METADATA_HEADER)
            .and_then(|data| RequestMetadata::decode(data).ok())
            .unwrap_or_default();
        ActionContext {
            action: metadata.action_id,
            attempt: Attempt::of(request),
            trace: TraceContext::of(headers.as_ref()),
            worker: bytes(WORKER_HEADER).and_then(|data| String::from_utf8(data.into()).ok()),
        }
    }
}

/// One handing-out of a task, as a trace that is not recorded (W3C Trace Context, version 00): the
/// operation that it is done for is the trace, and the attempt its span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// A client's operation that waits for the task.
    pub operation: Uuid,
    /// A number that no other attempt has; not 0.
    pub number: u64,
}

impl Attempt {
    /// The attempt that a `traceparent` names.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let mut parts = traceparent.split('-').skip(1);
        let operation = Uuid::try_parse(parts.next()?).ok()?;
        let number = u64::from_str_radix(parts.next()?, 16).ok()?;
        (!operation.is_nil() && number != 0).then_some(Attempt { operation, number })
    }

    /// Names the attempt in a header.
    pub fn attach_to<T>(self, request: &mut Request<T>) {
        if let Ok(value) = self.to_string().parse() {
            request.metadata_mut().insert(TRACEPARENT, value);
        }
    }

    /// The attempt that `attach_to` or `trace_headers` named.
    pub fn of<T>(request: &Request<T>) -> Option<Self> {
        let headers = request.metadata();
        Self::of_headers(|name| headers.get(name)?.to_str().ok())
    }

    /// The attempt that `trace_headers` named.
    pub fn of_headers<'h>(header: impl Fn(&str) -> Option<&'h str>) -> Option<Self> {
        let state = header(TRACESTATE).unwrap_or_default();
        let mut members = state.split(',').map(str::trim);
        match members.find_map(|member| member.strip_prefix(ATTEMPT_MEMBER)) {
            Some(attempt) => Self::parse(&format!("00-{attempt}")),
            None => Self::parse(header(TRACEPARENT)?),
        }
    }
}

/// A span of a trace, as it is named between programs (W3C Trace Context, version 00).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Not 0.
    pub trace: u128,
    /// Not 0.
    pub span: u64,
    /// Whether those who take part shall record it.
    pub is_sampled: bool,
}

impl TraceContext {
    /// `None` for what is no `traceparent`.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let hex = |text: &str, digits: usize| {
            let plain = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            let right = text.len() == digits && text.bytes().all(plain);
            right.then(|| u128::from_str_radix(text, 16).ok()).flatten()
        };
        let mut parts = traceparent.split('-');
        let version = hex(parts.next()?, 2)?;
        let trace = hex(parts.next()?, 32)?;
        let span = hex(parts.next()?, 16)?;
        let flags = hex(parts.next()?, 2)?;
        // Later versions may have more behind.
        let right = version != 0xff && (version != 0 || parts.next().is_none());
        (right && trace != 0 && span != 0).then_some(TraceContext {
            trace,
            span: span as u64,
            is_sampled: flags & 1 == 1,
        })
    }

    /// The span that a request is part of.
    pub fn of(headers: &http::HeaderMap) -> Option<Self> {
        Self::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
    }
}

impl std::fmt::Display for TraceContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let flags = u8::from(self.is_sampled);
        write!(f, "00-{:032x}-{:016x}-{flags:02x}", self.trace, self.span)
    }
}

/// What says which attempt a message is about, and which recorded span it is part of.
pub fn trace_headers(
    attempt: Option<Attempt>,
    trace: Option<&TraceContext>,
) -> Vec<(&'static str, String)> {
    match (attempt, trace) {
        (None, None) => Vec::new(),
        (Some(attempt), None) => vec![(TRACEPARENT, attempt.to_string())],
        (None, Some(trace)) => vec![(TRACEPARENT, trace.to_string())],
        (Some(Attempt { operation, number }), Some(trace)) => {
            let attempt = format!("{ATTEMPT_MEMBER}{}-{number:016x}", operation.simple());
            vec![(TRACEPARENT, trace.to_string()), (TRACESTATE, attempt)]
        }
    }
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "00-{}-{:016x}-00", self.operation.simple(), self.number)
    }
}

/// Which process of a worker calls, as a fencing token: only one at a time holds the lock of a directory,
/// and counts its start there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FencingToken {
    /// The directory's name, chosen at random.
    pub directory: u64,
    /// Ascending within the directory.
    pub start: u64,
}

impl FencingToken {
    /// Whether the process of the other token has ended, since this one has its lock.
    pub fn is_successor_of(self, other: FencingToken) -> bool {
        self.directory == other.directory && self.start > other.start
    }
}

/// As in a header, and in the directory.
impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.directory, self.start)
    }
}

impl FromStr for FencingToken {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (directory, start) = numbers(text).ok_or(())?;
        Ok(FencingToken { directory, start })
    }
}

/// Two numbers as in this project's headers: the first one hexadecimal.
fn numbers(text: &str) -> Option<(u64, u64)> {
    let (first, second) = text.split_once('-')?;
    Some((u64::from_str_radix(first, 16).ok()?, second.parse().ok()?))
}

/// One of the Synchronize calls of a slot. A slot that numbers its calls leaves one unanswered when it
/// has news, so that it can be held while the slot executes: the one of the highest number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerCall {
    /// Chosen at random when the slot starts.
    pub session: u64,
    /// Ascending within a session.
    pub number: u64,
    /// `None` when the worker does not count its starts.
    pub token: Option<FencingToken>,
}

impl WorkerCall {
    /// Numbers a call in headers.
    pub fn attach_to<T>(self, request: &mut Request<T>) {
        let mut insert = |header, value: String| {
            if let Ok(value) = value.parse() {
                request.metadata_mut().insert(header, value);
            }
        };
        insert(
            CALL_HEADER,
            format!("{:016x}-{}", self.session, self.number),
        );
        if let Some(token) = self.token {
            insert(START_HEADER, token.to_string());
        }
    }

    /// The call that `attach_to` numbered; `None` for workers that do not number theirs.
    pub fn of<T>(request: &Request<T>) -> Option<Self> {
        let header = |name| request.metadata().get(name)?.to_str().ok();
        let (session, number) = numbers(header(CALL_HEADER)?)?;
        Some(WorkerCall {
            session,
            number,
            token: header(START_HEADER).and_then(|token| token.parse().ok()),
        })
    }

    /// Whether the process that this call is of has ended the one of the other call.
    pub fn is_of_successor(self, other: WorkerCall) -> bool {
        let tokens = self.token.zip(other.token);
        tokens.is_some_and(|(own, other)| own.is_successor_of(other))
    }
}

/// Says that nobody else has the files in the input root, so that they may become the action's.
pub fn set_private_inputs<T>(request: &mut Request<T>) {
    let private = MetadataValue::from_static(PRIVATE);
    request.metadata_mut().insert(INPUTS_HEADER, private);
}

/// Whether the worker called `set_private_inputs`.
pub fn has_private_inputs<T>(request: &Request<T>) -> bool {
    let value = request.metadata().get(INPUTS_HEADER);
    value.is_some_and(|value| value.as_bytes() == PRIVATE.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_survives_as_a_trace() {
        let attempt = Attempt {
            operation: Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef),
            number: 0xabc,
        };
        let text = attempt.to_string();
        assert_eq!(
            text,
            "00-123456789abc4def8123456789abcdef-0000000000000abc-00"
        );
        assert_eq!(Attempt::parse(&text), Some(attempt));
        for bad in [
            "",
            "00",
            "00-0-0-00",
            "00-00000000000000000000000000000000-1-00",
            "00-123456789abc4def8123456789abcdef-0000000000000000-00",
            "00-123456789abc4def8123456789abcdef-10000000000000000-00",
        ] {
            assert_eq!(Attempt::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_span_is_what_its_header_says() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let span = TraceContext::parse(text).unwrap();
        assert_eq!((span.to_string().as_str(), span.is_sampled), (text, true));
        assert!(TraceContext::parse(&text.replace("00-0", "01-0")).is_some());
        assert!(TraceContext::parse(&format!("{}-more", text.replace("00-0", "01-0"))).is_some());
        for bad in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
            "00-0af7651916cd43dd8448eb211c80319c-+7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_call_of_a_worker_survives_in_a_header() {
        let token = FencingToken {
            directory: 0xabc,
            start: 12,
        };
        for token in [None, Some(token)] {
            let call = WorkerCall {
                session: u64::MAX,
                number: 7,
                token,
            };
            let mut request = Request::new(());
            assert_eq!(WorkerCall::of(&request), None);
            call.attach_to(&mut request);
            assert_eq!(WorkerCall::of(&request), Some(call));
        }
    }

    #[test]
    fn a_request_says_for_which_action_it_is_made() {
        let context = ActionContext {
            action: "abc".to_owned(),
            attempt: Attempt::parse("00-00000000000000000000000000000007-0000000000000001-00"),
            worker: Some("{\"hostname\":\"ä\"}".to_owned()),
            trace: None,
        };
        let told = ActionContext::of(&context.request(()));
        // The attempt is a trace that is not recorded.
        assert!(told.trace.is_some_and(|trace| !trace.is_sampled));
        assert_eq!(
            ActionContext {
                trace: None,
                ..told
            },
            context
        );
        let recorded = ActionContext {
            trace: TraceContext::parse("00-000000000000000000000000000000ab-00000000000000cd-01"),
            ..context
        };
        assert_eq!(ActionContext::of(&recorded.request(())), recorded);
        assert_eq!(
            ActionContext::of(&Request::new(())),
            ActionContext::default()
        );
    }
}
