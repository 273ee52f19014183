//! Heun's method (Karras et al. 2022, algorithm 1), as diffusers' `HeunDiscreteScheduler`: a step
//! by Euler's method, and the same step again with the mean of the derivatives at both its ends.

use super::config::Fields;
use super::plan::{Combination, Plan, Source, Store};
use super::prediction::Prediction;
use super::sigma_schedule::Spread;
use super::sigmas::{KarrasRounding, TrainingSigmas, derivative, step};
use super::training::{Betas, Rescaling};
use super::{Compile, Run};
use crate::Result;

const FIRST_SAMPLE: usize = 0;
const FIRST_DERIVATIVE: usize = 1;

pub(super) struct Heun {
    sigmas: TrainingSigmas,
    prediction: Prediction,
}

pub(super) fn read(fields: &Fields) -> Result<Heun> {
    fields.must_be("clip_sample", false, false)?;
    let (betas, spread) = (Betas::NARROW, Spread::read(fields)?);
    let rounding = KarrasRounding::None;
    Ok(Heun {
        sigmas: TrainingSigmas::read(fields, betas, Rescaling::Unknown, spread, rounding)?,
        prediction: Prediction::read(fields)?,
    })
}

impl Compile for Heun {
    /// Two evaluations a step, and one in the last: its end has no derivative.
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run, 0.0)?;
        let mut planned = Vec::new();
        for (index, timestep, sigma, next) in visited.steps() {
            let first = derivative(self.prediction, sigma);
            let sample = Combination::from(Source::Sample).plus_all(next - sigma, &first);
            let mut evaluation = step(self.prediction, timestep, sigma, next, sample);
            let Some(timestep) = visited.timesteps.get(index + 1) else {
                planned.push(evaluation);
                break;
            };
            evaluation.stores = vec![
                Store { slot: FIRST_SAMPLE, value: Source::Sample.into() },
                Store { slot: FIRST_DERIVATIVE, value: first },
            ];
            planned.push(evaluation);
            let half = 0.5 * (next - sigma);
            let sample = Combination::from(Source::Stored(FIRST_SAMPLE))
                .plus(Source::Stored(FIRST_DERIVATIVE), half)
                .plus_all(half, &derivative(self.prediction, next));
            planned.push(step(self.prediction, *timestep, next, next, sample));
        }
        Plan::new(visited.start(run), planned)
    }
}
