//! `--preview`: approximate pictures in a file beside the output, while the picture is being made.
//! Separate from the display because these are files: they appear whole, and go at the end.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::files;
use super::output::{Target, before_suffix};
use crate::error::Result;
use crate::image::{ImageSize, Picture};
use crate::progress::{Event, Progress};

/// Passes the events of pictures that are made together on, and writes their previews. Dropped, it
/// removes the files.
pub(super) struct Previews<'a> {
    progress: &'a dyn Progress,
    /// Of the finished pictures.
    size: ImageSize,
    /// Where the previews of each picture may go: a name that is not taken, then that name.
    targets: Mutex<Vec<Option<Target>>>,
}

impl<'a> Previews<'a> {
    /// Of pictures that will be `size` and go to `targets`.
    pub fn new(progress: &'a dyn Progress, size: ImageSize, targets: &[Target]) -> Self {
        let beside = |path: &Path| Target::Fresh(before_suffix(path, "-preview"));
        let targets = targets.iter().map(|target| match target {
            Target::Stdout => None,
            Target::Replace(path) | Target::Fresh(path) => Some(beside(path)),
        });
        Self { progress, size, targets: Mutex::new(targets.collect()) }
    }

    fn write(&self, index: usize, picture: &Picture) -> Result<()> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(target)) = targets.get_mut(index) else { return Ok(()) };
        let png = picture.enlarged(self.size)?.to_plain_png()?;
        if let Some(path) = files::write(target, &png)? {
            files::add_passing_file(&path);
            *target = Target::Replace(path);
        }
        Ok(())
    }
}

impl Progress for Previews<'_> {
    fn report(&self, event: Event<'_>) {
        if let Event::Preview { index, picture, .. } = event
            && let Err(error) = self.write(index, picture)
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
        let targets = self.targets.get_mut().unwrap_or_else(PoisonError::into_inner);
        for target in targets {
            // A fresh name was not used yet.
            if let Some(Target::Replace(path)) = target {
                files::remove_passing_file(path);
            }
        }
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
        let previews = Previews::new(&Silent, ImageSize { height: 8, width: 16 }, &[target]);
        for grey in [10, 200] {
            previews.report(Event::Preview { index: 0, done: 1, picture: &picture(grey) });
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
