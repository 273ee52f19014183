//! What a run looks like on standard error: bars on a terminal, a line for each picture
//! elsewhere. Separate because it is the only file that draws.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{
    HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle,
};

use super::graphics::{Graphics, ROWS};
use super::interrupt;
use super::values::Verbosity;
use crate::error::Result;
use crate::image::Picture;
use crate::progress::{Event, Progress};

/// Redraws a second; more only cost time on a slow terminal.
const DRAWS_PER_SECOND: u8 = 10;

const BYTES: &str =
    "{msg:24} {bar:25} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
const BYTES_WITHOUT_TOTAL: &str = "{msg:24} {spinner} {decimal_bytes}, {decimal_bytes_per_sec}";
const STEPS: &str = "{msg:24} {bar:25} {pos}/{len} steps{pace}";
const BUSY: &str = "{msg:24} {spinner} {elapsed}";

const OVERALL: &str = "{msg} {bar:25} {percent}%";
/// Parts of the bar of a whole batch.
const OVERALL_PARTS: u64 = 1000;

/// Shows the events of a run; one for each device of the run.
pub(super) struct Display {
    verbosity: Verbosity,
    bars: MultiProgress,
    /// How previews are drawn, if they are.
    graphics: Option<Graphics>,
    /// Whether a preview stands right above the bars.
    has_preview: AtomicBool,
    state: Mutex<State>,
    /// Warnings so far; the next picture of the same prompt need not repeat them.
    warned: Arc<Mutex<Vec<String>>>,
}

#[derive(Default)]
struct State {
    /// The bars on the screen, by what they show.
    shown: Vec<(String, ProgressBar)>,
    /// What the picture in work is called, such as `seed 42`.
    picture: String,
    /// The bar of a whole batch, if this is one.
    overall: Option<ProgressBar>,
    stage: Option<Stage>,
    times: Times,
}

/// A stage of which only the end tells how long it took.
struct Stage {
    name: String,
    start: Instant,
}

/// Where the time of one picture went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// Denoising alone, and its steps.
    pub denoising: Duration,
    /// Steps of `denoising`.
    pub steps: usize,
}

