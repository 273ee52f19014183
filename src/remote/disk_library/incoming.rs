//! A weight on its way to the cache: written beside it, checked, and only then renamed into it.
//! Separate because whatever ends a transfer, nothing of it may stay but a whole weight.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Layout};
use tempfile::NamedTempFile;

use super::file::{self, HEADER_LEN, Kept};
use super::session::Shared;
use super::table::INCOMING;
use crate::backend::HostTensor;
use crate::backend::host::digest_of;
use crate::error::{Error, Result};
use crate::remote::op::Digest;
use crate::remote::transport::BulkSink;

/// A file for a weight that comes, beside those that are there. It is locked as long as somebody
/// writes it, which tells other workers on the folder that it was not left behind.
pub fn create(folder: &Path) -> std::io::Result<NamedTempFile> {
    let file = tempfile::Builder::new().prefix(INCOMING).tempfile_in(folder)?;
    // On a file system without locks the file's age tells.
    let _ = file.as_file().try_lock();
    Ok(file)
}

/// The sink of one weight's row-major bytes.
pub struct Incoming {
    session: Arc<Shared>,
    digest: Digest,
    dtype: DType,
    dims: Vec<usize>,
    hasher: blake3::Hasher,
    /// How many bytes there will be, and how many there are.
    len: u64,
    received: u64,
    target: Target,
    reserved: u64,
    is_finished: bool,
}

/// Where the bytes go.
enum Target {
    /// A file without a place yet: it goes when this does.
    File(NamedTempFile),
    Memory(Vec<u8>),
    /// Nowhere: the weight is there.
    Known,
}

impl Incoming {
    /// A transfer of `len` bytes into the session's table, by way of a file that `create` makes in
    /// its folder.
    pub fn new(
        session: Arc<Shared>,
        digest: Digest,
        dtype: DType,
        dims: &[usize],
        len: u64,
        create: fn(&Path) -> std::io::Result<NamedTempFile>,
    ) -> Result<Self> {
        session.begin(len)?;
        // From here on its end is noted whatever happens.
        let mut incoming = Self {
            session,
            digest,
            dtype,
            dims: dims.to_vec(),
            hasher: digest_of(dtype, dims),
            len,
            received: 0,
            target: Target::Known,
            reserved: 0,
            is_finished: false,
        };
        incoming.aim(create)?;
        Ok(incoming)
    }

    /// Reserves the room, unless the weight is there, and writes the header.
    fn aim(&mut self, create: fn(&Path) -> std::io::Result<NamedTempFile>) -> Result<()> {
        if self.session.find(&self.digest).is_some() {
            return Ok(());
        }
        let bytes = self.len.saturating_add(HEADER_LEN as u64);
        self.session.table.reserve(bytes)?;
        self.reserved = bytes;
        // Memory grows as bytes come, not by what a client says.
        self.target = Target::Memory(Vec::new());
        if let Some(folder) = self.session.folder() {
            let header = file::header(self.digest, self.dtype, &self.dims)?;
            let file = create(folder).and_then(|mut file| {
                file.write_all(&header)?;
                Ok(file)
            });
            match file {
                Ok(file) => self.target = Target::File(file),
                Err(error) => self.session.cannot_write(&error),
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let received = self.received.saturating_add(bytes.len() as u64);
        if received > self.len {
            return Err(self.wrong_len(received));
        }
        match &mut self.target {
            Target::Known => {}
            Target::Memory(memory) => {
                self.hasher.update(bytes);
                append(memory, bytes)?;
            }
            Target::File(file) => {
                self.hasher.update(bytes);
                if let Err(error) = file.write_all(bytes) {
                    self.session.cannot_write(&error);
                    let mut memory = back_from_disk(file, self.received)?;
                    append(&mut memory, bytes)?;
                    self.target = Target::Memory(memory);
                }
            }
        }
        self.received = received;
        self.session.received(bytes.len() as u64);
        Ok(())
    }

    fn keep(&mut self) -> Result<()> {
        if self.received != self.len {
            return Err(self.wrong_len(self.received));
        }
        let target = std::mem::replace(&mut self.target, Target::Known);
        if !matches!(target, Target::Known) && *self.hasher.finalize().as_bytes() != self.digest.0 {
            return Err(Error::remote(format!(
                "the bytes of weight {} are others than its digest says: its file was changed \
                 while it was read, or a stored digest is stale",
                file::hex(&self.digest)
            )));
        }
        if self.session.find(&self.digest).is_some() {
            return Ok(());
        }
        let table = &self.session.table;
        let kept = match (target, &table.folder) {
            (Target::Known, _) | (Target::File(_), None) => {
                return Err(Error::remote("a weight went while it was sent: try again"));
            }
            (Target::Memory(memory), _) => self.in_memory(memory)?,
            (Target::File(file), Some(folder)) => {
                let path = file::path(folder, &self.digest);
                let _ = file.as_file().unlock();
                match file.persist(&path) {
                    Ok(file) => file::read(&path, &file)?,
                    Err(mut refused) => {
                        self.session.cannot_write(&refused.error);
                        self.in_memory(back_from_disk(&mut refused.file, self.len)?)?
                    }
                }
            }
        };
        kept.tensor.remember_digest(kept.tensor.dtype(), self.digest.0);
        table.put(self.digest, kept, std::mem::take(&mut self.reserved));
        if let Some(tensor) = table.pin(&self.digest) {
            self.session.hold(self.digest, tensor);
        }
        Ok(())
    }

    fn in_memory(&self, mut memory: Vec<u8>) -> Result<Kept> {
        memory.shrink_to_fit();
        let layout = Layout::contiguous(self.dims.clone());
        let tensor = HostTensor::new(self.dtype, layout, Arc::new(memory), 0)?;
        Ok(Kept { tensor, stamp: None })
    }

    fn wrong_len(&self, received: u64) -> Error {
        let (len, dims) = (self.len, &self.dims);
        Error::remote(format!("{received} bytes came for a weight of {dims:?}, which has {len}"))
    }

    /// Whoever waits for the weight hears of it at once.
    fn failed(&self, error: Error) -> Error {
        self.session.fail(error.clone());
        error
    }
}

impl BulkSink for Incoming {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.take(bytes).map_err(|error| self.failed(error))
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.is_finished = true;
        self.keep().map_err(|error| self.failed(error))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.session.table.release(self.reserved);
        self.session.finished(self.len);
        if !self.is_finished {
            self.session.fail(Error::remote("a transfer of weights broke off"));
        }
    }
}

fn append(memory: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    let more = memory.try_reserve(bytes.len());
    more.map_err(|_| Error::remote("the worker has no memory for a weight"))?;
    memory.extend_from_slice(bytes);
    Ok(())
}

/// The first `len` bytes of a weight whose file cannot be used any further.
fn back_from_disk(file: &mut NamedTempFile, len: u64) -> Result<Vec<u8>> {
    let mut memory = Vec::new();
    let read = file
        .seek(SeekFrom::Start(HEADER_LEN as u64))
        .and_then(|_| file.as_file().take(len).read_to_end(&mut memory));
    match read {
        Ok(read) if read as u64 == len => Ok(memory),
        // Where the folder lies is the worker's business.
        Ok(_) | Err(_) => Err(Error::remote("the worker's cache lost a weight: try again")),
    }
}
