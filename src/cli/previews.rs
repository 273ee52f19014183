//! `--preview`: approximate pictures in a file beside the output, while the picture is being made.
//! Separate from the display because these are files: they appear whole, and go at the end.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::files;
use super::output::{Target, before_suffix};
use crate::error::Result;
use crate::image::{ImageSize, Picture};
use crate::progress::{Event, Progress};

/// Passes the events of one picture on, and writes its previews. Dropped, it removes the file.
pub(super) struct Previews<'a> {
    progress: &'a dyn Progress,
    /// Of the finished picture.
    size: ImageSize,
    /// Where a preview may go: a name that is not taken, then that name.
    target: Mutex<Option<Target>>,
}

impl<'a> Previews<'a> {
    /// Of a picture that will be `size` and go to `target`.
    pub fn new(progress: &'a dyn Progress, size: ImageSize, target: &Target) -> Self {
        let beside = |path: &Path| Target::Fresh(before_suffix(path, "-preview"));
        let target = match target {
            Target::Stdout => None,
            Target::Replace(path) | Target::Fresh(path) => Some(beside(path)),
        };
        Self { progress, size, target: Mutex::new(target) }
    }

    fn write(&self, picture: &Picture) -> Result<()> {
        let mut target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = &*target else { return Ok(()) };
        let png = picture.enlarged(self.size)?.to_plain_png()?;
        let path = files::write(place, &png)?;
        files::set_passing_file(path.clone());
        *target = path.map(Target::Replace);
        Ok(())
    }
}

impl Progress for Previews<'_> {
    fn report(&self, event: Event<'_>) {
        if let Event::Preview { picture, .. } = event
            && let Err(error) = self.write(picture)
        {
            // The picture itself may still be written.
            self.progress.report(Event::Warning(&format!("no preview: {error}")));
        }
        self.progress.report(event);
    }

    fn check(&self) -> Result<()> {
        self.progress.check()
    }
}

impl Drop for Previews<'_> {
    fn drop(&mut self) {
        files::remove_passing_file();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn a_preview_lies_beside_its_picture_takes_no_name_and_goes_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let [taken, free] =
            ["x-preview.png", "x-preview-1.png"].map(|name| folder.path().join(name));
        std::fs::write(&taken, "mine").unwrap();
        let picture =
            |grey: u8| Picture::new(ImageSize { height: 1, width: 2 }, vec![grey; 6]).unwrap();
        let target = Target::Replace(folder.path().join("x.png"));
        let previews = Previews::new(&Silent, ImageSize { height: 8, width: 16 }, &target);
        for grey in [10, 200] {
            previews.report(Event::Preview { done: 1, picture: &picture(grey) });
            let file = std::io::BufReader::new(std::fs::File::open(&free).unwrap());
            let mut reader = png::Decoder::new(file).read_info().unwrap();
            let mut pixels = vec![0; 3 * 8 * 16];
            reader.next_frame(&mut pixels).unwrap();
            assert_eq!(pixels, vec![grey; 3 * 8 * 16]);
        }
        drop(previews);
        assert!(!free.exists());
        assert_eq!(std::fs::read(&taken).unwrap(), b"mine");
    }
}
