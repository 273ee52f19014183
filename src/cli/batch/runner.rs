//! Sharing pictures among devices: each has a thread and a loaded model of its own, and takes the
//! next picture when it is free. Separate because here is all that runs at once.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::manifest::{Manifest, Record};
use super::report::Report;
use super::{BatchJob, Task};
use crate::cli::device::DevicePlan;
use crate::cli::display::Display;
use crate::cli::events::{Made, Teller};
use crate::cli::files;
use crate::cli::output::Target;
use crate::cli::paint::{AUTO_PIXELS, Finished, Order, paint};
use crate::cli::previews::beside;
use crate::cli::run::Painter;
use crate::error::{Error, Kind, Result};
use crate::image::ImageSize;
use crate::progress::{Event, Progress};

/// A picture that so many devices did not survive is to blame.
const MAX_LOST_DEVICES: usize = 3;

/// A picture that waits, or is in work.
pub(super) struct Work<'a> {
    pub task: &'a Task,
    /// The hash of all that determines it.
    pub key: String,
    /// Devices that were lost while they made it.
    lost: usize,
    /// Whether it is to be made by itself, since something went wrong with others.
    is_alone: bool,
}

impl<'a> Work<'a> {
    /// A picture that nobody has tried yet.
    pub fn new(task: &'a Task, key: String) -> Self {
        Self { task, key, lost: 0, is_alone: false }
    }
}

/// Loads the model onto a device.
pub(super) type OpenOn<'a> =
    dyn Fn(&DevicePlan, &dyn Progress) -> Result<Box<dyn Painter>> + Sync + 'a;

/// Makes the pictures of a batch.
pub(super) struct Runner<'a> {
    pub batch: &'a BatchJob,
    pub open: &'a OpenOn<'a>,
    pub report: &'a Report<'a>,
    pub manifest: Mutex<Manifest>,
    pub queue: Queue<'a>,
}

/// Why a picture was not made.
enum Failure {
    /// Others may be.
    OfPictures(Error),
    /// Nothing can go on.
    OfBatch(Error),
}

impl<'a> Runner<'a> {
    /// Makes all pictures that wait, on all devices at once.
    ///
    /// # Errors
    /// If the batch cannot go on, no device could be used at all, or the user interrupts.
    pub fn run(&self, devices: &[DevicePlan]) -> Result<()> {
        if self.queue.is_empty() {
            return Ok(());
        }
        std::thread::scope(|scope| {
            for device in devices {
                let builder = std::thread::Builder::new().name(format!("batch {device}"));
                let thread = builder.spawn_scoped(scope, || self.serve(device, devices.len()));
                if let Err(error) = thread {
                    let error = Error::other(format!("cannot start a thread: {error}"));
                    self.lost(&device.to_string(), error);
                }
            }
        });
        let (rest, end) = self.queue.end();
        match end {
            End { fatal: Some(error), .. } => Err(error),
            // Nothing was made because nothing could be.
            End { lost: Some(error), was_used: false, .. } => Err(error),
            End { lost: Some(error), .. } if !rest.is_empty() => {
                let message = format!(
                    "no device is left, and {} of the pictures are not made; run it again to go \
                     on; the last one: {error}",
                    rest.len()
                );
                Err(Error::new(error.kind(), message))
            }
            End { .. } => Ok(()),
        }
    }

