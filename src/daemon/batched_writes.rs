//! Writes that wait for what else is ready to be written.
//!
//! The HTTP/2 library writes each frame as soon as the task that made it wakes the connection's: a system call
//! for each message, and at the peer a wake-up for each. Under load many tasks that are ready make a frame each. So
//! a short write first yields to all of them, and goes out with what they added. A long one goes out at once.

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

/// A stream whose short writes yield once to all tasks that are ready.
#[derive(Debug)]
pub(super) struct BatchedWrites<S> {
    stream: S,
    /// While a write waits for it.
    yielding: Option<Arc<Yield>>,
    was_asked: AtomicBool,
}

/// Until the runtime has run what is ready, and has asked the kernel for more. The connection's task may be polled
/// many times before.
#[derive(Debug, Default)]
struct Yield {
    is_over: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Yield {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<S> BatchedWrites<S> {
    pub(super) fn new(stream: S) -> Self {
        BatchedWrites {
            stream,
            yielding: None,
            was_asked: AtomicBool::new(false),
        }
    }

    /// Whether a short write is to wait; the task is woken for it.
    fn yields(&mut self, context: &mut Context<'_>) -> bool {
        let begins = self.yielding.is_none();
        let yielding = self.yielding.get_or_insert_default();
        yielding.task.register(context.waker());
        if begins {
            let waker = Waker::from(yielding.clone());
            // The runtime wakes whoever has yielded, whether the future is there still or not.
            let _ = pin!(yield_now()).poll(&mut Context::from_waker(&waker));
        }
        if !yielding.is_over.load(Ordering::Acquire) {
            return true;
        }
        self.yielding = None;
        false
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
        if data.len() < LONG && this.yields(context) {
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
        // Behind a payload that is a part of its own the library adds nothing, so that there is nothing to wait for.
        if let [data] = data
            && data.len() < LONG
            && this.yields(context)
        {
            return Poll::Pending;
        }
        Pin::new(&mut this.stream).poll_write_vectored(context, data)
    }

    /// The HTTP/2 library asks at first, and then before each write. A "no" at first has it gather payloads of
    /// up to 1 KiB in one buffer, in place of writing each one of 256 bytes or more by itself.
    fn is_write_vectored(&self) -> bool {
        self.was_asked.swap(true, Ordering::Relaxed) && self.stream.is_write_vectored()
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
    async fn what_ready_tasks_add_goes_out_in_the_same_write() {
        let (mut stream, writes) = stream();
        for round in 1..=3 {
            let gathered = Arc::new(Mutex::new(vec![0; 10]));
            // Tasks that are ready, and have something to write each.
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
    async fn a_payload_that_is_a_part_of_its_own_waits_for_nothing() {
        let (mut stream, writes) = stream();
        poll_fn(|context| {
            let parts = [io::IoSlice::new(&[0; 9]), io::IoSlice::new(&[0; 2000])];
            assert!(
                Pin::new(&mut stream)
                    .poll_write_vectored(context, &parts)
                    .is_ready()
            );
            Poll::Ready(())
        })
        .await;
        // What is asked for one part after another takes the first.
        assert_eq!(*writes.0.lock().unwrap(), [9]);
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
