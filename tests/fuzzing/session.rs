//! Whole sessions: calls that are almost valid, over small buffers, against the worker's executor
//! on the CPU. The bytes decide in what they are not valid.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout};
use tiny_sd::backend::elements::to_bytes;
use tiny_sd::backend::{HostTensor, cpu};
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::executor::{Arrivals, Executor, Limits, Shared};
use tiny_sd::remote::message::{Message, Numbering, Reply, decode_frame};
use tiny_sd::remote::op::cases::{Case, cases};
use tiny_sd::remote::op::{Call, Digest, Id, Op, Operand};
use tiny_sd::remote::wire::{Reader, Wire};
use tiny_sd::{Error, Result};

use super::choices::Choices;
use super::{Target, noise};

pub const TARGET: Target = Target {
    name: "session",
    run: |bytes| {
        run(bytes);
    },
    draw: |random| {
        let len = 20 + random.below(200);
        noise(random, len)
    },
    // The buffers, the weights, what kernels need beside them, and what programs remember.
    max_memory_bytes: |_| (LIMITS.memory_bytes + WEIGHTS_BYTES) as usize + (4 << 20),
};

/// Small enough that nothing takes long, large enough for every case.
const LIMITS: Limits = Limits { memory_bytes: 256 << 10, buffers: 48 };
const WEIGHTS_BYTES: u64 = 1 << 20;
/// Messages of one session, about.
const MAX_ACTS: usize = 16;

/// What became of sessions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Reads that gave bytes.
    pub read: u64,
    /// Reads that gave an error.
    pub failed: u64,
    /// Sessions that ended because they were malformed.
    pub ended: u64,
}

/// Runs one session.
pub fn run(bytes: &[u8]) -> Tally {
    static WORLD: OnceLock<World> = OnceLock::new();
    let world = WORLD.get_or_init(World::new);
    let mut client = Client {
        choices: Choices(bytes),
        numbering: Numbering::default(),
        executor: Executor::new(
            world.shared.clone(),
            world.library.session(),
            Arc::new(Late),
            LIMITS,
        ),
        recorded: Vec::new(),
        next_program: 0,
        is_recording: false,
        tally: Tally::default(),
    };
    for _ in 0..MAX_ACTS {
        if client.choices.is_empty() {
            break;
        }
        if client.act(&world.cases).is_err() {
            client.tally.ended += 1;
            break;
        }
    }
    client.tally
}

/// What all sessions share.
struct World {
    cases: Vec<Case>,
    shared: Arc<Shared<cpu::Storage>>,
    library: DiskLibrary,
}

impl World {
    fn new() -> Self {
        let limits = disk_library::Limits::new(WEIGHTS_BYTES);
        let limits = disk_library::Limits { stall: Duration::ZERO, ..limits };
        let library = DiskLibrary::in_memory(limits);
        let bytes: Vec<u8> = (0..96).collect();
        let layout = Layout::contiguous(vec![2, 3, 4]);
        let weight = HostTensor::new(DType::F32, layout, Arc::new(bytes.clone()), 0);
        let digest = Digest(weight.expect("a weight").digest());
        let sink = library.session().receive(digest, DType::F32, &[2, 3, 4]);
        let mut sink = sink.expect("room for a weight");
        sink.write(&bytes).expect("its bytes");
        sink.finish().expect("the right bytes");
        let mut cases = cases();
        for case in &mut cases {
            if let Op::Weight { digest: unknown, .. } = &mut case.op {
                *unknown = digest;
            }
        }
        let device = cpu::Device::with_threads(1).expect("a device");
        Self { cases, shared: Arc::new(Shared::new(device, WEIGHTS_BYTES)), library }
    }
}

/// A few tensors have arrived, of whatever length.
struct Late;

impl Arrivals for Late {
    fn take(&self, transfer: u64) -> Result<Vec<u8>> {
        match transfer {
            0 => Ok(vec![1; 80_000]),
            1..=200 => Ok(vec![1; transfer as usize]),
            _ => Err(Error::other("nothing arrives")),
        }
    }
}

/// What the client side of a session knows.
struct Client<'a> {
    choices: Choices<'a>,
    numbering: Numbering,
    executor: Executor<cpu::Storage>,
    recorded: Vec<u64>,
    next_program: u64,
    is_recording: bool,
    tally: Tally,
}

