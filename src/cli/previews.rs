//! `--preview`: approximate pictures in a file beside the output, while the picture is being made.
//! Separate from the display because these are files: they appear whole, and go at the end.

use std::path::{Path, PathBuf};
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
    /// Of each picture.
    places: Mutex<Vec<Place>>,
    /// Hears of each file.
    written: &'a Written<'a>,
}

struct Place {
    /// Where a preview may go: perhaps a name that is not taken, then that name.
    target: Option<Target>,
    /// Where one is.
    file: Option<PathBuf>,
}

/// Hears of a preview's file: which picture's it is, after so many steps.
pub(super) type Written<'a> = dyn Fn(usize, usize, &Path) + Sync + 'a;

/// Where the previews of a picture go that replaces nothing: beside it.
pub(super) fn beside(target: &Target) -> Option<Target> {
    match target {
        Target::Stdout => None,
        Target::Replace(path) | Target::Fresh(path) => {
            Some(Target::Fresh(before_suffix(path, "-preview")))
        }
    }
}

impl<'a> Previews<'a> {
    /// Of pictures that will be `size`, in the files `targets`.
    pub fn new(
        progress: &'a dyn Progress,
        size: ImageSize,
        targets: impl Iterator<Item = Option<Target>>,
        written: &'a Written<'a>,
    ) -> Self {
        let places = targets.map(|target| Place { target, file: None }).collect();
        Self { progress, size, places: Mutex::new(places), written }
    }

    fn write(&self, index: usize, done: usize, picture: &Picture) -> Result<()> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = places.get_mut(index) else { return Ok(()) };
        let Some(target) = &place.target else { return Ok(()) };
        let file = picture.enlarged(self.size)?.to_plain_file(target.format())?;
        if let Some(path) = files::write(target, &file)? {
            files::add_passing_file(&path);
            (self.written)(index, done, &path);
            *place = Place { target: Some(Target::Replace(path.clone())), file: Some(path) };
        }
        Ok(())
    }
}

impl Progress for Previews<'_> {
    fn report(&self, event: Event<'_>) {
        if let Event::Preview { index, done, picture } = event
            && let Err(error) = self.write(index, done, picture)
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
        let places = self.places.get_mut().unwrap_or_else(PoisonError::into_inner);
        places
            .iter()
            .filter_map(|place| place.file.as_deref())
            .for_each(files::remove_passing_file);
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
        let written = Mutex::new(Vec::new());
        let note = |index, done, path: &Path| {
            written.lock().unwrap().push((index, done, path.to_owned()));
        };
        let size = ImageSize { height: 8, width: 16 };
        let previews = Previews::new(&Silent, size, [beside(&target)].into_iter(), &note);
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
        assert_eq!(*written.lock().unwrap(), [(0, 1, free.clone()), (0, 1, free)]);
        assert_eq!(std::fs::read(&taken).unwrap(), b"mine");
    }
}
