//! DPM2 of k-diffusion, as diffusers' `KDPM2DiscreteScheduler`, and with ancestral noise, as
//! `KDPM2AncestralDiscreteScheduler`: each step is made with the derivative at its middle, to which
//! Euler's method goes first. One file because they differ only in where the middle is.

use super::config::Fields;
use super::plan::{Combination, Plan, Source, Store};
use super::prediction::Prediction;
use super::sigma_schedule::Spread;
use super::sigmas::{KarrasRounding, TrainingSigmas, derivative, step};
use super::training::{Betas, Rescaling};
use super::{Compile, Run};
use crate::Result;

const FIRST_SAMPLE: usize = 0;

pub(super) struct Kdpm2 {
    sigmas: TrainingSigmas,
    prediction: Prediction,
    noise: AddedNoise,
}

/// What is added after a step.
#[derive(Clone, Copy)]
enum AddedNoise {
    None,
    Ancestral,
}

/// A step from one sigma to another.
struct Way {
    /// Where the derivative is taken.
    middle: f64,
    /// Where the step ends before noise is added.
    down: f64,
    /// How much noise is added.
    up: f64,
}

pub(super) fn read(fields: &Fields) -> Result<Kdpm2> {
    read_with(fields, AddedNoise::None)
}

pub(super) fn read_ancestral(fields: &Fields) -> Result<Kdpm2> {
    read_with(fields, AddedNoise::Ancestral)
}

fn read_with(fields: &Fields, noise: AddedNoise) -> Result<Kdpm2> {
    let (betas, spread) = (Betas::NARROW, Spread::read(fields)?);
    let rounding = KarrasRounding::ToWholeTimesteps;
    Ok(Kdpm2 {
        sigmas: TrainingSigmas::read(fields, betas, Rescaling::Unknown, spread, rounding)?,
        prediction: Prediction::read_without_sample(fields)?,
        noise,
    })
}

impl Compile for Kdpm2 {
    /// Two evaluations a step, and one in the last, which goes to zero at once.
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run, 0.0)?;
        let last = visited.timesteps.len() - 1;
        let mut planned = Vec::new();
        for (index, timestep, sigma, next) in visited.steps() {
            let way = self.way(sigma, next);
            let middle = if index == last { 0.0 } else { way.middle };
            let sample = Combination::from(Source::Sample)
                .plus_all(middle - sigma, &derivative(self.prediction, sigma));
            // The sigma of the noise in an image is the next one's in the middle, too.
            let mut evaluation = step(self.prediction, timestep, sigma, next, sample);
            if index < last {
                evaluation.stores =
                    vec![Store { slot: FIRST_SAMPLE, value: Source::Sample.into() }];
            }
            planned.push(evaluation);
            if index < last {
                let sample = Combination::from(Source::Stored(FIRST_SAMPLE))
                    .plus_all(way.down - sigma, &derivative(self.prediction, middle))
                    .plus(Source::Noise, way.up);
                let timestep = self.sigmas.timestep_of(middle);
                planned.push(step(self.prediction, timestep, middle, next, sample));
            }
        }
        Plan::new(visited.start(run), planned)
    }
}

impl Kdpm2 {
    fn way(&self, sigma: f64, next: f64) -> Way {
        match self.noise {
            AddedNoise::None => Way { middle: (sigma * next).sqrt(), down: next, up: 0.0 },
            AddedNoise::Ancestral => {
                let (square, next_square) = (sigma * sigma, next * next);
                let up = (next_square * (square - next_square) / square).sqrt();
                // The root of next² - up², and in the middle of the way there is just the next
                // sigma. diffusers has both but for the rounding of f32.
                Way { middle: next, down: next_square / sigma, up }
            }
        }
    }
}
