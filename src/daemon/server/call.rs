//! One call: what arrives and what leaves are counted, and neither waits for a peer for ever.
//!
//! 1. A request's message is counted in the connection's account from the moment that its length is
//!    known until its handler has taken it (`RequestReservation` is among the request's extensions), and is not
//!    read from the connection before there is room for it.
//! 2. A call that only waits, such as a Synchronize or an Execute, holds nothing.
//!
//! What becomes of its answer is in `response_body`.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tonic::{Status, body::Body, service::Routes};
use tower::Service;

use crate::auth::Identity;

use super::{
    budget::{BudgetExhausted, BudgetReservation, ConnectionBudget, PendingFuture},
    caller::Caller,
    connection::{CallConnection, CallOwner, ClientConnection},
    limits::ServerLimits,
    response_body::{ResponseBody, ResponseBudget, ResponseReservation},
    status,
};
use crate::{daemon::metrics::CountedCall, text::shorten};

/// A message that has begun may take a second more for so many bytes.
const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
/// Bytes that one byte of gzip can stand for.
const MAX_GZIP_RATIO: u64 = 1032;
/// A caller that asks faster than it may is kept waiting so long, and then refused.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Headers of a call, as `weight` counts them.
const LARGEST_HEADERS: u64 = 16 << 10;
/// What a call costs besides its headers and messages.
const CALL_OVERHEAD: u64 = 2 << 10;

/// The bytes of a request, for as long as somebody has them.
#[derive(Clone, Debug)]
pub struct RequestReservation(Arc<Mutex<RequestParts>>);

#[derive(Debug)]
struct RequestParts {
    _headers: BudgetReservation,
    message: Option<BudgetReservation>,
}

impl RequestReservation {
    /// For handlers that keep what they were sent while they answer.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().cloned()
    }
}

/// OUT_OF_RANGE, as tonic says it: clients try RESOURCE_EXHAUSTED again.
fn too_large(length: u64, largest: u64) -> Status {
    Status::out_of_range(format!(
        "a message of {length} bytes is larger than the {largest} that this server takes; ask for \
         fewer digests in one call, make batches of at most max_batch_total_size_bytes, and send \
         large blobs by ByteStream"
    ))
}

/// INVALID_ARGUMENT: clients try RESOURCE_EXHAUSTED again.
fn headers_too_large(headers: &HeaderMap, weight: u64) -> Status {
    let largest = headers.iter().max_by_key(|(_, value)| value.len());
    let (name, length) = largest.map_or(("", 0), |(name, value)| (name.as_str(), value.len()));
    Status::invalid_argument(format!(
        "the headers of this call take {weight} bytes, of the {LARGEST_HEADERS} that this server takes, and {} alone \
         has {length}; have the client send less in it",
        shorten(name)
    ))
}

/// The answer to one request of a connection.
pub(super) async fn answer(
    caller: &Arc<ClientConnection>,
    mut routes: Routes,
    mut request: Request<Incoming>,
) -> Response<ResponseBody> {
    let accounts = caller.accounts();
    let under_way = match caller.begin_call(&accounts) {
        Ok(under_way) => under_way,
        Err(calls) => {
            let text = format!(
                "{calls} calls are under way on this connection, which leaves no room for more; wait \
                 for some of them"
            );
            return refuse(caller, Status::resource_exhausted(text), None);
        }
    };
    let mut counted = CountedCall::begin(request.uri().path(), request.headers());
    let weight = weight(request.headers());
    if weight > LARGEST_HEADERS {
        let status = headers_too_large(request.headers(), weight);
        return refuse(caller, status, Some(counted));
    }
    // First of all: a call that waits for its token to be verified holds its headers.
    let headers = match accounts.received.reserve(CALL_OVERHEAD + weight).await {
        Ok(headers) => headers,
        Err(error) => return refuse(caller, status::exhausted(error), Some(counted)),
    };
    let identity = caller.identity.get().cloned().unwrap_or_default();
    let policy = &caller.policy;
    let authenticated = policy
        .authenticate(&identity, &caller.token_turn, request.headers())
        .await;
    let admitted = match authenticated {
        Ok(identity) => match begin(caller, &identity).await {
            Ok(owner) => policy
                .admit(request.uri().path(), &identity)
                .map(|access| (owner, access)),
            Err(status) => Err(status),
        },
        Err(status) => Err(status),
    };
    let (owner, access) = match admitted {
        Ok(admitted) => admitted,
        Err(status) => return refuse(caller, status, Some(counted)),
    };
    let accounts = owner.accounts.clone();
    let deadline = deadline(request.headers());
    let received = RequestReservation(Arc::new(Mutex::new(RequestParts {
        _headers: headers,
        message: None,
    })));
    request.extensions_mut().insert(caller.peer);
    request.extensions_mut().insert(access.identity().clone());
    request.extensions_mut().insert(access.clone());
    request.extensions_mut().insert(received.clone());
    request.extensions_mut().insert(CallConnection::new(caller));
    request
        .extensions_mut()
        .insert(ResponseBudget::new(&accounts));
    let request = request.map(|body| {
        Body::new(RequestBody {
            inner: body,
            limits: caller.limits.clone(),
            account: accounts.received.clone(),
            caller: owner.caller.clone(),
            pause: None,
            received,
            framing: MessageFraming::Header(Vec::new()),
            reservation: None,
            waiting: None,
            timer: Box::pin(tokio::time::sleep(caller.limits.pause)),
        })
    });
    let response = routes.call(request);
    let response = match deadline {
        None => response.await,
        Some(deadline) => match tokio::time::timeout(deadline, response).await {
            Ok(response) => response,
            // Its caller does not wait any longer, either.
            Err(_) => {
                let status = Status::deadline_exceeded("the deadline of the call has passed");
                return refuse(caller, status, Some(counted));
            }
        },
    };
    let (mut head, body) = match response {
        Ok(response) => response.into_parts(),
        Err(never) => match never {},
    };
    // An answer that is a failure has its status in its head.
    if !head.headers.contains_key("grpc-status")
        && let Err(status) = access.check_asked()
    {
        return refuse(caller, status, Some(counted));
    }
    status::shorten(&mut head.headers);
    counted.note(&head.headers);
    let reservation = ResponseReservation::take(&mut head.extensions);
    let under_way = Some((under_way, owner, counted));
    let body = ResponseBody::new(&accounts, body, reservation, under_way);
    Response::from_parts(head, body)
}

