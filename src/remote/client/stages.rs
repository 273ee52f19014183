//! What each stage of a run took: for `--stats`. Separate because a stage begins and ends where the
//! worker gets to, not where the client, which runs ahead, is: marks in the order of ops tell.

use std::time::{Duration, Instant};

use super::{Request, Session, Statistics};
use crate::error::Result;
use crate::remote::message::{Message, Progress};

/// All that a session did in the stages of one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// Its name, for people.
    pub name: &'static str,
    /// What went over the wire, and the worker's own books.
    pub statistics: Statistics,
    /// From the worker's end of the stage before to its end of this one, as heard here.
    pub elapsed: Duration,
}

impl Stage {
    /// Time that the worker ran this session's ops.
    pub fn device(&self) -> Duration {
        Duration::from_micros(self.statistics.worker.busy_us)
    }

    /// Time that other sessions' ops came first.
    pub fn queue(&self) -> Duration {
        Duration::from_micros(self.statistics.worker.queued_us)
    }

    /// All other time: the network, weights on their way, and this side.
    pub fn wire(&self) -> Duration {
        self.elapsed.saturating_sub(self.device() + self.queue())
    }
}

impl Session {
    /// What is called from now on belongs to the stage `name`, or to none. Without a round trip.
    pub fn begin_stage(&self, name: Option<&'static str>) {
        let mut state = self.lock();
        if state.failure.is_some() || state.stages.sent == name {
            return;
        }
        state.stages.sent = name;
        let mut statistics = state.statistics;
        statistics.bytes_up += state.outbox.bytes() as u64;
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.requests.push_back(Request { ticket, bytes: 0, stage: Some((name, statistics)) });
        // A mark makes no buffer: there is always a number for it.
        let _ = self.send(&mut state, &Message::Mark);
    }

    /// Ends the stage and says what each took, in the order in which they came first.
    ///
    /// # Errors
    /// If the session is over.
    pub fn stages(&self) -> Result<Vec<Stage>> {
        self.begin_stage(None);
        self.done(self.mark()?)?;
        Ok(self.lock().stages.ended.clone())
    }
}

/// The stages of a session.
#[derive(Default)]
pub(super) struct Stages {
    /// The stage whose mark was sent last.
    sent: Option<&'static str>,
    /// The stage whose mark the worker reached last.
    current: Option<Began>,
    /// One for each name.
    ended: Vec<Stage>,
}

struct Began {
    name: &'static str,
    at: Instant,
    statistics: Statistics,
}

impl Stages {
    /// The worker has come to the beginning of the stage `name`: `sent` is what this side had done
    /// when it sent the mark, `heard` what it has heard until now.
    pub(super) fn reached(
        &mut self,
        name: Option<&'static str>,
        sent: Statistics,
        heard: &Statistics,
        now: Instant,
    ) {
        let statistics = Statistics { worker: heard.worker, bytes_down: heard.bytes_down, ..sent };
        let before = self.current.take();
        self.current = name.map(|name| Began { name, at: now, statistics });
        let Some(before) = before else { return };
        let place = self.ended.iter().position(|stage| stage.name == before.name);
        let place = place.unwrap_or_else(|| {
            let (statistics, elapsed) = Default::default();
            self.ended.push(Stage { name: before.name, statistics, elapsed });
            self.ended.len() - 1
        });
        if let Some(stage) = self.ended.get_mut(place) {
            stage.elapsed += now.saturating_duration_since(before.at);
            stage.statistics.add(&statistics, &before.statistics);
        }
    }
}

impl Statistics {
    /// Adds what was done between two points.
    fn add(&mut self, later: &Self, earlier: &Self) {
        let add = |total: &mut u64, later: u64, earlier: u64| {
            *total = total.saturating_add(later.saturating_sub(earlier));
        };
        // Named one by one, so that a new figure is not forgotten.
        let Self {
            calls,
            replays,
            round_trips,
            bytes_up,
            bytes_down,
            bulk_bytes_up,
            weight_bytes_up,
            worker,
        } = self;
        add(calls, later.calls, earlier.calls);
        add(replays, later.replays, earlier.replays);
        add(round_trips, later.round_trips, earlier.round_trips);
        add(bytes_up, later.bytes_up, earlier.bytes_up);
        add(bytes_down, later.bytes_down, earlier.bytes_down);
        add(bulk_bytes_up, later.bulk_bytes_up, earlier.bulk_bytes_up);
        add(weight_bytes_up, later.weight_bytes_up, earlier.weight_bytes_up);
        let Progress { ops, replays, busy_us, queued_us, idle_us, memory_bytes, peak_bytes } =
            worker;
        let (later, earlier) = (&later.worker, &earlier.worker);
        add(ops, later.ops, earlier.ops);
        add(replays, later.replays, earlier.replays);
        add(busy_us, later.busy_us, earlier.busy_us);
        add(queued_us, later.queued_us, earlier.queued_us);
        add(idle_us, later.idle_us, earlier.idle_us);
        *memory_bytes = (*memory_bytes).max(later.memory_bytes);
        *peak_bytes = (*peak_bytes).max(later.peak_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_one_name_are_added_up_and_what_is_between_is_left_out() {
        let start = Instant::now();
        let mut stages = Stages::default();
        let mut reach = |name, at_ms: u64, bytes_up, busy_us, queued_us| {
            let worker = Progress { busy_us, queued_us, ..Progress::default() };
            let heard = Statistics { worker, ..Statistics::default() };
            let sent = Statistics { bytes_up, ..Statistics::default() };
            stages.reached(name, sent, &heard, start + Duration::from_millis(at_ms));
        };
        reach(Some("text"), 10, 100, 0, 0);
        reach(Some("unet"), 30, 150, 5_000, 1_000);
        reach(None, 100, 200, 60_000, 1_000);
        reach(Some("text"), 500, 900, 90_000, 2_000);
        reach(None, 510, 901, 95_000, 2_000);
        let found: Vec<_> = stages
            .ended
            .iter()
            .map(|stage| {
                let ms = [stage.elapsed, stage.device(), stage.queue(), stage.wire()]
                    .map(|time| time.as_millis());
                (stage.name, stage.statistics.bytes_up, ms)
            })
            .collect();
        assert_eq!(found, [("text", 51, [30, 10, 1, 19]), ("unet", 50, [70, 55, 0, 15])]);
    }
}
