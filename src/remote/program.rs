//! Programs: calls that were recorded once and are replayed with other inputs by one small message.
//! Separate from the executor because here, and nowhere else, ids of one run become places.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Layout;

use super::heap::{Buffer, Poison, Resolved};
use super::op::{Call, Id, Op, Operand};

/// Steps of one program; a UNet evaluation has about a thousand.
pub const MAX_STEPS: usize = 1 << 16;
/// Bytes that the steps of one program may take, about.
const MAX_BYTES: usize = 8 << 20;

/// A recorded program. It holds what it uses from outside, so that nothing it needs can be freed.
pub struct Program<B> {
    /// What the device knows it by: no other program of this process has it.
    key: String,
    steps: Vec<Step<B>>,
    outputs: Vec<Place<B>>,
}

/// One step.
pub enum Step<B> {
    /// Run an op; its result is the next local.
    Call { op: Op, args: Vec<(Place<B>, Option<Layout>)> },
    /// A local is not needed any more.
    Free(usize),
}

/// Where a step finds a buffer.
pub enum Place<B> {
    /// The `n`th input of this run.
    Input(usize),
    /// What the `n`th call of this run made.
    Local(usize),
    /// From outside: the same in every run.
    Captured(Arc<Buffer<B>>),
}

/// What came of a recording.
pub struct Recorded<B> {
    /// How many results every run has.
    pub outputs: usize,
    /// The program, or why its results cannot be made.
    pub program: Result<Arc<Program<B>>, Poison>,
}

/// A program that is being recorded.
pub struct Recording<B> {
    program: u64,
    places: HashMap<Id, Place<B>>,
    steps: Vec<Step<B>>,
    locals: usize,
    bytes: usize,
    refused: Option<Poison>,
}

type Made<B> = Result<Arc<Buffer<B>>, Poison>;

impl<B> Clone for Place<B> {
    fn clone(&self) -> Self {
        match self {
            Place::Input(n) => Place::Input(*n),
            Place::Local(n) => Place::Local(*n),
            Place::Captured(buffer) => Place::Captured(buffer.clone()),
        }
    }
}

impl<B> Recording<B> {
    /// Nothing recorded yet; `inputs` are what varies from run to run.
    pub fn new(program: u64, inputs: Vec<Id>) -> Self {
        let places = inputs.into_iter().enumerate().map(|(n, id)| (id, Place::Input(n))).collect();
        Self { program, places, steps: Vec::new(), locals: 0, bytes: 0, refused: None }
    }

    /// The program cannot be replayed, and why.
    pub fn refuse(&mut self, why: &str) {
        self.refused.get_or_insert_with(|| why.into());
    }

    /// Records a call that made `id`; `capture` finds a buffer from outside.
    pub fn step(&mut self, id: Id, call: &Call, mut capture: impl FnMut(Id) -> Made<B>) {
        self.bytes += bytes(call);
        if self.steps.len() >= MAX_STEPS || self.bytes > MAX_BYTES {
            self.refuse("the program is too long");
        }
        if let Op::Received { .. } = call.op {
            self.refuse("bytes that are sent beside the ops come once and cannot be replayed");
        }
        if self.refused.is_some() {
            return;
        }
        let mut args = Vec::with_capacity(call.args.len());
        for Operand { id, layout } in &call.args {
            let place = match self.places.get(id) {
                Some(place) => place.clone(),
                None => match capture(*id) {
                    Ok(buffer) => Place::Captured(buffer),
                    Err(poison) => return self.refuse(&poison),
                },
            };
            args.push((place, layout.clone()));
        }
        self.steps.push(Step::Call { op: call.op.clone(), args });
        self.places.insert(id, Place::Local(self.locals));
        self.locals += 1;
    }

    /// Notes that `id` is the same in every run: a weight.
    pub fn hold(&mut self, id: Id, made: Made<B>) {
        match made {
            Ok(buffer) => drop(self.places.insert(id, Place::Captured(buffer))),
            Err(poison) => self.refuse(&poison),
        }
    }

