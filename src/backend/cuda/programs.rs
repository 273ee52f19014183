//! Programs as graphs: work that was launched once, kernel by kernel, and is launched again as a
//! whole with other inputs. Separate from the device because this is the one place where an address
//! outlives an op.
//!
//! While a program is recorded its kernels run as ever, but in memory of its own (an [`Arena`]) and
//! on copies of its inputs, so that a replay finds everything at the same address. Results are
//! copied out, as the next replay writes over them. What is used from outside is not kept alive by
//! a program: when it is gone, so is the program.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout};

use super::driver::{Address, Graph, Launch};
use super::memory::{Arena, Memory};
use super::{Buffer, Device, Storage};
use crate::backend::{Begun, Outputs, View};
use crate::error::{Error, Result};

/// Programs of a device: the UNet at some sizes, or those of some sessions.
const MAX_PROGRAMS: usize = 8;
/// Launches of one program; a UNet evaluation has some hundreds.
const MAX_LAUNCHES: usize = 1 << 16;

/// The programs of a device.
#[derive(Default)]
pub(super) struct Programs {
    state: Mutex<State>,
    /// So that who does not record looks at no lock.
    is_recording: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The least recently used first.
    known: VecDeque<Known>,
    recording: Option<Recording>,
}

/// What a buffer is, for as far as a replay must find the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    dtype: DType,
    elements: usize,
}

/// An input, and where the program reads it.
struct Input {
    kind: Kind,
    original: Address,
    own: Arc<Memory>,
}

struct Output {
    kind: Kind,
    address: Address,
    bytes: usize,
    layout: Layout,
}

/// A program that is being recorded.
pub(super) struct Recording {
    key: String,
    /// Whose launches are recorded: other threads may work meanwhile.
    thread: ThreadId,
    arena: Arc<Arena>,
    inputs: Vec<Input>,
    launches: Vec<Launch>,
    outside: Vec<Weak<Memory>>,
    known_outside: HashSet<u64>,
    refused: bool,
}

struct Known {
    key: String,
    /// None if it cannot be replayed: nothing is held for it.
    program: Option<Program>,
}

struct Program {
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    replay: Replay,
    outside: Vec<Weak<Memory>>,
    /// What the launches point to.
    #[allow(dead_code, reason = "it keeps the memory as long as the program")]
    arena: Arc<Arena>,
}

enum Replay {
    /// Nobody asked for it yet.
    Launches(Vec<Launch>),
    Graph(Box<dyn Graph>),
}

impl Program {
    fn takes(&self, inputs: &[&Storage]) -> bool {
        self.inputs.len() == inputs.len()
            && self.inputs.iter().zip(inputs).all(|(own, input)| own.kind == kind(input))
    }

    fn is_whole(&self) -> bool {
        self.outside.iter().all(|memory| memory.strong_count() > 0)
    }

    fn run(&mut self, device: &Device, inputs: &[&Storage]) -> Result<Outputs<Storage>> {
        let driver = device.driver();
        if let Replay::Launches(launches) = &self.replay {
            self.replay = Replay::Graph(driver.graph(launches)?);
        }
        let Replay::Graph(graph) = &self.replay else {
            return Err(Error::other("a program without a graph"));
        };
        for (own, input) in self.inputs.iter().zip(inputs) {
            driver.copy(input.memory().address(), own.own.address(), own.own.bytes())?;
        }
        graph.launch()?;
        device.counts().replays.fetch_add(1, Ordering::Relaxed);
        self.outputs.iter().map(|output| output.copied(device)).collect()
    }
}

impl Output {
    /// What is there now, as a buffer of its own.
    fn copied(&self, device: &Device) -> Result<(Storage, Layout)> {
        let buffer = Buffer::outside_of_programs(device, self.bytes)?;
        device.driver().copy(self.address, buffer.memory.address(), self.bytes)?;
        let Kind { dtype, elements } = self.kind;
        Ok((Storage::new(buffer, dtype, elements), self.layout.clone()))
    }
}

fn kind(storage: &Storage) -> Kind {
    Kind { dtype: storage.dtype(), elements: storage.elements() }
}

impl Programs {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at what this thread records, if it does.
    fn recording<T>(&self, look: impl FnOnce(&mut Recording) -> T) -> Option<T> {
        if !self.is_recording.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.lock();
        let own = |recording: &&mut Recording| recording.thread == std::thread::current().id();
        state.recording.as_mut().filter(own).map(look)
    }

    /// As [`Device::begin_program`](crate::backend::Device::begin_program).
    pub fn begin(&self, device: &Device, key: &str, inputs: &[&Storage]) -> Result<Begun<Storage>> {
        let mut state = self.lock();
        if let Some(recording) = &state.recording {
            if recording.thread == std::thread::current().id() {
                return Err(Error::other("a program cannot be recorded within another"));
            }
            // One at a time; this one will be asked for again.
            return Ok(Begun::Run);
        }
        state.known.retain(|known| known.program.as_ref().is_none_or(Program::is_whole));
        if let Some(place) = state.known.iter().position(|program| program.key == key)
            && let Some(mut known) = state.known.remove(place)
        {
            let fitting = known.program.as_mut().filter(|program| program.takes(inputs));
            let begun = match fitting.map(|program| program.run(device, inputs)) {
                Some(Err(error)) if error.is_out_of_memory() => {
                    // Programs can be recorded again; a picture that fails is lost.
                    state.known.clear();
                    return Ok(Begun::Run);
                }
                Some(outputs) => Begun::Replayed(outputs?),
                None => Begun::Run,
            };
            state.known.push_back(known);
            return Ok(begun);
        }
        let mut addresses = HashSet::new();
        if !inputs.iter().all(|input| addresses.insert(input.memory().address().0)) {
            // What was one buffer twice says nothing of two.
            return Ok(Begun::Run);
        }
        let evicted = match state.known.len() >= MAX_PROGRAMS {
            true => state.known.pop_front(),
            false => None,
        };
        state.recording = match Recording::new(device, key, inputs) {
            Err(error) if error.is_out_of_memory() => {
                state.known.clear();
                return Ok(Begun::Run);
            }
            recording => recording?,
        };
        if state.recording.is_none() {
            return Ok(Begun::Run);
        }
        self.is_recording.store(true, Ordering::Release);
        drop((state, evicted));
        Ok(Begun::Record)
    }

