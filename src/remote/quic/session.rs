//! One session at the worker, after its welcome: moves the bytes of a [`WorkerEnd`] until one side
//! is gone. Separate from the server, which decides who comes in. What may block (taking frames,
//! keeping bulk bytes, freeing memory) runs on threads beside the network's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{
    Code, Ending, FAREWELL_TIMEOUT, RELEASE_TIMEOUT, Staging, Step, Wake, blocking, receive,
    send_frame,
};
use crate::error::{Error, Result};
use crate::remote::hello::MAX_TEXT_BYTES;
use crate::remote::transport::{MAX_BULK_HEADER_BYTES, MAX_FRAME_BYTES, WorkerEnd};

/// Frames of a session that wait to be taken; behind them flow control holds the client back.
const WAITING_FRAMES: usize = 4;

/// A session that was welcomed.
pub(super) struct Session {
    pub number: u64,
    pub end: Arc<dyn WorkerEnd>,
    pub wake: Arc<Wake>,
    pub connection: Connection,
}

impl Session {
    /// Moves bytes until something ends.
    pub async fn drive(
        &self,
        idle_timeout: Option<Duration>,
        send: &mut SendStream,
        receive: RecvStream,
    ) -> Ending {
        let is_active = AtomicBool::new(true);
        let (frames, waiting) = mpsc::channel(WAITING_FRAMES);
        let fed = match self.feed(waiting) {
            Ok(fed) => fed,
            Err(error) => return error.into(),
        };
        let fed = async {
            match fed.await {
                Ok(Ok(())) => Ending::Finished,
                Ok(Err(error)) => error.into(),
                Err(_) => Error::remote("internal error: the session panicked").into(),
            }
        };
        tokio::select! {
            ending = fed => ending,
            ending = receive_frames(receive, frames, &is_active) => ending,
            ending = self.send_frames(send, &is_active) => ending,
            ending = self.receive_bulk(&is_active) => ending,
            error = self.connection.closed() => Ending::Lost(error),
            ending = idle(idle_timeout, || {
                is_active.swap(false, Ordering::Relaxed) || self.end.is_busy()
            }) => ending,
        }
    }

    /// A thread that hands frames to the session, which may make it wait. It ends when there are no
    /// more, or with the session's error.
    fn feed(&self, mut waiting: mpsc::Receiver<Vec<u8>>) -> Result<oneshot::Receiver<Result<()>>> {
        let end = Arc::clone(&self.end);
        let (tell, fed) = oneshot::channel();
        let run = move || {
            let mut result = Ok(());
            while result.is_ok()
                && let Some(frame) = waiting.blocking_recv()
            {
                result = end.received(frame);
            }
            // Nobody waits for it once the connection is gone.
            let _ = tell.send(result);
        };
        let name = format!("session {}", self.number);
        let thread = thread::Builder::new().name(name).spawn(run);
        thread.map_err(|error| Error::other(format!("no thread for the session: {error}")))?;
        Ok(fed)
    }

    async fn send_frames(&self, send: &mut SendStream, is_active: &AtomicBool) -> Ending {
        loop {
            self.wake.looks_for_frames();
            while let Some(frame) = self.end.next_frame() {
                is_active.store(true, Ordering::Relaxed);
                if let Err(ending) = send_frame(send, frame).await {
                    return ending;
                }
            }
            self.wake.frames.notified().await;
        }
    }

