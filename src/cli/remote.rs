//! The link to a worker: the connection, and what is kept as long as it lasts. Separate from the
//! painter, which does the same on every device.

use std::sync::Arc;

use super::worker::start_mock;
use crate::backend::cpu;
use crate::error::{Error, Result};
use crate::progress::{Event, Progress};
use crate::remote::client::{Session, Stage};
use crate::remote::device::Device;
use crate::remote::digests::Digests;
use crate::remote::hello::{Hello, Offer};
use crate::remote::quic::client::{CONNECT_TIMEOUT, Connection, connect};
use crate::remote::quic::server::Server;
use crate::remote::trust::Identity;
use crate::remote::url::{PairingUrl, pairing_urls};
use crate::remote::{PROTOCOL_VERSION, schema};

/// A connection to a worker. Dropped, it sends what waits and says good-bye.
pub(super) struct Link {
    session: Arc<Session>,
    // Dropped in this order: first the connection, then the worker at its other end.
    connection: Connection,
    _mock: Option<Server>,
}

impl Link {
    /// Connects to the worker of `url`. If all its sessions are in use, waits for a turn, unless
    /// this run `holds_another` worker's: two runs that waited so could wait for each other.
    ///
    /// # Errors
    /// If it is not there, is not the one that was meant, or refuses.
    pub fn open(url: &PairingUrl, holds_another: bool, progress: &dyn Progress) -> Result<Self> {
        if let Some(warning) = url.warning() {
            progress.report(Event::Warning(warning));
        }
        Self::with(url, None, holds_another, progress)
    }

    /// Starts a worker inside of this process and connects to it.
    ///
    /// # Errors
    /// If the loopback network cannot be used.
    pub fn mock(settings: cpu::Settings, progress: &dyn Progress) -> Result<Self> {
        let identity = Identity::generate()?;
        let server = start_mock(settings, &identity)?;
        let urls = pairing_urls(server.local_addr(), &identity);
        let url = urls.first().ok_or_else(|| Error::other("the worker has no address"))?;
        Self::with(url, Some(server), false, progress)
    }

    fn with(
        url: &PairingUrl,
        mock: Option<Server>,
        holds_another: bool,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let session = Session::new(url.name());
        let hello = Hello { version: PROTOCOL_VERSION, schema: schema() };
        let worker = format!("quic://{}", url.name());
        let mut waits = |position: Option<&str>| {
            if let Some(position) = position {
                if holds_another {
                    return Err(Error::remote(format!(
                        "{worker} is busy ({position}), and a run that has a session of a worker \
                         already waits for no other; try again later, or start that one with a \
                         larger --max-sessions"
                    )));
                }
                progress.report(Event::Queued { worker: &worker, position });
            }
            progress.check()
        };
        let connection = connect(url, session.clone(), hello, CONNECT_TIMEOUT, &mut waits)?;
        session.set_waker(connection.waker());
        Ok(Self { session, connection, _mock: mock })
    }

    /// The device at the other end.
    pub fn device(&self) -> Device {
        let offer = Offer::of(self.connection.greeting());
        Device::with(self.session.clone(), Digests::of_user(), offer)
    }

    /// Whether the connection lasts.
    pub fn is_there(&self) -> bool {
        self.session.check().is_ok()
    }

    /// What is done from now on belongs to a stage, or to none.
    pub fn begin_stage(&self, name: Option<&'static str>) {
        self.session.begin_stage(name);
    }

    /// What the session did so far: a line for all, then a table of the stages.
    pub fn statistics(&self) -> Vec<String> {
        // Of a session that is over there is what was heard before.
        let stages = self.session.stages().unwrap_or_default();
        let found = self.session.statistics();
        let mut lines = vec![format!(
            "worker {}: {} ops there, {} calls sent, {} programs replayed, {} round trips, \
             {} bytes up, {} bytes of weights up, {} bytes down, {} MB of buffers at most",
            self.session.name(),
            found.worker.ops,
            found.calls,
            found.replays,
            found.round_trips,
            found.bytes_up,
            found.weight_bytes_up,
            found.bytes_down,
            found.worker.peak_bytes >> 20,
        )];
        if !stages.is_empty() {
            lines.push(row([
                "stage",
                "ops",
                "programs",
                "trips",
                "bytes up",
                "bulk up",
                "bytes down",
                "device ms",
                "queue ms",
                "wire ms",
            ]));
        }
        // A stage that is elsewhere is none of this worker's.
        let here = stages.iter().filter(|stage| stage.statistics.worker.ops > 0);
        lines.extend(here.map(stage_line));
        lines
    }
}

fn stage_line(stage: &Stage) -> String {
    let did = &stage.statistics;
    let figures = [
        did.worker.ops,
        did.worker.replays,
        did.round_trips,
        did.bytes_up,
        did.bulk_bytes_up,
        did.bytes_down,
        stage.device().as_millis() as u64,
        stage.queue().as_millis() as u64,
        stage.wire().as_millis() as u64,
    ]
    .map(|figure| figure.to_string());
    let [a, b, c, d, e, f, g, h, i] = figures.each_ref().map(String::as_str);
    row([stage.name, a, b, c, d, e, f, g, h, i])
}

/// A row of the table of stages.
fn row([stage, ops, programs, trips, up, bulk, down, device, queue, wire]: [&str; 10]) -> String {
    format!(
        "{stage:5} {ops:>8} {programs:>8} {trips:>5} {up:>10} {bulk:>11} {down:>10} {device:>9} \
         {queue:>8} {wire:>8}"
    )
}