    /// Records that `id` was freed. Its number is never used again, so it stays known as an output.
    pub fn free(&mut self, id: Id) {
        if let Some(Place::Local(local)) = self.places.get(&id) {
            self.steps.push(Step::Free(*local));
        }
    }

    /// The program's number and the program, or why there is none; `capture` finds a buffer from
    /// outside.
    pub fn finish(
        mut self,
        outputs: &[Id],
        mut capture: impl FnMut(Id) -> Made<B>,
    ) -> (u64, Recorded<B>) {
        for id in outputs {
            if !self.places.contains_key(id) {
                self.hold(*id, capture(*id));
            }
        }
        let places = outputs.iter().filter_map(|id| self.places.get(id).cloned()).collect();
        let recorded = match self.refused {
            None => Ok(Arc::new(Program::new(self.steps, places))),
            Some(cause) => Err(cause),
        };
        (self.program, Recorded { outputs: outputs.len(), program: recorded })
    }
}

/// What a step takes, about.
fn bytes(call: &Call) -> usize {
    let inline = match &call.op {
        Op::Constant { bytes, .. } => bytes.len(),
        Op::Fused(crate::backend::Fused::LinearCombination(terms)) => 8 * terms.len(),
        // Of the others the attributes are a few numbers.
        _ => 0,
    };
    let layouts = call.args.iter().filter_map(|arg| arg.layout.as_ref());
    let layouts: usize = layouts.map(|layout| 64 + 16 * layout.dims().len()).sum();
    128 + inline + 96 * call.args.len() + layouts
}

impl<B> Program<B> {
    fn new(steps: Vec<Step<B>>, outputs: Vec<Place<B>>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let key = format!("program {}", COUNT.fetch_add(1, Ordering::Relaxed));
        Self { key, steps, outputs }
    }

    /// What the device knows it by.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// How many ops it has.
    pub fn calls(&self) -> u64 {
        let is_call = |step: &&Step<B>| matches!(step, Step::Call { .. });
        self.steps.iter().filter(is_call).count() as u64
    }

    /// In the order of the recording.
    pub fn steps(&self) -> &[Step<B>] {
        &self.steps
    }

    /// A run with these inputs.
    pub fn frame<'a>(&self, inputs: &'a [Made<B>]) -> Frame<'a, B> {
        Frame { inputs, locals: Vec::new() }
    }

    /// How many results a run has.
    pub fn outputs_len(&self) -> usize {
        self.outputs.len()
    }

    /// The results of a run.
    pub fn outputs(&self, frame: &Frame<'_, B>) -> Vec<Made<B>> {
        self.outputs.iter().map(|place| frame.get(place)).collect()
    }
}

/// The buffers of one run.
pub struct Frame<'a, B> {
    inputs: &'a [Made<B>],
    locals: Vec<Option<Made<B>>>,
}

impl<B> Frame<'_, B> {
    /// The next local.
    pub fn push(&mut self, made: Made<B>) {
        self.locals.push(Some(made));
    }

    /// Forgets a local.
    pub fn free(&mut self, local: usize) {
        if let Some(made) = self.locals.get_mut(local) {
            *made = None;
        }
    }

    fn get(&self, place: &Place<B>) -> Made<B> {
        let missing = |what: &str| Err(Poison::from(format!("the program has no such {what}")));
        match place {
            Place::Captured(buffer) => Ok(buffer.clone()),
            Place::Input(n) => self.inputs.get(*n).cloned().unwrap_or_else(|| missing("input")),
            Place::Local(n) => {
                self.locals.get(*n).cloned().flatten().unwrap_or_else(|| missing("local"))
            }
        }
    }

    /// The operands of a step.
    ///
    /// # Errors
    /// The first cause why one could not be made, or why a view does not fit its buffer.
    pub fn resolve(&self, args: &[(Place<B>, Option<Layout>)]) -> Result<Vec<Resolved<B>>, Poison> {
        args.iter()
            .map(|(place, layout)| {
                let resolved = Resolved::new(self.get(place)?, layout.as_ref());
                resolved.map_err(|error| Poison::from(error.to_string()))
            })
            .collect()
    }
}
