//! DDPM (Ho et al. 2020), as diffusers' `DDPMScheduler`: a draw from what the training's process
//! says of the timestep before. Noise is drawn in every step but the last, where diffusers draws a
//! share of 1e-10 that nothing sees.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps, round};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct Ddpm {
    training: NoiseSchedule,
    prediction: Prediction,
    timesteps: Timesteps,
    variance: Variance,
}

/// `variance_type`: how much noise a step adds.
#[derive(Clone, Copy)]
enum Variance {
    /// What is right where the original is known.
    Small,
    /// What is right where the original is noise.
    Large,
}

pub(super) fn read(fields: &Fields) -> Result<Ddpm> {
    fields.must_be("thresholding", false, false)?;
    fields.must_be("clip_sample", true, false)?;
    let small = Variance::Small;
    // The logarithm of the small one changes nothing; null is taken for it.
    let known =
        [("fixed_small", small), ("fixed_small_log", small), ("fixed_large", Variance::Large)];
    Ok(Ddpm {
        training: NoiseSchedule::read(fields, Betas::USUAL, Rescaling::ToZero)?,
        prediction: Prediction::read(fields)?,
        timesteps: Timesteps::read(fields, Spacing::Leading)?,
        variance: fields.choice_or_null("variance_type", small, &known)?,
    })
}

impl Compile for Ddpm {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let timesteps = round(self.timesteps.visit(self.training.len(), run.steps));
        let timesteps = run.rest(timesteps)?;
        let visited: Vec<i64> = timesteps.iter().map(|timestep| *timestep as i64).collect();
        let step = |(index, timestep): (usize, &i64)| self.step(*timestep, visited.get(index + 1));
        let steps = visited.iter().enumerate().map(step).collect::<Result<_>>()?;
        Plan::new(run.start(1.0, self.training.noised(visited[0])?), steps)
    }
}

impl Ddpm {
    fn step(&self, timestep: i64, next: Option<&i64>) -> Result<Step> {
        let alpha_cumprod = self.training.alpha_cumprod(timestep)?;
        let next_cumprod = next.map_or(Ok(1.0), |next| self.training.alpha_cumprod(*next))?;
        let (beta_cumprod, next_beta_cumprod) = (1.0 - alpha_cumprod, 1.0 - next_cumprod);
        let alpha = alpha_cumprod / next_cumprod;
        let beta = 1.0 - alpha;
        let variance = match (next, self.variance) {
            (None, Variance::Small | Variance::Large) => 0.0,
            (Some(_), Variance::Small) => next_beta_cumprod / beta_cumprod * beta,
            (Some(_), Variance::Large) => beta,
        };
        let original = self.prediction.original(alpha_cumprod.sqrt(), beta_cumprod.sqrt());
        let sample = Combination::default()
            .plus(Source::Sample, alpha.sqrt() * next_beta_cumprod / beta_cumprod)
            .plus_all(next_cumprod.sqrt() * beta / beta_cumprod, &original)
            .plus(Source::Noise, variance.sqrt());
        let noised = next.map_or(Ok(Blend::IMAGE), |next| self.training.noised(*next))?;
        let timestep = timestep as f64;
        Ok(Step { timestep, input_scale: 1.0, stores: Vec::new(), sample, original, noised })
    }
}
