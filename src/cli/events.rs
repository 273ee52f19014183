//! What a run tells programs: one JSON object a line on standard output, the same for every device.
//! Separate because scripts depend on it: README.md documents the fields, and a change of one that
//! is there already is another version.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::display::truncation;
use super::one_line;
use crate::error::{Error, Result};
use crate::image::ImageSize;
use crate::progress::{self, Progress};

/// Version of the events. Fields and events may be added without another version.
pub const SCHEMA_VERSION: u32 = 1;

/// Bytes are told at most so often, the first and the last always.
const LOAD_INTERVAL: Duration = Duration::from_millis(100);

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// A batch begins.
    Batch {
        /// All of its pictures.
        pictures: usize,
        /// Those that are there already.
        skipped: usize,
        /// The devices that share the others.
        devices: &'a [String],
    },
    /// A worker serves others first.
    Queued {
        /// The worker.
        device: &'a str,
        /// How many come first, for people.
        position: &'a str,
    },
    /// Bytes of the model come or go.
    Load {
        /// The device that they are for.
        device: &'a str,
        /// `downloading` from the hub, `sending` to a worker, or `loading` onto the device.
        what: &'static str,
        /// The file or the component.
        name: &'a str,
        /// So far.
        bytes: u64,
        /// Of all, where that is known.
        total_bytes: Option<u64>,
    },
    /// Something to know and not to act on.
    Warning {
        /// The device that it is about.
        device: &'a str,
        /// For people.
        message: &'a str,
    },
    /// A step of a picture is done; the first tells of none.
    Step {
        /// Which picture.
        #[serde(flatten)]
        picture: PictureName<'a>,
        /// Where it is made.
        device: &'a str,
        /// Done.
        step: usize,
        /// Of all.
        steps: usize,
    },
    /// An approximate picture is in a file.
    Preview {
        /// Which picture.
        #[serde(flatten)]
        picture: PictureName<'a>,
        /// Where it is made.
        device: &'a str,
        /// After so many steps.
        step: usize,
        /// The file.
        file: &'a str,
    },
    /// A picture is in its file.
    Done {
        /// Which picture.
        #[serde(flatten)]
        picture: PictureName<'a>,
        /// Whether it was there already, made by an earlier run.
        skipped: bool,
        /// Where it was made; none if it was there already.
        device: Option<&'a str>,
        /// Columns of pixels.
        width: usize,
        /// Rows of pixels.
        height: usize,
        /// Of the scheduler.
        steps: usize,
        /// How long it took.
        seconds: f64,
        /// The hash of all that determines the picture.
        settings: &'a str,
    },
    /// A picture cannot be made, or, without a picture, the run cannot go on.
    Error {
        /// Which picture.
        #[serde(flatten)]
        picture: Option<PictureName<'a>>,
        /// What the single command's exit code would be.
        code: u8,
        /// For people.
        message: &'a str,
    },
    /// A device cannot be used, or any more; the others go on.
    DeviceLost {
        /// The device.
        device: &'a str,
        /// For people.
        message: &'a str,
    },
    /// A batch has ended.
    End {
        /// Pictures that this run made.
        made: usize,
        /// Pictures that were there already.
        skipped: usize,
        /// Pictures that could not be made.
        failed: usize,
        /// How long the run took.
        seconds: f64,
    },
}

/// Which picture an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PictureName<'a> {
    /// The line of a batch's jobs, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// Which of a job's pictures, from 1.
    pub index: usize,
    /// The seed of its noise.
    pub seed: u64,
    /// The file, once its name is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<&'a str>,
}

#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// Which events are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// None.
    Nothing,
    /// What became of each picture.
    Results,
    /// All.
    Everything,
}

/// Prints events.
pub(super) struct Stream {
    told: Told,
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    /// Why nothing more can be printed.
    failure: Option<Error>,
    /// When bytes were told last, and of what.
    load: Option<(Instant, String)>,
}

impl Stream {
    /// On standard output.
    pub fn stdout(told: Told) -> Self {
        Self::new(told, Box::new(std::io::stdout()))
    }