/// Counts a call as its caller's, and waits until that one may ask for more.
pub(super) async fn begin(
    caller: &ClientConnection,
    identity: &Identity,
) -> Result<CallOwner, Status> {
    let owner = caller.owner(identity).map_err(|caller| {
        Status::resource_exhausted(format!(
            "as many calls of {caller} are under way as it may have; wait for some of them"
        ))
    })?;
    let now = std::time::Instant::now();
    if owner.caller.requests.delay(now) > LONGEST_DELAY {
        return Err(Status::resource_exhausted(format!(
            "{} asks for more than it may in a second; call later",
            owner.caller.key
        )));
    }
    let delay = owner.caller.requests.take(1, now);
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    Ok(owner)
}

fn refuse(
    caller: &ClientConnection,
    status: Status,
    counted: Option<CountedCall>,
) -> Response<ResponseBody> {
    let mut response = status.into_http::<Body>();
    status::shorten(response.headers_mut());
    if let Some(mut counted) = counted {
        counted.note(response.headers());
    }
    response.map(|body| ResponseBody::new(&caller.accounts(), body, None, None))
}

/// The answer to every call of a connection that is served nothing.
pub(super) fn refuse_connection(
    caller: &ClientConnection,
    why: &'static str,
) -> Response<ResponseBody> {
    refuse(caller, Status::failed_precondition(why), None)
}

/// As HTTP/2 counts them (RFC 9113, section 6.5.2).
fn weight(headers: &HeaderMap) -> u64 {
    let length = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        (name.as_str().len() + value.len() + 32) as u64
    };
    headers.iter().map(length).sum()
}

/// The header grpc-timeout: at most eight digits and a unit. One that is none is as good as absent.
fn deadline(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 60 * 60),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Where in the stream of messages a request is. Each has five bytes in front: a flag, and its length
/// (gRPC over HTTP/2, Length-Prefixed-Message).
#[derive(Debug)]
enum MessageFraming {
    Header(Vec<u8>),
    Message { left: u64 },
}

impl MessageFraming {
    /// Follows the messages in a frame. What those that begin in it will take, or the length of one
    /// that is larger than `largest`.
    fn follow(&mut self, mut data: &[u8], largest: u64) -> Result<u64, u64> {
        let mut begun = 0;
        while !data.is_empty() {
            match self {
                MessageFraming::Header(header) => {
                    let (now, rest) = data.split_at((5 - header.len()).min(data.len()));
                    header.extend_from_slice(now);
                    data = rest;
                    let Some([flag, length @ ..]) = header.first_chunk::<5>() else {
                        continue;
                    };
                    let is_compressed = *flag == 1;
                    let length = u64::from(u32::from_be_bytes(*length));
                    if length > largest {
                        return Err(length);
                    }
                    begun += match is_compressed {
                        true => (length * MAX_GZIP_RATIO).min(largest),
                        false => length,
                    };
                    *self = MessageFraming::Message { left: length };
                }
                MessageFraming::Message { left } => {
                    let now =
                        usize::try_from(*left).map_or(data.len(), |left| left.min(data.len()));
                    *left -= now as u64;
                    data = data.get(now..).unwrap_or_default();
                }
            }
            if let MessageFraming::Message { left: 0 } = self {
                *self = MessageFraming::Header(Vec::new());
            }
        }
        Ok(begun)
    }
}

