//! Euler's method (Karras et al. 2022, algorithm 2 without churn), as diffusers'
//! `EulerDiscreteScheduler`.

use super::config::Fields;
use super::plan::{Combination, Plan, Source};
use super::prediction::Prediction;
use super::sigma_schedule::Spread;
use super::sigmas::{KarrasRounding, TrainingSigmas, derivative, step};
use super::training::{Betas, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct Euler {
    sigmas: TrainingSigmas,
    prediction: Prediction,
    final_sigma: f64,
}

pub(super) fn read(fields: &Fields) -> Result<Euler> {
    fields.choice("interpolation_type", (), &[("linear", ())])?;
    fields.choice("timestep_type", (), &[("discrete", ())])?;
    let (betas, rescaling) = (Betas::USUAL, Rescaling::AlmostToZero);
    let spread = Spread::read(fields)?;
    let sigmas = TrainingSigmas::read(fields, betas, rescaling, spread, KarrasRounding::None)?;
    let known = [("zero", 0.0), ("sigma_min", sigmas.lowest())];
    Ok(Euler {
        prediction: Prediction::read(fields)?,
        final_sigma: fields.choice("final_sigmas_type", 0.0, &known)?,
        sigmas,
    })
}

impl Compile for Euler {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run, self.final_sigma)?;
        let steps = visited.steps().map(|(_, timestep, sigma, next)| {
            let sample = Combination::from(Source::Sample)
                .plus_all(next - sigma, &derivative(self.prediction, sigma));
            step(self.prediction, timestep, sigma, next, sample)
        });
        Plan::new(visited.start(run), steps.collect())
    }
}
