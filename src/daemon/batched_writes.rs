//! Writes that wait for what else is ready to be written.
//!
//! The HTTP/2 library writes each frame as soon as the task that made it wakes the connection's: a system call
//! for each message, and at the peer a wake-up for each. Under load many calls make a frame in one turn of the
//! runtime. So a short write first lets every task run that is ready, and goes out with what they added.
//! A long one goes out at once.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::yield_now,
};

/// As much is worth a system call of its own, bytes.
const LONG: usize = 8 << 10;

/// A stream whose short writes are put off for one turn of the runtime.
#[derive(Debug)]
pub(super) struct BatchedWrites<S> {
    stream: S,
    /// Whether the write that is asked for has been put off already.
    put_off: bool,
    has_written: bool,
}

impl<S> BatchedWrites<S> {
    pub(super) fn new(stream: S) -> Self {
        BatchedWrites {
            stream,
            put_off: false,
            has_written: false,
        }
    }

    /// Whether a write of this length is to wait; the task is woken for it.
    fn puts_off(&mut self, length: usize, context: &mut Context<'_>) -> bool {
        self.has_written = true;
        self.put_off = !self.put_off && length < LONG;
        // What it registers is the waker, so that it needs not be kept.
        self.put_off && pin!(yield_now()).poll(context).is_pending()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BatchedWrites<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BatchedWrites<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.puts_off(data.len(), context) {
            return Poll::Pending;
        }
        Pin::new(&mut this.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = data.iter().map(|part| part.len()).sum();
        if this.puts_off(length, context) {
            return Poll::Pending;
        }
        Pin::new(&mut this.stream).poll_write_vectored(context, data)
    }

    /// The HTTP/2 library asks at first, and then before each write. A "no" at first has it gather payloads of
    /// up to 1 KiB in one buffer, in place of writing each one of 256 bytes or more by itself.
    fn is_write_vectored(&self) -> bool {
        self.has_written && self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
