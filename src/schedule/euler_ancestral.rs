//! Euler's method with ancestral noise (Katherine Crowson's k-diffusion), as diffusers'
//! `EulerAncestralDiscreteScheduler`. Noise is drawn in every step but the last, whose share of
//! noise is zero: diffusers draws it there, too, but nothing that is drawn later sees it.

use super::config::Fields;
use super::plan::{Combination, Plan, Source};
use super::prediction::Prediction;
use super::sigmas::{KarrasRounding, TrainingSigmas, derivative, step};
use super::training::{Betas, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct EulerAncestral {
    sigmas: TrainingSigmas,
    prediction: Prediction,
}

pub(super) fn read(fields: &Fields) -> Result<EulerAncestral> {
    let (betas, rescaling) = (Betas::USUAL, Rescaling::AlmostToZero);
    Ok(EulerAncestral {
        sigmas: TrainingSigmas::read(fields, betas, rescaling, None, KarrasRounding::None)?,
        prediction: Prediction::read_without_sample(fields)?,
    })
}

impl Compile for EulerAncestral {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run, 0.0)?;
        let steps = visited.steps().map(|(_, timestep, sigma, next)| {
            let (square, next_square) = (sigma * sigma, next * next);
            let up_square = next_square * (square - next_square) / square;
            let down = (next_square - up_square).sqrt();
            let sample = Combination::from(Source::Sample)
                .plus_all(down - sigma, &derivative(self.prediction, sigma))
                .plus(Source::Noise, up_square.sqrt());
            step(self.prediction, timestep, sigma, next, sample)
        });
        Plan::new(visited.start(run), steps.collect())
    }
}