    /// Makes pictures on one device until none waits, or the device is lost.
    fn serve(&self, device: &DevicePlan, devices: usize) {
        let name = device.to_string();
        let display = self.report.display.beside();
        let watch = Watch { runner: self, display: &display, group: &[] };
        let teller =
            Teller { stream: self.report.stream, device: &name, pictures: &[], progress: &watch };
        let mut painter = match (self.open)(device, &teller) {
            Ok(painter) => painter,
            Err(_) if self.queue.is_over() => return,
            Err(error) => match error.kind() {
                Kind::Usage | Kind::Model | Kind::Interrupted => return self.queue.stop(error),
                Kind::Remote | Kind::Other => return self.lost(&name, error),
            },
        };
        let size = painter.default_size();
        let most = |work: &Work<'_>, waiting: usize| {
            let share = waiting.div_ceil(devices);
            most_together(work, size).min(share).max(1)
        };
        let goes_with = |first: &Work<'_>, next: &Work<'_>| {
            !next.is_alone && next.task.job.goes_with(&first.task.job, size)
        };
        while let Some(group) = self.queue.take(&most, &goes_with) {
            let group = self.with_places(group);
            if group.is_empty() {
                continue;
            }
            match self.make(&group, &mut *painter, &name, &display) {
                Ok(()) => {}
                Err(Failure::OfBatch(error)) => self.queue.stop(error),
                Err(Failure::OfPictures(error)) if !painter.is_there() => {
                    self.give_back(group, &error);
                    self.lost(&name, error);
                    break;
                }
                Err(Failure::OfPictures(error)) => self.blame(group, &error),
            }
        }
        for line in painter.statistics().iter().filter(|_| self.has_statistics()) {
            display.line(format!("{name}: {line}"));
        }
    }

    fn has_statistics(&self) -> bool {
        self.batch.tasks.first().is_some_and(|task| task.job.stats)
    }

    /// Where a picture goes.
    fn place(&self, work: &Work<'_>) -> PathBuf {
        self.batch.folder.join(&work.task.output)
    }

    /// The pictures that can be written, before minutes are spent on them.
    fn with_places(&self, group: Vec<Work<'a>>) -> Vec<Work<'a>> {
        let can_be_written = |work: &Work<'_>| {
            let checked = files::check_batch_place(&self.batch.folder, &self.place(work));
            checked.map_err(|error| self.failed(work, &error)).is_ok()
        };
        group.into_iter().filter(can_be_written).collect()
    }

    /// Makes pictures that go together; the one place that asks a painter for any.
    fn make(
        &self,
        group: &[Work<'a>],
        painter: &mut dyn Painter,
        device: &str,
        display: &Display,
    ) -> std::result::Result<(), Failure> {
        let start = Instant::now();
        let paths: Vec<_> = group.iter().map(|work| self.report.path(work.task)).collect();
        let names = group.iter().zip(&paths).map(|(work, path)| self.report.name(work.task, path));
        let names: Vec<_> = names.collect();
        let watch = Watch { runner: self, display, group };
        let stream = self.report.stream;
        let teller = Teller { stream, device, pictures: &names, progress: &watch };
        display.begin(title(group));
        // Whatever is there already stays.
        let order = |work: &Work<'a>| {
            let (target, Task { job, seed, .. }) = (Target::Replace(self.place(work)), work.task);
            Order { job, seed: *seed, format: target.format(), preview: beside(&target) }
        };
        let orders: Vec<_> = group.iter().map(order).collect();
        let painted = paint(&orders, painter, &teller);
        // Whatever failed, this is why.
        teller.check().map_err(Failure::OfBatch)?;
        let painted = painted.map_err(Failure::OfPictures)?;
        for (((work, path), picture), Finished { size, file, .. }) in
            group.iter().zip(&paths).zip(&names).zip(painted)
        {
            if let Err(error) = files::write_in_batch(&self.place(work), &file) {
                self.failed(work, &error);
                continue;
            }
            let Work { task, key, .. } = work;
            let record = Record::new(key.clone(), task.output.clone(), &file);
            lock(&self.manifest).add(record).map_err(Failure::OfBatch)?;
            let (steps, settings) = (task.job.steps.get(), key.as_str());
            let made = Made { picture: *picture, output: path, size, steps, settings };
            self.report.made(task, &made, &teller, start);
            self.queue.settled();
        }
        stream.check().map_err(Failure::OfBatch)
    }

    /// Something is wrong with one of these pictures; which one, each alone will show.
    fn blame(&self, group: Vec<Work<'a>>, error: &Error) {
        match &*group {
            [work] => self.failed(work, error),
            _ => {
                let alone = |work| Work { is_alone: true, ..work };
                self.queue.give_back(group.into_iter().map(alone).collect());
            }
        }
    }

    fn failed(&self, work: &Work<'_>, error: &Error) {
        self.report.failed(work.task, error);
        if self.batch.fail_fast {
            self.queue.begin_no_more();
        }
        self.queue.settled();
    }

    /// A device is lost, its pictures are not.
    fn give_back(&self, group: Vec<Work<'a>>, error: &Error) {
        let mut back = Vec::new();
        for mut work in group {
            work.lost += 1;
            self.report.give_back(work.task);
            if work.lost < MAX_LOST_DEVICES {
                back.push(work);
            } else {
                let lost = format!("{} devices were lost while they made it", work.lost);
                self.failed(&work, &error.clone().context(lost));
            }
        }
        self.queue.give_back(back);
    }

    fn lost(&self, device: &str, error: Error) {
        self.report.lost(device, &error);
        self.queue.lost(error);
    }
}