    fn new(told: Told, out: Box<dyn Write + Send>) -> Self {
        Self { told, state: Mutex::new(State { out, failure: None, load: None }) }
    }

    /// Prints an event, whole, if it is one of those that are told.
    pub fn tell(&self, event: &Event<'_>) {
        let is_result = match event {
            Event::Done { .. } | Event::Error { picture: Some(_), .. } => true,
            Event::Batch { .. }
            | Event::Queued { .. }
            | Event::Load { .. }
            | Event::Warning { .. }
            | Event::Step { .. }
            | Event::Preview { .. }
            | Event::Error { picture: None, .. }
            | Event::DeviceLost { .. }
            | Event::End { .. } => false,
        };
        let is_told = match self.told {
            Told::Nothing => false,
            Told::Results => is_result,
            Told::Everything => true,
        };
        let mut state = self.state();
        if !is_told || state.failure.is_some() || !state.is_due(event) {
            return;
        }
        // Of texts and numbers; a number that JSON lacks becomes null.
        let line = serde_json::to_string(&Line { v: SCHEMA_VERSION, event }).unwrap_or_default();
        let printed = state.out.write_all(format!("{line}\n").as_bytes());
        if let Err(error) = printed.and_then(|()| state.out.flush()) {
            state.failure = Some(match error.kind() {
                std::io::ErrorKind::BrokenPipe => {
                    Error::other("standard output was closed before all events were written")
                }
                _ => Error::other(format!("standard output: {error}")),
            });
        }
    }

    /// Prints why a picture cannot be made, or why the run ends.
    pub fn tell_error(&self, picture: Option<PictureName<'_>>, error: &Error) {
        let code = error.kind().exit_code();
        self.tell(&Event::Error { picture, code, message: &one_line(error) });
    }

    /// # Errors
    /// If an event could not be printed.
    pub fn check(&self) -> Result<()> {
        self.state().failure.clone().map_or(Ok(()), Err)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether enough time has passed since bytes were told last.
    fn is_due(&mut self, event: &Event<'_>) -> bool {
        let &Event::Load { device, what, name, bytes, total_bytes } = event else { return true };
        let of = format!("{device} {what} {name}");
        let waits = |(last, known): &(Instant, String)| {
            *known == of && last.elapsed() < LOAD_INTERVAL && total_bytes != Some(bytes)
        };
        if self.load.as_ref().is_some_and(waits) {
            return false;
        }
        self.load = Some((Instant::now(), of));
        true
    }
}

/// Seconds with as many digits as a clock has.
pub(super) fn seconds(time: Duration) -> f64 {
    time.as_millis() as f64 / 1000.0
}

/// Passes the progress of a device on, and tells it.
pub(super) struct Teller<'a> {
    pub stream: &'a Stream,
    pub device: &'a str,
    /// The pictures in work, which are made together.
    pub pictures: &'a [PictureName<'a>],
    pub progress: &'a dyn Progress,
}

/// A picture that is in its file.
pub(super) struct Made<'a> {
    pub picture: PictureName<'a>,
    /// The file.
    pub output: &'a str,
    pub size: ImageSize,
    pub steps: usize,
    /// The hash of all that determines the picture.
    pub settings: &'a str,
}

impl Teller<'_> {
    /// A preview of one of the pictures is in a file.
    pub fn preview(&self, index: usize, step: usize, file: &str) {
        if let Some(&picture) = self.pictures.get(index) {
            self.stream.tell(&Event::Preview { picture, device: self.device, step, file });
        }
    }

    /// A picture that was begun at `start` is in its file.
    pub fn done(&self, made: &Made<'_>, start: Instant) {
        let &Made { picture, output, size, steps, settings } = made;
        self.stream.tell(&Event::Done {
            picture: PictureName { output: Some(output), ..picture },
            skipped: false,
            device: Some(self.device),
            width: size.width,
            height: size.height,
            steps,
            seconds: seconds(start.elapsed()),
            settings,
        });
    }
}

