//! One bulk transfer from the client: buffers go from a thread that may block to a stream. Separate
//! from the client, which decides how many run at once.

use std::sync::Arc;

use bytes::Bytes;
use quinn::{Connection, SendStream};

use super::{Code, Loan, Staging, Step, blocking};
use crate::error::{Error, Result};
use crate::remote::transport::{BulkSource, MAX_BULK_HEADER_BYTES, ReadBytes};

/// While one buffer is on its way the next is filled, by a thread that may wait for the disk.
pub(super) async fn send_one_bulk(
    connection: Connection,
    source: BulkSource,
    staging: Arc<Staging>,
) -> Step<()> {
    let BulkSource { header, len, read } = source;
    if header.len() > MAX_BULK_HEADER_BYTES {
        return Err(Error::remote(format!("a header of {} bytes", header.len())).into());
    }
    let mut stream = connection.open_uni().await?;
    stream.write_all(&(header.len() as u32).to_le_bytes()).await?;
    stream.write_all(&header).await?;
    let sent = send_bytes(&mut stream, read, &staging).await;
    if !matches!(sent, Ok(sent) if sent == len) {
        // A stream that is only dropped looks finished, and short, at the other end.
        let _ = stream.reset(Code::Fault.into());
    }
    let sent = sent?;
    if sent != len {
        return Err(Error::remote(format!("a transfer of {len} bytes had {sent}")).into());
    }
    // Closed already only if the connection is.
    let _ = stream.finish();
    Ok(())
}

/// How many there were.
async fn send_bytes(
    stream: &mut SendStream,
    mut read: ReadBytes,
    staging: &Arc<Staging>,
) -> Step<u64> {
    let (mut sent, mut ready) = (0u64, Bytes::new());
    loop {
        let mut loan = Loan { buffer: staging.take(), filled: 0, staging: Arc::clone(staging) };
        let filling = blocking(move || {
            loan.filled = fill(&mut *read, &mut loan.buffer)?;
            Ok((read, loan))
        });
        let writing = async {
            match std::mem::take(&mut ready) {
                nothing if nothing.is_empty() => Ok(()),
                bytes => stream.write_chunk(bytes).await,
            }
        };
        let (filled, written) = tokio::join!(filling, writing);
        written?;
        let (next_read, loan) = filled?;
        read = next_read;
        if loan.filled == 0 {
            return Ok(sent);
        }
        sent = sent.saturating_add(loan.filled as u64);
        // Not copied once more, and lent until the worker has it.
        ready = Bytes::from_owner(loan);
    }
}

/// Fills the buffer, or less only at the end.
fn fill(
    read: &mut (dyn FnMut(&mut [u8]) -> Result<usize> + Send),
    buffer: &mut [u8],
) -> Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match read(rest)? {
            0 => break,
            count => filled += count.min(rest.len()),
        }
    }
    Ok(filled)
}
