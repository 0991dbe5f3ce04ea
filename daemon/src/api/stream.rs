//! What all streams share: a bounded channel to the client, and the ways a stream ends.

use std::{future::Future, pin::Pin};

use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Response, Status};

use crate::registry::Hosted;

pub type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Messages on their way to a client; a slow one stops its own stream only.
const DEPTH: usize = 16;

/// The client went away: the stream's work is over.
pub struct Gone;

pub struct Feed<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Feed<T> {
    pub async fn send(&self, item: T) -> Result<(), Gone> {
        self.0.send(Ok(item)).await.map_err(|_| Gone)
    }

    /// Waits for something new on the VM. Gone also when the daemon closes.
    pub async fn wait(
        &self,
        changes: &mut watch::Receiver<()>,
        closed: &mut watch::Receiver<bool>,
    ) -> Result<(), Gone> {
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| Gone),
            _ = closed.wait_for(|closed| *closed) => Err(Gone),
            () = self.0.closed() => Err(Gone),
        }
    }
}

/// A stream fed by `work` until it returns.
pub fn feed<T, F>(work: impl FnOnce(Feed<T>) -> F) -> Response<BoxStream<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(DEPTH);
    tokio::spawn(work(Feed(sender)));
    Response::new(Box::pin(ReceiverStream::new(receiver)))
}

/// Calls `look` until the VM is quiet and it finds nothing more, or `follow` is false and it finds nothing more.
/// `look` returns whether it found something.
pub async fn follow<T, F>(
    feed: &Feed<T>,
    hosted: &Hosted,
    mut closed: watch::Receiver<bool>,
    follow: bool,
    mut look: impl FnMut() -> F,
) -> Result<(), Gone>
where
    F: Future<Output = Result<bool, Gone>>,
{
    let mut changes = hosted.changes();
    loop {
        changes.mark_unchanged();
        // Before looking: what is quiet now has written all that it ever will.
        let quiet = hosted.is_quiet();
        if look().await? {
            continue;
        }
        if quiet || !follow {
            return Ok(());
        }
        feed.wait(&mut changes, &mut closed).await?;
    }
}