impl Display {
    /// Draws on standard error if that is a terminal and nobody asked for silence.
    pub fn new(verbosity: Verbosity) -> Self {
        let draws = verbosity > Verbosity::Quiet && std::io::stderr().is_terminal();
        let target = match draws {
            true => ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND),
            false => ProgressDrawTarget::hidden(),
        };
        let bars = MultiProgress::with_draw_target(target);
        Self {
            verbosity,
            bars,
            graphics: None,
            has_preview: AtomicBool::new(false),
            state: Mutex::default(),
            warned: Arc::default(),
        }
    }

    /// The same, with previews drawn above the bars.
    #[must_use]
    pub fn drawing(mut self, graphics: Option<Graphics>) -> Self {
        self.graphics = graphics;
        self
    }

    /// For another device, on the same screen, where there is no place for several previews.
    pub fn beside(&self) -> Self {
        Self {
            verbosity: self.verbosity,
            bars: self.bars.clone(),
            graphics: None,
            has_preview: AtomicBool::new(false),
            state: Mutex::default(),
            warned: self.warned.clone(),
        }
    }

    /// How far a whole batch is, from 0 to 1, and what is beside its bar.
    pub fn overall(&self, done: f64, text: String) {
        let mut state = self.state();
        let bar = state.overall.get_or_insert_with(|| {
            let bar = self.bars.add(ProgressBar::new(OVERALL_PARTS));
            bar.set_style(style(OVERALL));
            bar
        });
        bar.set_position((done * OVERALL_PARTS as f64) as u64);
        bar.set_message(text);
    }

    /// A picture begins; its name is shown beside its steps.
    pub fn begin(&self, picture: String) {
        let mut state = self.state();
        clear(&mut state);
        self.stage(&mut state, None);
        state.picture = picture;
        state.times = Times::default();
    }

    /// Where the time since [`begin`](Self::begin) went.
    pub fn times(&self) -> Times {
        self.state().times
    }

    /// A line that stays, unless `-q`.
    pub fn line(&self, text: impl fmt::Display) {
        self.line_at(Verbosity::Normal, &text);
    }

    /// A line that stays, also with `-q`.
    pub fn error(&self, text: impl fmt::Display) {
        self.line_at(Verbosity::Quiet, &text);
    }

    /// A line that only `-v` shows.
    pub fn detail(&self, text: impl fmt::Display) {
        self.line_at(Verbosity::Verbose, &text);
    }

    fn line_at(&self, verbosity: Verbosity, text: &dyn fmt::Display) {
        if self.verbosity >= verbosity {
            self.erase();
            // Not eprintln: a closed standard error is no reason to panic.
            self.bars.suspend(|| {
                let _ = writeln!(std::io::stderr(), "{text}");
            });
        }
    }

    /// Draws a preview in the place of the last one.
    fn draw(&self, graphics: Graphics, picture: &Picture) {
        let image = match graphics.draw(picture) {
            Ok(image) => image,
            Err(error) => return self.warn(format!("warning: no preview: {error}")),
        };
        let back = match self.has_preview.swap(true, Ordering::Relaxed) {
            true => format!("\x1b[{ROWS}A\x1b[J"),
            false => String::new(),
        };
        // Room first: were the screen to scroll under it, the cursor's place would be another.
        let room = "\n".repeat(ROWS);
        let text = format!("{back}{room}\x1b[{ROWS}A\x1b7{image}\x1b8\x1b[{ROWS}B\r");
        self.bars.suspend(|| {
            let _ = std::io::stderr().write_all(text.as_bytes());
        });
    }

    /// Takes the preview away, if there is one.
    fn erase(&self) {
        let Some(graphics) = self.graphics else { return };
        if self.has_preview.swap(false, Ordering::Relaxed) {
            let text = format!("\x1b[{ROWS}A\r\x1b[J{}", graphics.forget());
            self.bars.suspend(|| {
                let _ = std::io::stderr().write_all(text.as_bytes());
            });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bar that shows `name`, made on first use.
    fn bar(
        &self,
        state: &mut State,
        name: &str,
        total: Option<u64>,
        template: &str,
    ) -> ProgressBar {
        if let Some((_, bar)) = state.shown.iter().find(|(shown, _)| shown == name) {
            return bar.clone();
        }
        // A length given later would be drawn as 0 first.
        let bar = self.bars.add(match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        });
        bar.set_style(style(template));
        bar.set_message(name.to_owned());
        state.shown.push((name.to_owned(), bar.clone()));
        bar
    }

    fn bytes(&self, name: &str, done: u64, total: Option<u64>) {
        let mut state = self.state();
        self.stage(&mut state, Some(name));
        let template = if total.is_some() { BYTES } else { BYTES_WITHOUT_TOTAL };
        let bar = self.bar(&mut state, name, total, template);
        bar.set_position(done);
        if total == Some(done) {
            bar.finish_and_clear();
            state.shown.retain(|(shown, _)| shown != name);
        }
    }

    fn step(&self, done: usize, total: usize) {
        let mut state = self.state();
        if done == 0 {
            clear(&mut state);
            self.stage(&mut state, Some("denoising"));
        }
        if let Some(stage) = &state.stage {
            state.times = Times { denoising: stage.start.elapsed(), steps: done };
        }
        let name = state.picture.clone();
        let bar = self.bar(&mut state, &name, Some(total as u64), STEPS);
        bar.set_position(done as u64);
    }

    /// A line that is said once.
    fn warn(&self, line: String) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if !warned.contains(&line) {
            self.line(&line);
            warned.push(line);
        }
    }

    /// A stage begins that does not say how far it is.
    fn busy(&self, name: &str) {
        let mut state = self.state();
        clear(&mut state);
        self.stage(&mut state, Some(name));
        let bar = self.bar(&mut state, name, None, BUSY);
        bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// Ends the stage before and, with `-v`, says how long it took.
    fn stage(&self, state: &mut State, name: Option<&str>) {
        if state.stage.as_ref().map(|stage| stage.name.as_str()) == name {
            return;
        }
        if let Some(stage) = state.stage.take() {
            self.detail(format!("{}: {}", stage.name, seconds(stage.start.elapsed())));
        }
        state.stage = name.map(|name| Stage { name: name.to_owned(), start: Instant::now() });
    }
}