/// How many pictures may be made together with this one.
fn most_together(work: &Work<'_>, size: ImageSize) -> usize {
    let job = &work.task.job;
    match work.is_alone {
        true => 1,
        false => job.batch_size.or(AUTO_PIXELS, job.picture_size(size)),
    }
}

/// What the display calls pictures that are made together.
fn title(group: &[Work<'_>]) -> String {
    match group {
        [] => String::new(),
        [work] => work.task.output.clone(),
        [first, .., last] => format!("{} to {}", first.task.output, last.task.output),
    }
}

/// Shows what a device does, and ends its waiting when there is nothing left to do.
struct Watch<'a, 'b> {
    runner: &'a Runner<'b>,
    display: &'a Display,
    /// What is in work.
    group: &'a [Work<'b>],
}

impl Progress for Watch<'_, '_> {
    fn report(&self, event: Event<'_>) {
        self.display.report(event);
        if let Event::Step { done, total } = event {
            let tasks = self.group.iter().map(|work| work.task);
            tasks.for_each(|task| self.runner.report.advance(task, done, total));
        }
    }

    fn check(&self) -> Result<()> {
        self.display.check()?;
        match self.group.is_empty() && self.runner.queue.is_over() {
            true => Err(Error::interrupted()),
            false => Ok(()),
        }
    }
}

/// The pictures that wait, and what became of the devices.
pub(super) struct Queue<'a> {
    state: Mutex<State<'a>>,
    changed: Condvar,
}

struct State<'a> {
    waiting: VecDeque<Work<'a>>,
    in_work: usize,
    /// Whether no picture is to be begun any more.
    is_stopped: bool,
    end: End,
}

/// How it ended.
#[derive(Default)]
struct End {
    /// Why nothing could go on.
    fatal: Option<Error>,
    /// Why the last device that was lost was.
    lost: Option<Error>,
    /// Whether any device took a picture.
    was_used: bool,
}

impl<'a> Queue<'a> {
    /// Of pictures that wait.
    pub fn new(waiting: Vec<Work<'a>>) -> Self {
        let waiting = waiting.into();
        let state = State { waiting, in_work: 0, is_stopped: false, end: End::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn is_empty(&self) -> bool {
        lock(&self.state).waiting.is_empty()
    }

    /// Whether there is nothing to do for a device that is free.
    fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.is_stopped || state.waiting.is_empty() && state.in_work == 0
    }

    /// The next picture, and those behind it that go with it, `most` together at most, which may
    /// depend on how many wait. Waits while one that is in work elsewhere may come back.
    fn take(
        &self,
        most: &dyn Fn(&Work<'a>, usize) -> usize,
        goes_with: &dyn Fn(&Work<'a>, &Work<'a>) -> bool,
    ) -> Option<Vec<Work<'a>>> {
        let waits = |state: &mut State<'_>| {
            !state.is_stopped && state.waiting.is_empty() && state.in_work > 0
        };
        let state = self.changed.wait_while(lock(&self.state), waits);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.is_stopped {
            return None;
        }
        let waiting = state.waiting.len();
        let first = state.waiting.pop_front()?;
        let most = most(&first, waiting);
        let mut group = vec![first];
        while let (Some(first), Some(next)) = (group.first(), state.waiting.front())
            && group.len() < most
            && goes_with(first, next)
        {
            group.extend(state.waiting.pop_front());
        }
        state.in_work += group.len();
        state.end.was_used = true;
        Some(group)
    }

    /// A picture that was taken is made, or never will be.
    fn settled(&self) {
        lock(&self.state).in_work -= 1;
        self.changed.notify_all();
    }

    /// Pictures that were taken are the next ones again.
    fn give_back(&self, group: Vec<Work<'a>>) {
        let mut state = lock(&self.state);
        state.in_work -= group.len();
        group.into_iter().rev().for_each(|work| state.waiting.push_front(work));
        drop(state);
        self.changed.notify_all();
    }

    fn lost(&self, error: Error) {
        lock(&self.state).end.lost = Some(error);
    }

    fn begin_no_more(&self) {
        lock(&self.state).is_stopped = true;
        self.changed.notify_all();
    }

    /// Nothing can go on.
    fn stop(&self, error: Error) {
        lock(&self.state).end.fatal.get_or_insert(error);
        self.begin_no_more();
    }

    /// What was not begun although nobody stopped, and how it ended.
    fn end(&self) -> (Vec<Work<'a>>, End) {
        let mut state = lock(&self.state);
        let is_stopped = state.is_stopped;
        let rest = state.waiting.drain(..).filter(|_| !is_stopped).collect();
        (rest, std::mem::take(&mut state.end))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
