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
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures::task::AtomicWaker;
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
    /// While a write waits for it.
    turn: Option<Arc<Turn>>,
    /// The last one, to be used again.
    ended: Option<Arc<Turn>>,
    has_written: bool,
}

/// Until the runtime has run what is ready, and has asked the kernel for more. The connection's task may be polled
/// many times before.
#[derive(Debug, Default)]
struct Turn {
    is_over: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Turn {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<S> BatchedWrites<S> {
    pub(super) fn new(stream: S) -> Self {
        BatchedWrites {
            stream,
            turn: None,
            ended: None,
            has_written: false,
        }
    }

    /// Whether a write of this length is to wait; the task is woken for it.
    fn puts_off(&mut self, length: usize, context: &mut Context<'_>) -> bool {
        self.has_written = true;
        if length >= LONG {
            // Whatever ends later wakes the task once too often.
            self.turn = None;
            return false;
        }
        let begins = self.turn.is_none();
        let ended = &mut self.ended;
        let turn = self.turn.get_or_insert_with(|| begin(ended.take()));
        turn.task.register(context.waker());
        if begins {
            let waker = Waker::from(turn.clone());
            // The runtime wakes whoever yields when a turn is over, whether the future is there still or not.
            let _ = pin!(yield_now()).poll(&mut Context::from_waker(&waker));
        }
        if !turn.is_over.load(Ordering::Acquire) {
            return true;
        }
        self.ended = self.turn.take();
        false
    }
}

/// A new turn, in the memory of an old one if nobody else has that.
fn begin(ended: Option<Arc<Turn>>) -> Arc<Turn> {
    let mut turn = ended.unwrap_or_default();
    match Arc::get_mut(&mut turn) {
        Some(turn) => *turn.is_over.get_mut() = false,
        None => turn = Arc::default(),
    }
    turn
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

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Mutex};

    use super::*;

    /// Remembers what each write brought.
    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<usize>>>);

    impl AsyncWrite for Writes {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            data: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.lock().unwrap().push(data.len());
            Poll::Ready(Ok(data.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn stream() -> (BatchedWrites<Writes>, Writes) {
        let writes = Writes::default();
        (BatchedWrites::new(writes.clone()), writes)
    }

    #[tokio::test]
    async fn what_others_add_before_a_turn_is_over_goes_out_in_the_same_write() {
        let (mut stream, writes) = stream();
        for round in 1..=3 {
            let gathered = Arc::new(Mutex::new(vec![0; 10]));
            // Each of these is polled again for the turn that the write waits for, and none ends that.
            for _ in 0..5 {
                let gathered = gathered.clone();
                tokio::spawn(async move { gathered.lock().unwrap().extend([0; 10]) });
            }
            let mut polls = 0;
            poll_fn(|context| {
                polls += 1;
                if polls == 1 {
                    // As a call does that makes a frame.
                    context.waker().wake_by_ref();
                }
                let data = gathered.lock().unwrap().clone();
                Pin::new(&mut stream).poll_write(context, &data)
            })
            .await
            .unwrap();
            assert_eq!(*writes.0.lock().unwrap(), vec![60; round]);
        }
    }

    #[tokio::test]
    async fn what_is_long_goes_out_at_once_also_while_something_short_waits() {
        let (mut stream, writes) = stream();
        poll_fn(|context| {
            assert!(
                Pin::new(&mut stream)
                    .poll_write(context, &[0; 10])
                    .is_pending()
            );
            Pin::new(&mut stream).poll_write(context, &[0; LONG])
        })
        .await
        .unwrap();
        assert_eq!(*writes.0.lock().unwrap(), [LONG]);
    }

    #[tokio::test]
    async fn payloads_of_up_to_a_kibibyte_are_gathered_and_long_ones_are_not_copied() {
        struct Vectored(Writes);
        impl AsyncWrite for Vectored {
            fn poll_write(
                mut self: Pin<&mut Self>,
                context: &mut Context<'_>,
                data: &[u8],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.0).poll_write(context, data)
            }
            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
            fn is_write_vectored(&self) -> bool {
                true
            }
        }
        let mut stream = BatchedWrites::new(Vectored(Writes::default()));
        assert!(!stream.is_write_vectored());
        poll_fn(|context| Pin::new(&mut stream).poll_write(context, &[0; 10]))
            .await
            .unwrap();
        assert!(stream.is_write_vectored());
    }
}