impl Client<'_> {
    /// Mostly what fits the state of the session, sometimes anything.
    fn act(&mut self, cases: &[Case]) -> Result<()> {
        let is_careful = self.choices.byte() > 8;
        let has_made = self.numbering.next().0 > 0;
        match self.choices.byte() {
            180..=189 if has_made => {
                let id = self.any_id();
                self.send(Message::Free(id))
            }
            190..=204 if has_made => {
                let id = self.any_id();
                self.send(Message::Read(id))
            }
            205..=209 => self.send(Message::Mark),
            210..=212 => {
                let digest = Digest([self.choices.byte(); 32]);
                self.send(Message::Probe(vec![digest]))
            }
            213..=229 if has_made => self.program(is_careful),
            230..=252 if has_made => {
                if is_careful && (self.is_recording || self.recorded.is_empty()) {
                    return self.program(is_careful);
                }
                let program = self.any_program();
                let inputs = self.ids();
                self.send(Message::Replay { program, inputs })
            }
            253..=255 if !is_careful || !self.recorded.is_empty() => {
                let program = self.any_program();
                self.recorded.retain(|known| *known != program);
                self.send(Message::DropProgram { program })
            }
            _ => {
                let place = self.choices.below(cases.len());
                cases.get(place).map_or(Ok(()), |case| self.case(case))
            }
        }
    }

    /// Begins, ends or aborts a recording.
    fn program(&mut self, is_careful: bool) -> Result<()> {
        let ids = self.ids();
        let begins = if is_careful { !self.is_recording } else { self.choices.byte() < 128 };
        if begins {
            self.is_recording = true;
            self.next_program += 1;
            return self.send(Message::BeginProgram { program: self.next_program, inputs: ids });
        }
        self.is_recording = false;
        if self.choices.byte() > 220 {
            return self.send(Message::AbortProgram);
        }
        self.recorded.push(self.next_program);
        self.send(Message::EndProgram { outputs: ids })
    }

    fn any_program(&mut self) -> u64 {
        let place = self.choices.below(self.recorded.len());
        self.recorded.get(place).copied().unwrap_or(0)
    }

    /// The operands of a case as buffers, then its op, perhaps with other operands and attributes.
    fn case(&mut self, case: &Case) -> Result<()> {
        let mut args = Vec::new();
        for (values, layout) in &case.operands {
            let id = match self.choices.byte() {
                0..=209 => {
                    let op = Op::Constant { dtype: values.dtype(), bytes: to_bytes(values)? };
                    let id = self.numbering.next();
                    self.send(Message::Call(Call { op, args: vec![] }))?;
                    id
                }
                _ => self.any_id(),
            };
            let layout = self.choices.layout(layout);
            args.push(Operand { id, layout });
        }
        match self.choices.byte() {
            0..=229 => {}
            230..=239 => drop(args.pop()),
            240..=247 => args.extend(args.first().cloned()),
            _ => args.reverse(),
        }
        let op = self.attributes(case.op.clone());
        self.send(Message::Call(Call { op, args }))?;
        let id = Id(self.numbering.next().0.saturating_sub(1));
        if self.choices.byte() < 128 { self.send(Message::Read(id)) } else { Ok(()) }
    }

    /// Sometimes a byte of the op is another.
    fn attributes(&mut self, mut op: Op) -> Op {
        if self.choices.byte() > 180 {
            let mut bytes = Vec::new();
            op.put(&mut bytes);
            for _ in 0..1 + self.choices.byte() % 3 {
                let place = self.choices.below(bytes.len());
                let new = self.choices.byte();
                bytes.iter_mut().skip(place).take(1).for_each(|byte| *byte = new);
            }
            op = Op::get(&mut Reader::new(&bytes)).unwrap_or(op);
        }
        // Drawing as many numbers as it may skip takes seconds.
        if let Op::Randn { noise, .. } = &mut op {
            noise.skip %= 1 << 12;
        }
        op
    }

    fn any_id(&mut self) -> Id {
        let made = self.numbering.next().0;
        Id(made.saturating_sub(1 + self.choices.below(8) as u64))
    }

    fn ids(&mut self) -> Vec<Id> {
        (0..self.choices.below(4)).map(|_| self.any_id()).collect()
    }

    /// Through the bytes of the wire.
    fn send(&mut self, message: Message) -> Result<()> {
        let next = self.numbering.next();
        let mut bytes = Vec::new();
        message.put(next, &mut bytes);
        let tally = &mut self.tally;
        for (id, message) in decode_frame(&bytes, &mut self.numbering)? {
            self.executor.run(id, message, &mut |reply| {
                match &reply {
                    Reply::Data { is_last, .. } => tally.read += u64::from(*is_last),
                    Reply::Failed(_) => tally.failed += 1,
                    Reply::Done(progress) => {
                        assert!(progress.memory_bytes <= LIMITS.memory_bytes, "{progress:?}");
                    }
                    Reply::Present(_) | Reply::Fatal(_) => {}
                }
                let mut bytes = Vec::new();
                reply.put(&mut bytes);
                Ok(())
            })?;
        }
        Ok(())
    }
}