impl Progress for Teller<'_> {
    fn report(&self, event: progress::Event<'_>) {
        use progress::Event as From;
        let device = self.device;
        let load = |what, name, bytes, total_bytes| {
            self.stream.tell(&Event::Load { device, what, name, bytes, total_bytes });
        };
        match event {
            From::Downloading { file, done, total } => load("downloading", file, done, total),
            From::Sending { done, total } => load("sending", "weights", done, Some(total)),
            From::Loading { component, done, total } => {
                load("loading", component, done, Some(total));
            }
            From::Queued { worker, position } => {
                self.stream.tell(&Event::Queued { device: worker, position });
            }
            From::Warning(message) => self.stream.tell(&Event::Warning { device, message }),
            From::Truncated { which, text } => {
                self.stream.tell(&Event::Warning { device, message: &truncation(which, text) });
            }
            From::Step { done, total } => {
                for &picture in self.pictures {
                    let (step, steps) = (done, total);
                    self.stream.tell(&Event::Step { picture, device, step, steps });
                }
            }
            // Told by whoever knows its file.
            From::Preview { .. } => {}
            From::Encoding | From::Decoding | From::Done => {}
        }
        self.progress.report(event);
    }

    fn check(&self) -> Result<()> {
        self.stream.check()?;
        self.progress.check()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::progress::Silent;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const PICTURE: PictureName<'_> =
        PictureName { line: Some(3), index: 1, seed: u64::MAX, output: Some("x.png") };

    #[test]
    fn each_event_is_one_line_of_json_with_its_version_and_its_name() {
        let out = Shared::default();
        let stream = Stream::new(Told::Everything, Box::new(out.clone()));
        let teller =
            Teller { stream: &stream, device: "cpu", pictures: &[PICTURE], progress: &Silent };
        teller.report(progress::Event::Step { done: 1, total: 3 });
        stream.tell_error(None, &Error::model("a\nb quic://0123456789abcdef@h"));
        let single = PictureName { line: None, output: None, ..PICTURE };
        stream.tell_error(Some(single), &Error::remote("gone"));
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let expected = "\
{\"v\":1,\"event\":\"step\",\"line\":3,\"index\":1,\"seed\":18446744073709551615,\
\"output\":\"x.png\",\"device\":\"cpu\",\"step\":1,\"steps\":3}
{\"v\":1,\"event\":\"error\",\"code\":3,\"message\":\"a b quic://***@h\"}
{\"v\":1,\"event\":\"error\",\"index\":1,\"seed\":18446744073709551615,\"code\":4,\
\"message\":\"gone\"}
";
        assert_eq!(text, expected);
    }

    #[test]
    fn without_json_only_results_are_told_and_bytes_are_told_now_and_then() {
        let check = |told: Told, expected: usize| {
            let out = Shared::default();
            let stream = Stream::new(told, Box::new(out.clone()));
            let teller =
                Teller { stream: &stream, device: "cpu", pictures: &[PICTURE], progress: &Silent };
            for done in 0..=1000 {
                teller.report(progress::Event::Loading { component: "unet", done, total: 1000 });
            }
            let size = ImageSize { height: 8, width: 8 };
            let (output, settings) = ("x.png", "ab");
            let made = Made { picture: PICTURE, output, size, steps: 3, settings };
            teller.done(&made, Instant::now());
            stream.tell_error(None, &Error::other("x"));
            let lines = out.0.lock().unwrap().iter().filter(|byte| **byte == b'\n').count();
            // A slow machine tells of more bytes.
            assert!((expected..expected * 100 + 1).contains(&lines), "{told:?}: {lines}");
        };
        check(Told::Nothing, 0);
        check(Told::Results, 1);
        check(Told::Everything, 4);
    }

    #[test]
    fn a_reader_that_goes_away_stops_the_run() {
        let stream = Stream::new(Told::Everything, Box::new(Closed));
        let teller = Teller { stream: &stream, device: "cpu", pictures: &[], progress: &Silent };
        teller.check().unwrap();
        teller.report(progress::Event::Warning("x"));
        assert!(teller.check().unwrap_err().to_string().contains("was closed"));
    }
}
