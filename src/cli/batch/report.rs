//! What is told of a batch: results and events on standard output, and on standard error how far it
//! is and how long the rest will take. Separate from making pictures so that nothing is counted in
//! two places.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{BatchJob, Task};
use crate::cli::display::{self, Display};
use crate::cli::events::{self, Event, Made, PictureName, Stream, Teller};
use crate::cli::one_line;
use crate::error::Error;
use crate::image::ImageSize;

/// Tells of one batch.
pub(super) struct Report<'a> {
    batch: &'a BatchJob,
    pub display: &'a Display,
    pub stream: &'a Stream,
    /// The size that the model was trained for.
    size: ImageSize,
    begun: Instant,
    /// Steps times pixels of all that this run is to make.
    total_work: f64,
    /// Tasks that are done, and their keys.
    skipped: Vec<(&'a Task, String)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    made: usize,
    failed: usize,
    /// When the first picture of this run was begun.
    painting: Option<Instant>,
    /// Steps times pixels of pictures that are settled.
    settled_work: f64,
    /// Of each picture in work, by the name of its file.
    parts: HashMap<String, f64>,
}

impl<'a> Report<'a> {
    /// Of a batch whose model was trained for `size`.
    pub fn new(
        batch: &'a BatchJob,
        display: &'a Display,
        stream: &'a Stream,
        size: ImageSize,
    ) -> Self {
        let (begun, state) = (Instant::now(), Mutex::default());
        let total_work = batch.tasks.iter().map(|task| work(task, size)).sum();
        Self { batch, display, stream, size, begun, total_work, skipped: Vec::new(), state }
    }

    /// A picture is there already.
    pub fn skip(&mut self, task: &'a Task, key: &str) {
        self.total_work -= work(task, self.size);
        self.skipped.push((task, key.to_owned()));
    }

    /// Pictures that are there already.
    pub fn skipped(&self) -> usize {
        self.skipped.len()
    }

    /// Tells of the pictures that are there already.
    pub fn tell_skipped(&self) {
        for (task, key) in &self.skipped {
            let size = task.job.picture_size(self.size);
            self.stream.tell(&Event::Done {
                picture: self.name(task, &self.path(task)),
                skipped: true,
                device: None,
                width: size.width,
                height: size.height,
                steps: task.job.steps.get(),
                seconds: 0.0,
                settings: key,
            });
        }
    }

    /// Where a picture is, for people and programs that are where this one is.
    pub fn path(&self, task: &Task) -> String {
        self.batch.folder.join(&task.output).to_string_lossy().into_owned()
    }

    /// What a picture is called in events.
    pub fn name<'b>(&self, task: &Task, path: &'b str) -> PictureName<'b> {
        let &Task { line, index, seed, .. } = task;
        PictureName { line: Some(line), index, seed, output: Some(path) }
    }

    /// A picture in work has so many steps behind it.
    pub fn advance(&self, task: &Task, done: usize, total: usize) {
        let mut state = self.state();
        state.painting.get_or_insert_with(Instant::now);
        let part = work(task, self.size) * done as f64 / total.max(1) as f64;
        state.parts.insert(task.output.clone(), part);
        let done = self.done(&state);
        self.display.overall(done, self.so_far(&state));
    }

    /// A picture is in work no more, and not made.
    pub fn give_back(&self, task: &Task) {
        self.state().parts.remove(&task.output);
    }

    /// A picture that was begun at `start` is there.
    pub fn made(&self, task: &Task, made: &Made<'_>, teller: &Teller<'_>, start: Instant) {
        let mut state = self.state();
        state.made += 1;
        self.settle(&mut state, task);
        let &Made { output, size, steps, .. } = made;
        let so_far = self.so_far(&state);
        self.display.line(format!(
            "{}: seed {}, {size}, {steps} step{} in {}; {so_far}",
            output.replace(char::is_control, " "),
            task.seed,
            if steps == 1 { "" } else { "s" },
            display::seconds(start.elapsed()),
        ));
        drop(state);
        teller.done(made, start);
    }

    /// A picture cannot be made.
    pub fn failed(&self, task: &Task, error: &Error) {
        let path = self.path(task);
        let mut state = self.state();
        state.failed += 1;
        self.settle(&mut state, task);
        let shown = path.replace(char::is_control, " ");
        self.display.error(format!("error: line {}, {shown}: {}", task.line, one_line(error)));
        drop(state);
        self.stream.tell_error(Some(self.name(task, &path)), error);
    }

    /// A device is gone.
    pub fn lost(&self, device: &str, error: &Error) {
        let message = one_line(error);
        self.display.error(format!("warning: no more pictures on {device}: {message}"));
        self.stream.tell(&Event::DeviceLost { device, message: &message });
    }

    /// Pictures that are there, and those that could not be made.
    pub fn end(&self) -> (usize, usize) {
        let (state, skipped) = (self.state(), self.skipped());
        let (made, failed) = (state.made, state.failed);
        let time = self.begun.elapsed();
        let seconds = events::seconds(time);
        self.stream.tell(&Event::End { made, skipped, failed, seconds });
        let text = format!("{made} made, {skipped} there before, {failed} failed");
        self.display.line(format!("{text}, in {}", display::seconds(time)));
        (made + skipped, failed)
    }

    fn settle(&self, state: &mut State, task: &Task) {
        state.parts.remove(&task.output);
        state.settled_work += work(task, self.size);
        self.display.overall(self.done(state), self.so_far(state));
    }

    /// How much of this run's work is done, from 0 to 1.
    fn done(&self, state: &State) -> f64 {
        let done = state.settled_work + state.parts.values().sum::<f64>();
        (done / self.total_work.max(1.0)).min(1.0)
    }

    /// `3/20 pictures, 2 min 5 s left`.
    fn so_far(&self, state: &State) -> String {
        let settled = self.skipped() + state.made + state.failed;
        let mut text = format!("{settled}/{} pictures", self.batch.tasks.len());
        let done = self.done(state);
        let elapsed = state.painting.map(|since| since.elapsed().as_secs_f64());
        let left =
            elapsed.map(|elapsed| Duration::try_from_secs_f64(elapsed / done * (1.0 - done)));
        if let Some(Ok(left)) = left
            && settled < self.batch.tasks.len()
        {
            text.push_str(&format!(", {} left", display::seconds(left)));
        }
        text
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Steps times pixels.
fn work(task: &Task, size: ImageSize) -> f64 {
    let size = task.job.picture_size(size);
    (task.job.steps.get() * size.width * size.height) as f64
}
