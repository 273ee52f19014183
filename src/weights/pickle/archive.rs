//! The zip archive around PyTorch's pickles: finds entries and maps them where they lie. Separate
//! because it is the only file that knows zip.

use std::io::Cursor;

use zip::{CompressionMethod, ZipArchive};

use super::bytes::region;
use crate::backend::host::SharedBytes;
use crate::error::{Error, Result};

/// Most entries of an archive: one per storage, and some more.
const MAX_ENTRIES: usize = 1 << 17;
/// How a zip archive begins: with its first entry.
const ZIP: &[u8] = b"PK\x03\x04";
/// How `torch.save` of PyTorch < 1.6 begins: the pickle of the number 0x1950a86a20f9469cfc6c.
const OLD_FORMAT: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// What a tar archive has at byte 257; PyTorch < 0.1.10 wrote such.
const TAR: &[u8] = b"ustar";

/// An archive that `torch.save` has written.
pub(super) struct Archive<'f> {
    file: &'f SharedBytes,
    zip: ZipArchive<Cursor<&'f [u8]>>,
    /// The name of the folder that all entries lie in.
    folder: String,
}

impl<'f> Archive<'f> {
    /// # Errors
    /// If it is no zip archive with one `data.pkl`; older formats are named.
    pub(super) fn open(file: &'f SharedBytes) -> Result<Self> {
        let bytes = (**file).as_ref();
        check_kind(bytes)?;
        let zip = ZipArchive::new(Cursor::new(bytes)).map_err(|error| {
            Error::model(format!(
                "the zip directory at the end of the file cannot be read ({error}): it is cut \
                 off or damaged, download it again"
            ))
        })?;
        if zip.len() > MAX_ENTRIES || zip.has_duplicate_names() {
            return Err(Error::model(format!(
                "the zip archive has more than {MAX_ENTRIES} entries or two of one name"
            )));
        }
        let mut folders = zip.file_names_raw().filter_map(|name| {
            let folder = std::str::from_utf8(name).ok()?.strip_suffix("/data.pkl")?;
            (!folder.contains('/')).then(|| folder.to_owned())
        });
        let (folder, more) = (folders.next(), folders.next());
        match (folder, more) {
            (Some(folder), None) => {
                drop(folders);
                Ok(Self { file, zip, folder })
            }
            _ => Err(Error::model("a zip archive, but not one that torch.save wrote: no data.pkl")),
        }
    }

    /// The bytes of an entry, where they lie in the file.
    ///
    /// # Errors
    /// If there is no such entry, or it is compressed or encrypted, which torch never does.
    pub(super) fn entry(&mut self, name: &str) -> Result<SharedBytes> {
        self.find(name)?
            .ok_or_else(|| Error::model(format!("the archive has no entry {name}, it is damaged")))
    }

    /// # Errors
    /// If the machine that wrote the file was big-endian.
    pub(super) fn check_byte_order(&mut self) -> Result<()> {
        // Absent before PyTorch 2.1, when only little-endian machines could read it anyway.
        let Some(order) = self.find("byteorder")? else { return Ok(()) };
        if (*order).as_ref() == b"little" {
            return Ok(());
        }
        Err(Error::model(
            "its byte order is not little-endian: load and save it again with torch on a \
             little-endian machine",
        ))
    }

    fn find(&mut self, name: &str) -> Result<Option<SharedBytes>> {
        let Some(index) = self.zip.index_for_name(&format!("{}/{name}", self.folder)) else {
            return Ok(None);
        };
        let damaged = |error: &dyn std::fmt::Display| {
            Error::model(format!("entry {name} of the archive is damaged: {error}"))
        };
        let entry = self.zip.by_index_raw(index).map_err(|error| damaged(&error))?;
        if entry.encrypted() || entry.compression() != CompressionMethod::Stored {
            return Err(Error::model(format!(
                "entry {name} of the archive is compressed or encrypted, which torch.save never \
                 does: load it and save it again with torch, or use a safetensors version"
            )));
        }
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let len = usize::try_from(entry.size()).ok();
        start
            .zip(len)
            .filter(|_| entry.size() == entry.compressed_size())
            .and_then(|(start, len)| region(self.file, start, len))
            .map(Some)
            .ok_or_else(|| damaged(&"it reaches beyond the end of the file"))
    }
}

/// Names what the file is if it is not what this reader reads.
fn check_kind(bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(ZIP) {
        return Ok(());
    }
    // After the two bytes that give the protocol.
    let is_old = bytes.get(2..).is_some_and(|rest| rest.starts_with(OLD_FORMAT));
    let is_tar = bytes.get(257..).is_some_and(|rest| rest.starts_with(TAR));
    Err(Error::model(if is_old || is_tar {
        "this is the format of PyTorch before 1.6, which is not read: save it again with \
         torch.save(torch.load(path, weights_only=True), path), or use a safetensors version"
    } else {
        "this is not a PyTorch checkpoint (a zip archive): download it again, or use a \
         safetensors version"
    }))
}
