//! Programs that are asked for again: by the device as a whole, if it can, else op by op. Separate
//! from the executor because only here the device may do many ops at once.

use std::sync::atomic::Ordering;

use candle_core::Layout;

use super::super::heap::{Buffer, Poison};
use super::super::op::Id;
use super::super::program::{Program, Recorded, Step};
use super::super::wire::malformed;
use super::{Executor, Made, poison, slot};
use crate::backend::{Backend, Begun, Device as _, Meta, Outputs, Recording, View};
use crate::error::Result;

impl<B: Backend> Executor<B> {
    pub(super) fn replay(&mut self, id: Id, program: u64, inputs: &[Id]) -> Result<()> {
        let Some(known) = self.programs.get(&program) else {
            return Err(malformed("names a program that is not there"));
        };
        let results = match known.program.clone() {
            Err(poison) => vec![Err(poison); known.outputs],
            Ok(program) => {
                let inputs: Vec<_> = inputs.iter().map(|id| self.materialise(*id)).collect();
                self.progress.replays += 1;
                self.run_program(&program, &inputs)
            }
        };
        for (result, id) in results.into_iter().zip(id.0..) {
            self.heap.put(Id(id), slot(result))?;
        }
        Ok(())
    }

    /// The device may replay it as a whole; else its ops are run one by one.
    fn run_program(&mut self, program: &Program<B>, inputs: &[Made<B>]) -> Vec<Made<B>> {
        let storages: Option<Vec<&B>> =
            inputs.iter().map(|input| Some(&input.as_ref().ok()?.storage)).collect();
        let Some(storages) = storages else { return self.run_steps(program, inputs) };
        let shared = self.shared.clone();
        let device = &shared.device;
        match self.on_device(|| device.begin_program(program.key(), &storages)) {
            Err(error) => vec![Err(poison(error)); program.outputs_len()],
            Ok(Begun::Run) => self.run_steps(program, inputs),
            Ok(Begun::Replayed(outputs)) => {
                self.progress.ops += program.calls();
                self.charge_all(outputs)
            }
            Ok(Begun::Record) => {
                let recording = Recording::of(device);
                let made = self.run_steps(program, inputs);
                self.end_recording(recording, made)
            }
        }
    }

    /// Ends what the device records of a program that was run.
    fn end_recording(
        &self,
        recording: Recording<'_, B::Device>,
        made: Vec<Made<B>>,
    ) -> Vec<Made<B>> {
        let buffers: Option<Vec<&Buffer<B>>> =
            made.iter().map(|made| made.as_deref().ok()).collect();
        let Some(buffers) = buffers else { return made };
        let views: Vec<_> =
            buffers.iter().map(|b| View { storage: &b.storage, layout: &b.meta.layout }).collect();
        match self.on_device(|| recording.end(&views)) {
            Ok(None) => made,
            Ok(Some(outputs)) => self.charge_all(outputs),
            Err(error) => vec![Err(poison(error)); made.len()],
        }
    }

    fn charge_all(&self, outputs: Outputs<B>) -> Vec<Made<B>> {
        let charged = |(storage, layout): (B, Layout)| {
            let meta = Meta { dtype: storage.dtype(), layout };
            self.heap.check_room(&meta).map_err(poison)?;
            Ok(self.heap.charge(storage, meta))
        };
        outputs.into_iter().map(charged).collect()
    }

    /// A program that will not be asked for again.
    pub(super) fn forget(&self, recorded: &Recorded<B>) {
        if let Ok(program) = &recorded.program {
            self.shared.device.forget_program(program.key());
        }
    }

    fn run_steps(&mut self, program: &Program<B>, inputs: &[Made<B>]) -> Vec<Made<B>> {
        let mut frame = program.frame(inputs);
        for step in program.steps() {
            match step {
                Step::Free(local) => frame.free(*local),
                Step::Call { op, args } => {
                    self.progress.ops += 1;
                    let result = match self.is_over.load(Ordering::Relaxed) {
                        true => Err(Poison::from("the session is over")),
                        false => frame.resolve(args).and_then(|args| self.compute(op, &args)),
                    };
                    frame.push(result);
                }
            }
        }
        program.outputs(&frame)
    }
}
