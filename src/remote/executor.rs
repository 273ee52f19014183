//! A session from the worker's side: runs messages one after the other on any backend. Separate
//! from the network and from threads: messages come in, replies go out, nothing here waits but for
//! weights that are on their way.

mod replay;

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use candle_core::Layout;
use candle_core::backend::BackendDevice;

use super::heap::{Buffer, Heap, Poison, Resolved, Slot, view_of};
use super::library::{Library, Recipe, Weights, prepare};
use super::message::{MAX_PIECE_BYTES, Message, Progress, Reply};
use super::op::execute::{execute, execute_in_place};
use super::op::infer::Source;
use super::op::{Call, Id, Op};
use super::program::{Recorded, Recording};
use super::turns::Turns;
use super::wire::malformed;
use crate::backend::elements::{from_bytes, to_bytes};
use crate::backend::{Backend, Fused, HostTensor, Meta, MetaRef, View, with_each};
use crate::error::{Error, Result};

/// What a session may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of its buffers.
    pub memory_bytes: u64,
    /// Number of its buffers.
    pub buffers: usize,
}

/// Large host tensors on their way to a session.
pub trait Arrivals: Send + Sync {
    /// The bytes of a transfer; waits for them, but not for ever.
    ///
    /// # Errors
    /// If they do not come.
    fn take(&self, transfer: u64) -> Result<Vec<u8>>;
}

type Made<B> = std::result::Result<Arc<Buffer<B>>, Poison>;

/// What all sessions of a worker share.
pub struct Shared<B: Backend> {
    device: B::Device,
    pub(super) weights: Weights<B>,
    pub(super) turns: Turns,
}

impl<B: Backend> Shared<B> {
    /// A device, and room for `weights_bytes` of buffers made of weights.
    pub fn new(device: B::Device, weights_bytes: u64) -> Self {
        Self { device, weights: Weights::new(weights_bytes), turns: Turns::default() }
    }

    /// The device.
    pub fn device(&self) -> &B::Device {
        &self.device
    }
}

/// The state of one session.
pub struct Executor<B: Backend> {
    shared: Arc<Shared<B>>,
    heap: Heap<B>,
    library: Arc<dyn Library>,
    arrivals: Arc<dyn Arrivals>,
    programs: HashMap<u64, Recorded<B>>,
    recording: Option<Recording<B>>,
    progress: Progress,
    began: Instant,
    /// Time spent waiting for messages and for bytes.
    idle: Cell<Duration>,
    /// Time spent waiting for other sessions' ops.
    queued: Cell<Duration>,
    is_over: Arc<AtomicBool>,
}

impl<B: Backend> Executor<B> {
    /// A session without buffers.
    pub fn new(
        shared: Arc<Shared<B>>,
        library: Arc<dyn Library>,
        arrivals: Arc<dyn Arrivals>,
        limits: Limits,
    ) -> Self {
        Self {
            shared,
            heap: Heap::new(limits.memory_bytes, limits.buffers),
            library,
            arrivals,
            programs: HashMap::new(),
            recording: None,
            progress: Progress::default(),
            began: Instant::now(),
            idle: Cell::default(),
            queued: Cell::default(),
            is_over: Arc::default(),
        }
    }

    /// Once set, a program that runs is not run to its end: nobody will ask for its results.
    pub fn is_over(&self) -> Arc<AtomicBool> {
        self.is_over.clone()
    }

    /// Time that was spent waiting for messages: for statistics.
    pub fn idled(&self, time: Duration) {
        self.idle.set(self.idle.get() + time);
    }

    /// Waits for something that comes from the client.
    fn arriving<T>(&self, wait: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let arrived = wait();
        self.idled(began.elapsed());
        arrived
    }

