//! What a call answers: made when there is room for it, and counted until it is written.
//!
//! 1. An answer is made only when there is room for it, and counted until its bytes were written to
//!    the connection: each piece of it carries its reservation.
//! 2. What a handler holds before its answer is made, it reserves by `ResponseBudget`.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::Extensions;
use http_body::{Body as HttpBody, Frame};
use tokio::time::Sleep;
use tonic::{Status, body::Body};

use super::{
    budget::{BudgetReservation, ConnectionBudget, PendingFuture},
    caller::Accounts,
    connection::{ActiveCall, CallOwner},
    status,
};
use crate::daemon::metrics::CountedCall;

/// An answer is handed to the connection in pieces of this size, whose writing is progress.
const CHUNK_SIZE: usize = 64 << 10;

/// Where a handler asks for room before it makes an answer.
#[derive(Clone, Debug)]
pub struct ResponseBudget(Arc<ConnectionBudget>);

/// Room for an answer that a handler has made; among the response's extensions.
#[derive(Clone, Debug)]
pub(super) struct ResponseReservation(
    #[expect(dead_code, reason = "it is held, not read")] Arc<BudgetReservation>,
);

impl ResponseBudget {
    pub(super) fn new(accounts: &Accounts) -> Self {
        ResponseBudget(accounts.answers.clone())
    }

    /// `None` when it is no server of ours that calls.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().cloned()
    }

    /// Waits for room for so many bytes; an error is the call's answer.
    pub async fn reserve(&self, bytes: u64) -> Result<BudgetReservation, Status> {
        self.0.reserve(bytes).await.map_err(status::exhausted)
    }
}

/// Counts an answer until it is written.
pub fn with_reservation<T>(
    mut response: tonic::Response<T>,
    reservation: Option<BudgetReservation>,
) -> tonic::Response<T> {
    if let Some(reservation) = reservation {
        response
            .extensions_mut()
            .insert(ResponseReservation(Arc::new(reservation)));
    }
    response
}

impl ResponseReservation {
    /// What the handler has reserved for its answer.
    pub(super) fn take(extensions: &mut Extensions) -> Option<Self> {
        extensions.remove()
    }
}

/// What a call answers, in pieces that are counted until they are written.
pub(super) struct ResponseBody {
    inner: Body,
    account: Arc<ConnectionBudget>,
    reservation: Option<ResponseReservation>,
    waiting: PendingFuture<()>,
    /// Its caller has been sent more than it may in a second.
    pause: Option<Pin<Box<Sleep>>>,
    rest: Option<(Bytes, Arc<BudgetReservation>)>,
    /// Until the answer was handed to the connection.
    under_way: Option<(ActiveCall, CallOwner, CountedCall)>,
}

/// A piece of an answer. All pieces share their memory, which is free when the last one is written.
struct Chunk {
    data: Bytes,
    reservation: Arc<BudgetReservation>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.reservation.progressed();
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl ResponseBody {
    pub(super) fn new(
        accounts: &Accounts,
        inner: Body,
        reservation: Option<ResponseReservation>,
        under_way: Option<(ActiveCall, CallOwner, CountedCall)>,
    ) -> Self {
        ResponseBody {
            inner,
            account: accounts.answers.clone(),
            reservation,
            waiting: None,
            pause: None,
            rest: None,
            under_way,
        }
    }

    fn next_chunk(&mut self) -> Option<Bytes> {
        let (data, reservation) = self.rest.as_mut()?;
        let (data, reservation) = match data.len() > CHUNK_SIZE {
            true => (data.split_to(CHUNK_SIZE), reservation.clone()),
            false => self.rest.take()?,
        };
        Some(Bytes::from_owner(Chunk { data, reservation }))
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if let Some(piece) = this.next_chunk() {
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        if let Some(pause) = &mut this.pause {
            ready!(pause.as_mut().poll(context));
            this.pause = None;
        }
        if this.reservation.is_none() {
            if this.waiting.is_none() && !this.account.has_room() {
                this.waiting = Some(Box::pin(this.account.clone().wait_for_space()));
            }
            if let Some(waiting) = &mut this.waiting {
                ready!(waiting.as_mut().poll(context));
                this.waiting = None;
            }
        }
        let frame = match ready!(Pin::new(&mut this.inner).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            end => return Poll::Ready(end),
        };
        let frame = match frame.into_data() {
            Ok(data) if data.is_empty() => Frame::data(data),
            Ok(data) => {
                if let Some((_, owner, _)) = &this.under_way {
                    this.pause = owner.caller.pause_after(data.len());
                }
                let reservation = Arc::new(this.account.charge(data.len() as u64));
                this.reservation = None;
                this.rest = Some((data, reservation));
                Frame::data(this.next_chunk().unwrap_or_default())
            }
            Err(frame) => match frame.into_trailers() {
                Ok(mut trailers) => {
                    status::shorten(&mut trailers);
                    if let Some((_, _, counted)) = &mut this.under_way {
                        counted.note(&trailers);
                    }
                    Frame::trailers(trailers)
                }
                Err(frame) => frame,
            },
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.inner.is_end_stream()
    }
}