    /// Ends this thread's recording: these are its results. Gives copies of them, which a replay
    /// does not write over.
    pub fn end(
        &self,
        device: &Device,
        outputs: &[View<'_, Storage>],
    ) -> Result<Option<Outputs<Storage>>> {
        // Results may be inputs or from outside: noted while it is still recorded.
        let address = |view: &View<'_, Storage>| view.storage.address();
        let addresses: Vec<_> = outputs.iter().map(address).collect();
        let Some(recording) = self.take() else {
            return Err(Error::other("no program is being recorded"));
        };
        let outputs = outputs.iter().zip(addresses).map(|(view, address)| Output {
            kind: kind(view.storage),
            address,
            bytes: view.storage.memory().bytes(),
            layout: view.layout.clone(),
        });
        let outputs: Vec<_> = outputs.collect();
        let Recording { key, inputs, launches, outside, arena, refused, .. } = recording;
        let copied = || outputs.iter().map(|output| output.copied(device)).collect::<Result<_>>();
        let copies = match copied() {
            Err(error) if error.is_out_of_memory() && self.forget_all() => copied()?,
            copies => copies?,
        };
        let replay = Replay::Launches(launches);
        let program = Program { inputs, outputs, replay, outside, arena };
        let known = Known { key, program: Some(program).filter(|_| !refused) };
        self.lock().known.push_back(known);
        Ok(Some(copies))
    }

    /// Ends this thread's recording, of which nothing stays.
    pub fn take(&self) -> Option<Recording> {
        self.recording(|_| ())?;
        self.is_recording.store(false, Ordering::Release);
        self.lock().recording.take()
    }

    /// Forgets the program of this key, if there is one.
    pub fn forget(&self, key: &str) {
        let gone: Vec<_> = {
            let mut state = self.lock();
            let place = state.known.iter().position(|program| program.key == key);
            place.and_then(|place| state.known.remove(place)).into_iter().collect()
        };
        drop(gone);
    }

    /// Forgets all programs, for their memory; whether there were any.
    pub fn forget_all(&self) -> bool {
        let gone = std::mem::take(&mut self.lock().known);
        !gone.is_empty()
    }

    /// Where this thread's results go, if it records.
    pub fn arena(&self) -> Option<Arc<Arena>> {
        self.recording(|recording| recording.arena.clone())
    }

    /// Notes a launch of this thread, if it records.
    pub fn note(&self, launch: Launch) {
        self.recording(|recording| match recording.launches.len() < MAX_LAUNCHES {
            true => recording.launches.push(launch),
            false => recording.refused = true,
        });
    }

    /// What this thread records cannot be replayed: something but launches depends on its inputs.
    pub fn refuse(&self) {
        self.recording(|recording| recording.refused = true);
    }

    /// Whether a kernel of this thread may write to memory that nobody else has. While it records,
    /// only to what a replay makes anew.
    pub fn may_write(&self, memory: &Arc<Memory>) -> bool {
        let own = self.recording(|recording| memory.is_of(&recording.arena) && !memory.is_kept());
        own.unwrap_or(true)
    }

    /// Where a kernel of this thread finds a buffer.
    pub fn place(&self, memory: &Arc<Memory>) -> Address {
        let own = self.recording(|recording| recording.place(memory));
        own.unwrap_or_else(|| memory.address())
    }
}

impl Recording {
    /// None if its inputs are more than a program may hold.
    fn new(device: &Device, key: &str, inputs: &[&Storage]) -> Result<Option<Self>> {
        let arena = Arc::new(Arena::new(device.hardware()));
        let copied = |input: &&Storage| {
            let memory = input.memory();
            let Some(own) = arena.take(memory.bytes(), true)? else { return Ok(None) };
            device.driver().copy(memory.address(), own.address(), memory.bytes())?;
            let (kind, original) = (kind(input), memory.address());
            Ok(Some(Input { kind, original, own: Arc::new(own) }))
        };
        let inputs = inputs.iter().map(copied).collect::<Result<Option<Vec<_>>>>()?;
        Ok(inputs.map(|inputs| Self {
            key: key.into(),
            thread: std::thread::current().id(),
            arena,
            inputs,
            launches: Vec::new(),
            outside: Vec::new(),
            known_outside: HashSet::new(),
            refused: false,
        }))
    }

    fn place(&mut self, memory: &Arc<Memory>) -> Address {
        let address = memory.address();
        if let Some(input) = self.inputs.iter().find(|input| input.original == address) {
            return input.own.address();
        }
        if !memory.is_of(&self.arena) && self.known_outside.insert(address.0) {
            self.outside.push(Arc::downgrade(memory));
        }
        address
    }
}