    /// Runs something on the device, when it is this session's turn. A panic in a kernel is an
    /// error of that op, not the end of the worker.
    fn on_device<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let turn = self.shared.turns.take();
        if !turn.waited.is_zero() {
            self.queued.set(self.queued.get() + turn.waited);
        }
        guard(run)
    }

    /// Runs one message, whose first result gets `id`, and says what there is to say.
    ///
    /// # Errors
    /// If the session must end. A failing op does not end it: its result is poisoned.
    pub fn run(
        &mut self,
        id: Id,
        message: Message,
        reply: &mut dyn FnMut(Reply) -> Result<()>,
    ) -> Result<()> {
        match message {
            Message::Call(call) => self.call(id, call)?,
            Message::Free(id) => self.free(id),
            Message::Read(id) => self.read(id, reply)?,
            Message::Mark => {
                reply(Reply::Done(self.progress()))?;
            }
            Message::Probe(digests) => {
                reply(Reply::Present(self.library.has(&digests)))?;
            }
            Message::BeginProgram { program, inputs } => {
                self.recording = Some(Recording::new(program, inputs));
            }
            Message::EndProgram { outputs } => {
                if let Some(recording) = self.recording.take() {
                    let (program, recorded) = recording.finish(&outputs, |id| self.materialise(id));
                    self.programs.insert(program, recorded);
                }
            }
            Message::AbortProgram => self.recording = None,
            Message::Replay { program, inputs } => self.replay(id, program, &inputs)?,
            Message::DropProgram { program } => {
                if let Some(recorded) = self.programs.remove(&program) {
                    self.forget(&recorded);
                }
            }
        }
        Ok(())
    }

    /// What was done so far. The clock is read here and not at every op.
    fn progress(&self) -> Progress {
        let (idle, queued) = (self.idle.get(), self.queued.get());
        let busy = self.began.elapsed().saturating_sub(idle + queued);
        Progress {
            busy_us: busy.as_micros() as u64,
            queued_us: queued.as_micros() as u64,
            idle_us: idle.as_micros() as u64,
            memory_bytes: self.heap.used_bytes(),
            peak_bytes: self.heap.peak_bytes(),
            ..self.progress
        }
    }

    fn free(&mut self, id: Id) {
        if let Some(recording) = &mut self.recording {
            recording.free(id);
        }
        self.heap.take(id);
    }

    fn call(&mut self, id: Id, call: Call) -> Result<()> {
        self.progress.ops += 1;
        if call.op.is_in_place() {
            return self.call_in_place(call);
        }
        let lazy = self.lazy(&call);
        let is_lazy = lazy.is_some();
        let slot = match lazy {
            Some(recipe) => Slot::Lazy(recipe),
            None => slot(self.resolve(&call).and_then(|args| self.compute(&call.op, &args))),
        };
        self.heap.put(id, slot)?;
        if let Some(mut recording) = self.recording.take() {
            match is_lazy {
                true => recording.hold(id, self.materialise(id)),
                false => recording.step(id, &call, |id| self.materialise(id)),
            }
            self.recording = Some(recording);
        }
        Ok(())
    }

    /// A weight, or what is made of one at load, is not made before it is needed: it may be there
    /// already, from another session.
    fn lazy(&self, call: &Call) -> Option<Recipe> {
        match (&call.op, call.args.as_slice()) {
            (Op::Weight { digest, dtype, dims }, []) if call.op.infer(&[]).is_ok() => {
                Some(Recipe { digest: *digest, dtype: *dtype, dims: dims.clone(), role: None })
            }
            (Op::Fused(Fused::Prepare(role)), [arg]) => {
                let Ok(Slot::Lazy(recipe)) = self.heap.get(arg.id) else { return None };
                let natural = Layout::contiguous(recipe.dims.clone());
                let layout = arg.layout.as_ref().unwrap_or(&natural);
                let meta = MetaRef { dtype: recipe.dtype, layout };
                let covers = layout.is_contiguous()
                    && layout.start_offset() == 0
                    && layout.shape().elem_count() == natural.shape().elem_count()
                    && recipe.role.is_none()
                    && Fused::Prepare(*role).infer(&[meta]).is_ok();
                let dims = layout.dims().to_vec();
                covers.then_some(Recipe { dims, role: Some(*role), ..recipe.clone() })
            }
            _ => None,
        }
    }

    /// The buffer under `id`, made now if it is a weight that nobody needed before.
    fn materialise(&mut self, id: Id) -> Made<B> {
        match self.heap.get(id).map_err(poison)?.clone() {
            Slot::Ready(buffer) => Ok(buffer),
            Slot::Poisoned(poison) => Err(poison),
            Slot::Lazy(recipe) => {
                let fetch = || self.arriving(|| self.library.get(&recipe.digest));
                let make = |host: &HostTensor| {
                    self.on_device(|| prepare(&recipe, host, &self.shared.device))
                };
                let made =
                    guard(|| self.shared.weights.get(&recipe, fetch, make)).map_err(|error| {
                        let (number, dims) = (self.progress.ops, &recipe.dims);
                        let dtype = recipe.dtype.as_str();
                        poison(error.context(format!("call {number}: weight {dims:?} {dtype}")))
                    });
                self.heap.take(id);
                self.heap.put(id, slot(made.clone())).map_err(poison)?;
                made
            }
        }
    }

    fn resolve(&mut self, call: &Call) -> std::result::Result<Vec<Resolved<B>>, Poison> {
        let mut resolved = Vec::with_capacity(call.args.len());
        for arg in &call.args {
            let buffer = match self.heap.get(arg.id) {
                Ok(Slot::Ready(buffer)) => buffer.clone(),
                Ok(Slot::Lazy(_) | Slot::Poisoned(_)) => self.materialise(arg.id)?,
                Err(error) => return Err(self.failed(&call.op, error)),
            };
            let operand = Resolved::new(buffer, arg.layout.as_ref());
            resolved.push(operand.map_err(|error| self.failed(&call.op, error))?);
        }
        Ok(resolved)
    }

    fn compute(&self, op: &Op, args: &[Resolved<B>]) -> Made<B> {
        let run = || -> Result<Arc<Buffer<B>>> {
            let meta = with_each(args, source, |sources| op.infer(sources))?;
            let storage = self.heap.check_room(&meta).and_then(|()| {
                self.check_views(args)?;
                match self.execute(op, args, &meta) {
                    // Weights that nobody uses are kept for who comes next, not instead of this.
                    Err(error)
                        if error.is_out_of_memory()
                            && !matches!(op, Op::Received { .. })
                            && self.shared.weights.forget_unused() =>
                    {
                        self.execute(op, args, &meta)
                    }
                    made => made,
                }
            });
            let storage = storage.map_err(|error| {
                error.context(with_each(args, source, |sources| op.described(sources)))
            })?;
            Ok(self.heap.charge(storage, meta))
        };
        run().map_err(|error| poison(error.context(format!("call {}", self.progress.ops))))
    }

    fn check_views(&self, args: &[Resolved<B>]) -> Result<()> {
        args.iter().try_for_each(|arg| self.heap.check_view(&arg.buffer, arg.layout()))
    }

    fn execute(&self, op: &Op, args: &[Resolved<B>], meta: &Meta) -> Result<B> {
        if let Op::Received { transfer, dtype, len } = op {
            let bytes = self.arriving(|| self.arrivals.take(*transfer))?;
            if bytes.len() != len * dtype.size_in_bytes() {
                let have = bytes.len();
                return Err(Error::other(format!("{have} bytes arrived for {meta:?}")));
            }
            let host = from_bytes(*dtype, &bytes)?;
            let store = || Ok(self.shared.device.storage_from_cpu_storage_owned(host)?);
            return self.on_device(store);
        }
        let device = &self.shared.device;
        self.on_device(|| with_each(args, view, |views| execute(op, device, views)))
    }

    fn failed(&self, op: &Op, error: Error) -> Poison {
        poison(error.context(format!("call {}: {}", self.progress.ops, op.name())))
    }

    /// The target leaves the heap while it is written, so that it cannot be a source as well.
    fn call_in_place(&mut self, mut call: Call) -> Result<()> {
        let target = match call.args.is_empty() {
            true => return Err(malformed("writes nowhere")),
            false => call.args.remove(0),
        };
        if let Some(recording) = &mut self.recording {
            recording.refuse("an op in place cannot be part of a program");
        }
        let slot = match self.materialise(target.id) {
            Err(poison) => Slot::Poisoned(poison),
            Ok(buffer) => {
                self.heap.take(target.id);
                slot(self.write(&call, &target, buffer))
            }
        };
        self.heap.take(target.id);
        self.heap.put(target.id, slot)
    }

    fn write(
        &mut self,
        call: &Call,
        target: &super::op::Operand,
        mut buffer: Arc<Buffer<B>>,
    ) -> Made<B> {
        let args = self.resolve(call)?;
        let run = || -> Result<Arc<Buffer<B>>> {
            let layout = view_of(&buffer, target.layout.as_ref())?;
            let layout = layout.unwrap_or_else(|| buffer.meta.layout.clone());
            let meta = MetaRef { dtype: buffer.meta.dtype, layout: &layout };
            let mut all = vec![Source { meta, len: buffer.elem_count() }];
            all.extend(args.iter().map(source));
            call.op.infer(&all)?;
            self.heap.check_view(&buffer, &layout)?;
            self.check_views(&args)?;
            if Arc::get_mut(&mut buffer).is_none() {
                // A program or another session has it as well: they keep what they have.
                self.heap.check_room(&buffer.meta)?;
                let copy =
                    self.on_device(|| Ok(buffer.storage.try_clone(&buffer.meta.layout)?))?;
                buffer = self.heap.charge(copy, buffer.meta.clone());
            }
            if let Some(own) = Arc::get_mut(&mut buffer) {
                let (op, target) = (&call.op, &mut own.storage);
                with_each(&args, view, |views| {
                    self.on_device(|| execute_in_place(op, target, &layout, views))
                })?;
            }
            Ok(buffer)
        };
        run().map_err(|error| self.failed(&call.op, error))
    }

    fn read(&mut self, id: Id, reply: &mut dyn FnMut(Reply) -> Result<()>) -> Result<()> {
        let read = self.materialise(id).and_then(|buffer| {
            self.on_device(|| to_bytes(&buffer.storage.to_cpu_storage()?)).map_err(poison)
        });
        match read {
            Err(poison) => reply(Reply::Failed(poison.to_string())),
            Ok(bytes) => {
                let pieces = bytes.len().div_ceil(MAX_PIECE_BYTES).max(1);
                for piece in 0..pieces {
                    let end = bytes.len().min((piece + 1) * MAX_PIECE_BYTES);
                    let bytes = bytes[piece * MAX_PIECE_BYTES..end].to_vec();
                    reply(Reply::Data { bytes, is_last: piece + 1 == pieces })?;
                }
                Ok(())
            }
        }
    }
}

impl<B: Backend> Drop for Executor<B> {
    fn drop(&mut self) {
        self.programs.values().for_each(|recorded| self.forget(recorded));
    }
}

fn slot<B>(made: Made<B>) -> Slot<B> {
    match made {
        Ok(buffer) => Slot::Ready(buffer),
        Err(poison) => Slot::Poisoned(poison),
    }
}

fn poison(error: Error) -> Poison {
    Poison::from(error.to_string())
}

/// A panic in a kernel is an error of that op, not the end of the worker.
fn guard<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::other(format!("the kernel panicked: {}", text.unwrap_or("no message"))))
    })
}

fn source<B>(arg: &Resolved<B>) -> Source<'_> {
    let meta = MetaRef { dtype: arg.buffer.meta.dtype, layout: arg.layout() };
    Source { meta, len: arg.buffer.elem_count() }
}

fn view<B>(arg: &Resolved<B>) -> View<'_, B> {
    View { storage: &arg.buffer.storage, layout: arg.layout() }
}
