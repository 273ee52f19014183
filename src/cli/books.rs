//! What this machine's processor and memory had to do, for `--stats`. Separate from the books of
//! workers, which are kept over there: here a stage ends when the next one begins.

use std::time::{Duration, Instant};

/// Time of each stage.
#[derive(Debug, Default)]
pub(super) struct Books {
    stages: Vec<Stage>,
    current: Option<(&'static str, Instant)>,
}

/// All stages of one name.
#[derive(Debug, PartialEq)]
struct Stage {
    name: &'static str,
    elapsed: Duration,
    steps: usize,
}

impl Books {
    /// What follows belongs to the stage `name`, or to none.
    pub fn begin(&mut self, name: Option<&'static str>, now: Instant) {
        if let Some((before, began)) = self.current.take() {
            self.stage(before).elapsed += now.saturating_duration_since(began);
        }
        self.current = name.map(|name| (name, now));
    }

    /// The stage has so many steps.
    pub fn add_steps(&mut self, steps: usize) {
        if let Some((name, _)) = self.current {
            let stage = self.stage(name);
            stage.steps = stage.steps.saturating_add(steps);
        }
    }

    fn stage(&mut self, name: &'static str) -> &mut Stage {
        let place = self.stages.iter().position(|stage| stage.name == name);
        let place = place.unwrap_or_else(|| {
            self.stages.push(Stage { name, elapsed: Duration::ZERO, steps: 0 });
            self.stages.len() - 1
        });
        &mut self.stages[place]
    }

    /// What the devices of this machine say, and a table of the stages that are not `elsewhere`;
    /// none if nothing was done here.
    pub fn lines(&self, devices: Vec<String>, elsewhere: &[&str]) -> Vec<String> {
        let here: Vec<_> =
            self.stages.iter().filter(|stage| !elsewhere.contains(&stage.name)).collect();
        if here.is_empty() || devices.is_empty() {
            return Vec::new();
        }
        let mut lines = devices;
        lines.push(format!("{:5} {:>9} {:>6} {:>9}", "stage", "seconds", "steps", "s/step"));
        lines.extend(here.into_iter().map(|stage| {
            let seconds = stage.elapsed.as_secs_f64();
            let whole = format!("{:5} {seconds:>9.3}", stage.name);
            match stage.steps {
                0 => whole,
                steps => format!("{whole} {steps:>6} {:>9.3}", seconds / steps as f64),
            }
        }));
        lines
    }
}

/// What this process had in memory at most, as a line; nothing where the system does not say.
pub(super) fn peak_memory() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = peak_kibibytes(&status)?;
    Some(format!("this process: {} MB of memory at most, mapped files included", kibibytes >> 10))
}

fn peak_kibibytes(status: &str) -> Option<u64> {
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_one_name_are_added_up_and_what_is_between_is_left_out() {
        let (mut books, start) = (Books::default(), Instant::now());
        let mut begin = |name, at_ms: u64, steps| {
            books.begin(name, start + Duration::from_millis(at_ms));
            books.add_steps(steps);
        };
        begin(Some("text"), 0, 0);
        begin(Some("unet"), 20, 4);
        begin(None, 520, 9);
        begin(Some("text"), 1000, 0);
        begin(Some("unet"), 1010, 6);
        begin(None, 1510, 0);
        let lines = |elsewhere: &[&str]| books.lines(vec!["a device".into()], elsewhere);
        assert_eq!(
            lines(&[]),
            [
                "a device",
                "stage   seconds  steps    s/step",
                "text      0.030",
                "unet      1.000     10     0.100",
            ]
        );
        assert_eq!(lines(&["text"]).len(), 3);
        assert!(lines(&["text", "unet"]).is_empty());
    }

    #[test]
    fn peak_memory_is_read_where_the_system_says_it() {
        assert_eq!(peak_kibibytes("Name:\tx\nVmHWM:\t  123456 kB\nVmRSS:\t1 kB\n"), Some(123_456));
        for odd in ["", "VmHWM: x kB", "VmHWM: 1 GB", "VmRSS: 1 kB"] {
            assert_eq!(peak_kibibytes(odd), None);
        }
        assert_eq!(peak_memory().is_some(), cfg!(target_os = "linux"));
    }
}