struct RequestBody {
    inner: Incoming,
    limits: Arc<ServerLimits>,
    account: Arc<ConnectionBudget>,
    caller: Arc<Caller>,
    /// Its caller has sent more than it may in a second.
    pause: Option<Pin<Box<Sleep>>>,
    received: RequestReservation,
    framing: MessageFraming,
    /// Waits for room for the message that begins in `waiting`.
    reservation: PendingFuture<Result<BudgetReservation, BudgetExhausted>>,
    waiting: Option<Bytes>,
    timer: Pin<Box<Sleep>>,
}

impl RequestBody {
    /// From now on the client has so long for what comes next.
    fn restart_timer(&mut self, begun: u64) {
        let limit = match self.framing {
            MessageFraming::Message { .. } if begun > 0 => {
                self.limits.message + Duration::from_secs(begun / MIN_BYTES_PER_SECOND)
            }
            // It has begun before.
            MessageFraming::Message { .. } => return,
            MessageFraming::Header(_) => self.limits.pause,
        };
        self.timer.as_mut().reset(Instant::now() + limit);
    }

    fn late(&self) -> Status {
        Status::deadline_exceeded(match self.framing {
            MessageFraming::Header(_) => "the client sent nothing for too long",
            MessageFraming::Message { .. } => "the client took too long to send a message",
        })
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(context));
                this.pause = None;
                this.timer
                    .as_mut()
                    .reset(Instant::now() + this.limits.pause);
            }
            if let Some(reservation) = &mut this.reservation {
                let reservation = ready!(reservation.as_mut().poll(context));
                this.reservation = None;
                match reservation {
                    Ok(reservation) => this.received.0.lock().message = Some(reservation),
                    Err(error) => return Poll::Ready(Some(Err(status::exhausted(error)))),
                }
            }
            if let Some(data) = this.waiting.take() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            let frame = match Pin::new(&mut this.inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Some(Err(Status::from_error(error.into()))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    ready!(this.timer.as_mut().poll(context));
                    return Poll::Ready(Some(Err(this.late())));
                }
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            };
            let largest = this.limits.largest_message;
            let begun = match this.framing.follow(&data, largest) {
                Ok(begun) => begun,
                Err(length) => return Poll::Ready(Some(Err(too_large(length, largest)))),
            };
            this.restart_timer(begun);
            this.pause = this.caller.pause_after(data.len());
            if begun > 0 {
                // What came before it has been taken.
                this.received.0.lock().message = None;
                let account = this.account.clone();
                this.reservation = Some(Box::pin(async move { account.reserve(begun).await }));
            }
            this.waiting = Some(data);
        }
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_followed_however_they_are_cut_into_frames() {
        let mut sent = Vec::new();
        for length in [3u32, 0, 70_000, 1] {
            sent.push(0);
            sent.extend(length.to_be_bytes());
            sent.extend(vec![9; length as usize]);
        }
        for size in [1, 2, 4, 5, 6, 7, 1000, sent.len()] {
            let mut framing = MessageFraming::Header(Vec::new());
            let begun: u64 = sent
                .chunks(size)
                .map(|frame| framing.follow(frame, 100_000).unwrap())
                .sum();
            assert_eq!(begun, 70_004);
            assert!(matches!(framing, MessageFraming::Header(begun) if begun.is_empty()));
        }
    }

    #[test]
    fn a_compressed_message_counts_as_what_it_can_become() {
        let follow = |flag: u8, length: u32, largest| {
            let header = [[flag].as_slice(), &length.to_be_bytes()].concat();
            MessageFraming::Header(Vec::new()).follow(&header, largest)
        };
        assert_eq!(follow(0, 1000, 1 << 20), Ok(1000));
        assert_eq!(follow(1, 1000, 1 << 30), Ok(1_032_000));
        assert_eq!(follow(1, 1000, 2000), Ok(2000));
        assert_eq!(follow(0, u32::MAX, 2000), Err(u64::from(u32::MAX)));
    }

    #[test]
    fn a_deadline_is_digits_and_a_unit_and_anything_else_is_none() {
        let deadline = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            super::deadline(&headers)
        };
        assert_eq!(deadline("20m"), Some(Duration::from_millis(20)));
        assert_eq!(deadline("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(
            deadline("99999999n"),
            Some(Duration::from_nanos(99_999_999))
        );
        for bad in ["", "m", "20", "20x", "-1S", "123456789S", "ä"] {
            assert_eq!(deadline(bad), None, "{bad:?}");
        }
    }
}