    async fn receive_bulk(&self, is_active: &AtomicBool) -> Ending {
        let staging = Arc::new(Staging::default());
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                stream = self.connection.accept_uni() => match stream {
                    Ok(stream) => {
                        let (end, staging) = (Arc::clone(&self.end), Arc::clone(&staging));
                        running.spawn(receive_one_bulk(stream, end, staging));
                    }
                    Err(error) => return error.into(),
                },
                Some(received) = running.join_next() => match received {
                    Ok(Ok(())) => {}
                    Ok(Err(ending)) => return ending,
                    Err(_) => return Error::remote("internal error in a transfer").into(),
                },
            }
            is_active.store(true, Ordering::Relaxed);
        }
    }

    /// Tells both ends that it is over.
    pub async fn part(self, ending: Ending, mut send: SendStream) {
        let end = Arc::clone(&self.end);
        let lost = blocking(move || {
            end.lost();
            Ok(())
        });
        let farewell = async {
            let (code, text) = match ending {
                Ending::Finished => {
                    // The client closes when it has read to the end.
                    let _ = send.finish();
                    let _ = timeout(FAREWELL_TIMEOUT, self.connection.closed()).await;
                    (Code::Done, String::new())
                }
                Ending::Lost(_) => (Code::Done, String::new()),
                Ending::Broken(error) | Ending::Fault(error) => (Code::Fault, error.to_string()),
            };
            let text = text.get(..text.floor_char_boundary(MAX_TEXT_BYTES)).unwrap_or_default();
            self.connection.close(code.into(), text.as_bytes());
        };
        let (released, ()) = tokio::join!(timeout(RELEASE_TIMEOUT, lost), farewell);
        if !matches!(released, Ok(Ok(()))) {
            tracing::warn!(number = self.number, "the session did not let go");
        }
    }
}

/// At the end of the stream the channel is closed, and what was received decides.
async fn receive_frames(
    mut stream: RecvStream,
    frames: mpsc::Sender<Vec<u8>>,
    is_active: &AtomicBool,
) -> Ending {
    loop {
        match receive(&mut stream, MAX_FRAME_BYTES, "frame").await {
            Ok(frame) => {
                is_active.store(true, Ordering::Relaxed);
                if frames.send(frame).await.is_err() {
                    break;
                }
            }
            Err(Ending::Finished) => break,
            Err(ending) => return ending,
        }
    }
    drop(frames);
    std::future::pending().await
}

/// While one buffer is kept the next one is received.
async fn receive_one_bulk(
    mut stream: RecvStream,
    end: Arc<dyn WorkerEnd>,
    staging: Arc<Staging>,
) -> Step<()> {
    let header = receive(&mut stream, MAX_BULK_HEADER_BYTES, "bulk header").await;
    let header = header.map_err(|ending| match ending {
        Ending::Finished => Error::remote("malformed message: a transfer without a header").into(),
        other => other,
    })?;
    let mut sink = blocking(move || end.bulk(&header)).await?;
    let mut ready = None::<(Vec<u8>, usize)>;
    loop {
        let keeping = blocking(|| {
            if let Some((buffer, filled)) = &ready {
                sink.write(buffer.get(..*filled).unwrap_or_default())?;
            }
            Ok((sink, ready))
        });
        let filling = async {
            let mut buffer = staging.take();
            let mut filled = 0;
            while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                match stream.read(rest).await? {
                    Some(count) => filled += count,
                    None => break,
                }
            }
            Ok::<_, Ending>((buffer, filled))
        };
        let (kept, filled) = tokio::join!(keeping, filling);
        let used;
        (sink, used) = kept?;
        if let Some((buffer, _)) = used {
            staging.give(buffer);
        }
        let (buffer, filled) = filled?;
        if filled == 0 {
            staging.give(buffer);
            return Ok(blocking(move || sink.finish()).await?);
        }
        ready = Some((buffer, filled));
    }
}

/// Ends when nothing was active for `limit`, and up to a quarter of it longer.
async fn idle(limit: Option<Duration>, was_active: impl Fn() -> bool) -> Ending {
    let Some(limit) = limit else { return std::future::pending().await };
    let mut quiet_quarters = 0;
    while quiet_quarters < 4 {
        sleep(limit / 4).await;
        quiet_quarters = if was_active() { 0 } else { quiet_quarters + 1 };
    }
    Error::remote(format!("nothing was asked for {limit:?} (--idle-timeout)")).into()
}

/// For the log.
pub(super) fn reason(ending: &Ending) -> String {
    match ending {
        Ending::Finished => "the client is done".to_owned(),
        Ending::Lost(ConnectionError::ApplicationClosed(close))
            if close.error_code == Code::Done.into() =>
        {
            "the client is done".to_owned()
        }
        Ending::Lost(error) => error.to_string(),
        Ending::Broken(error) | Ending::Fault(error) => error.to_string(),
    }
}
