//! Linear multistep (Adams-Bashforth of order 4 on uneven steps, from Katherine Crowson's
//! k-diffusion), as diffusers' `LMSDiscreteScheduler`.

use super::config::Fields;
use super::plan::{Combination, Plan, Source, Store};
use super::prediction::Prediction;
use super::sigma_schedule::Spread;
use super::sigmas::{KarrasRounding, TrainingSigmas, derivative, step};
use super::training::{Betas, Rescaling};
use super::{Compile, Run};
use crate::Result;

const ORDER: usize = 4;
const RING: usize = ORDER - 1;

pub(super) struct Lms {
    sigmas: TrainingSigmas,
    prediction: Prediction,
}

pub(super) fn read(fields: &Fields) -> Result<Lms> {
    let spread = Spread::read(fields)?.map(Spread::without_ends_for_karras);
    let betas = Betas::USUAL;
    let rounding = KarrasRounding::None;
    Ok(Lms {
        sigmas: TrainingSigmas::read(fields, betas, Rescaling::Unknown, spread, rounding)?,
        prediction: Prediction::read(fields)?,
    })
}

impl Compile for Lms {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run, 0.0)?;
        let steps = visited.steps().map(|(index, timestep, sigma, next)| {
            let order = ORDER.min(index + 1);
            let before: Vec<f64> = visited.sigmas[..=index].iter().rev().copied().collect();
            let slope = derivative(self.prediction, sigma);
            // A run that begins later has the order of its place in the schedule, but not the
            // derivatives of the steps before; diffusers leaves those summands out.
            let kept = order.min(index - visited.skipped + 1);
            let weights = (0..kept).map(|place| (place, weight(&before[..order], place, next)));
            let sample =
                weights.fold(Combination::from(Source::Sample), |sum, (back, weight)| match back {
                    0 => sum.plus_all(weight, &slope),
                    back => sum.plus(Source::Stored((index - back) % RING), weight),
                });
            let mut planned = step(self.prediction, timestep, sigma, next, sample);
            planned.stores = vec![Store { slot: index % RING, value: slope }];
            planned
        });
        Plan::new(visited.start(run), steps.collect())
    }
}

/// The integral, from the first of `sigmas` to `next`, of the polynomial that is one at the sigma
/// in this place and zero at the others.
fn weight(sigmas: &[f64], place: usize, next: f64) -> f64 {
    let polynomial = |at: f64| {
        let others = sigmas.iter().enumerate().filter(|(other, _)| *other != place);
        others.fold(1.0, |product, (_, other)| product * (at - other) / (sigmas[place] - other))
    };
    let from = sigmas[0];
    // Simpson's rule, which is exact for cubic polynomials.
    let middle = polynomial(0.5 * (from + next));
    (next - from) / 6.0 * (polynomial(from) + 4.0 * middle + polynomial(next))
}
