//! What a session sends beside its frames. Separate because these bytes come from elsewhere, a file
//! that may be cut short, and their failure is the session's.

use std::sync::Weak;

use super::Session;
use crate::error::{Error, Result};
use crate::remote::op::Op;
use crate::remote::transport::{BulkSource, ClientEnd};

impl Session {
    /// Sends `len` bytes beside the frames; the op that stands for them.
    ///
    /// # Errors
    /// If the session is over.
    pub fn transfer(&self, source: impl FnOnce(u64) -> (BulkSource, Op)) -> Result<Op> {
        let mut state = self.ready()?;
        let transfer = state.next_transfer;
        state.next_transfer += 1;
        let (source, op) = source(transfer);
        state.statistics.bulk_bytes_up += source.len;
        state.bulk.push_back(telling(source, self.this.clone()));
        drop(state);
        self.wake();
        Ok(op)
    }

    /// Sends weights beside the frames.
    ///
    /// # Errors
    /// If the session is over.
    pub fn send_bulk(&self, source: BulkSource) -> Result<()> {
        let len = source.len;
        self.transfer(|_| (source, Op::Copy))?;
        self.lock().statistics.weight_bytes_up += len;
        Ok(())
    }
}

/// The source, whose failure ends the session before the worker can see a transfer break off: its
/// answer to that would be taken for the cause.
fn telling(source: BulkSource, session: Weak<Session>) -> BulkSource {
    let BulkSource { header, len, mut read } = source;
    let mut sent = 0u64;
    let mut read_whole = move |buffer: &mut [u8]| {
        let count = read(buffer)?;
        sent = sent.saturating_add(count as u64);
        if count == 0 && sent < len {
            return Err(Error::remote(format!("a transfer of {len} bytes had {sent}")));
        }
        Ok(count)
    };
    let read = move |buffer: &mut [u8]| {
        read_whole(buffer).inspect_err(|error| {
            if let Some(session) = session.upgrade() {
                session.lost(error.clone());
            }
        })
    };
    BulkSource { header, len, read: Box::new(read) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::message::Reply;
    use crate::remote::op::Id;

    #[test]
    fn what_a_worker_says_of_a_transfer_that_broke_off_is_not_the_cause() {
        for (bytes, cause) in [
            (Err(Error::other("the file was cut short")), "the file was cut short"),
            (Ok(0), "a transfer of 8 bytes had 0"),
        ] {
            let session = Session::new("worker");
            let read = session.read(Id(0), 24).unwrap();
            let source = |_| {
                let read = Box::new(move |_: &mut [u8]| bytes.clone());
                (BulkSource { header: vec![], len: 8, read }, Op::Copy)
            };
            session.transfer(source).unwrap();
            let mut source = session.next_bulk().unwrap();
            assert!((source.read)(&mut [0; 8]).is_err());
            // Nobody has told the session yet but its source.
            let mut answer = Vec::new();
            Reply::Failed("a transfer broke off".to_owned()).put(&mut answer);
            session.received(&answer).unwrap();
            assert_eq!(session.data(read).unwrap_err().to_string(), cause);
        }
    }
}