impl Progress for Display {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Downloading { file, done, total } => self.bytes(file, done, total),
            Event::Queued { worker, position } => {
                self.line(format!("waiting for {worker}: {position}"));
            }
            Event::Sending { done, total } => self.bytes("sending weights", done, Some(total)),
            Event::Loading { component, done, total } => {
                self.bytes(&format!("loading {component}"), done, Some(total));
            }
            Event::Warning(text) => self.warn(format!("warning: {text}")),
            Event::Truncated { which, text } => {
                self.warn(format!("warning: {}", truncation(which, text)));
            }
            Event::Step { done, total } => self.step(done, total),
            // One of those that are made together is enough for a screen.
            Event::Preview { index, picture, .. } => {
                if let (Some(graphics), 0) = (self.graphics, index) {
                    self.draw(graphics, picture);
                }
            }
            Event::Encoding => self.busy("encoding"),
            Event::Decoding => self.busy("decoding"),
            Event::Done => {
                self.erase();
                let mut state = self.state();
                clear(&mut state);
                self.stage(&mut state, None);
            }
        }
    }

    fn check(&self) -> Result<()> {
        interrupt::check()
    }
}

/// An error's line must not end up in the middle of a bar.
impl Drop for Display {
    fn drop(&mut self) {
        self.erase();
        let mut state = self.state();
        clear(&mut state);
        if let Some(bar) = state.overall.take() {
            bar.finish_and_clear();
        }
    }
}

fn clear(state: &mut State) {
    for (_, bar) in state.shown.drain(..) {
        bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ").with_key("pace", write_pace)
}

/// Seconds for a step and the time that the rest will take; nothing before the first step.
fn write_pace(state: &ProgressState, out: &mut dyn fmt::Write) {
    let per_step = Duration::try_from_secs_f64(1.0 / state.per_sec());
    if let (Ok(per_step), 1..) = (per_step, state.pos()) {
        let left = HumanDuration(state.eta());
        let _ = write!(out, ", {}/step, {left:#} left", seconds(per_step));
    }
}

/// What the user is told of a prompt's end that the model does not see.
pub(super) fn truncation(which: &str, text: &str) -> String {
    const SHOWN_CHARS: usize = 300;
    let mut shown: String = text.chars().take(SHOWN_CHARS).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("the {which} is too long, the model does not see its end: {shown:?}")
}

/// `0.034 s`, `1.20 s`, `34.5 s`, `2 min 5 s`: three digits say enough.
pub(super) fn seconds(time: Duration) -> String {
    let all = time.as_secs_f64();
    match all {
        ..0.9995 => format!("{all:.3} s"),
        ..9.995 => format!("{all:.2} s"),
        ..99.95 => format!("{all:.1} s"),
        _ => {
            let whole = all.round() as u64;
            let (minutes, seconds) = (whole / 60, whole % 60);
            format!("{minutes} min {seconds} s")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        for (time_ms, expected) in [
            (0, "0.000 s"),
            (34, "0.034 s"),
            (999, "0.999 s"),
            (1_200, "1.20 s"),
            (9_994, "9.99 s"),
            (34_500, "34.5 s"),
            (100_000, "1 min 40 s"),
            (3_725_000, "62 min 5 s"),
        ] {
            assert_eq!(seconds(Duration::from_millis(time_ms)), expected);
        }
    }

    #[test]
    fn every_template_is_one_that_indicatif_understands() {
        for template in [BYTES, BYTES_WITHOUT_TOTAL, STEPS, BUSY, OVERALL] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn only_the_steps_count_as_denoising() {
        let display = Display::new(Verbosity::Quiet);
        display.report(Event::Loading { component: "unet", done: 1, total: 2 });
        display.begin("seed 1".into());
        assert_eq!(display.times(), Times::default());
        for done in 0..=3 {
            display.report(Event::Step { done, total: 3 });
        }
        let times = display.times();
        assert_eq!(times.steps, 3);
        display.report(Event::Decoding);
        display.report(Event::Done);
        assert_eq!(display.times(), times);
    }

    #[test]
    fn a_warning_shows_the_words_on_one_line_and_not_without_end() {
        let warning = truncation("prompt", "and\na \"hat\"");
        assert!(warning.ends_with(r#"its end: "and\na \"hat\"""#), "{warning}");
        let long = truncation("prompt", &"é".repeat(1000));
        assert!(long.ends_with("é…\"") && long.chars().count() < 400, "{long}");
    }
}
