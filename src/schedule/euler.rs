//! Euler's method (Karras et al. 2022, algorithm 2 without churn), as diffusers'
//! `EulerDiscreteScheduler`; and what its ancestral variant shares with it.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps};
use super::training::{NoiseSchedule, interpolate};
use super::{Compile, Run};
use crate::Result;

pub(super) struct Euler {
    sigmas: TrainingSigmas,
    prediction: Prediction,
    final_sigma: f64,
}

pub(super) fn read(fields: &Fields) -> Result<Euler> {
    for flag in ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"] {
        fields.must_be(flag, false, false)?;
    }
    fields.choice("interpolation_type", (), &[("linear", ())])?;
    fields.choice("timestep_type", (), &[("discrete", ())])?;
    let sigmas = TrainingSigmas::read(fields)?;
    let known = [("zero", 0.0), ("sigma_min", sigmas.lowest())];
    Ok(Euler {
        prediction: Prediction::read(fields)?,
        final_sigma: fields.choice("final_sigmas_type", 0.0, &known)?,
        sigmas,
    })
}

impl Compile for Euler {
    fn compile(&self, run: &Run) -> Result<Plan> {
        self.sigmas.plan(run, self.final_sigma, self.prediction, |sigma, next| {
            Combination::from(Source::Sample)
                .plus_all(next - sigma, &derivative(self.prediction, sigma))
        })
    }
}

/// `(sample - original) / sigma`, where `sample = original + sigma * noise`.
pub(super) fn derivative(prediction: Prediction, sigma: f64) -> Combination {
    let sum = Combination::default();
    let variance = sigma * sigma + 1.0;
    match prediction {
        Prediction::Epsilon => Source::Output.into(),
        Prediction::Velocity => {
            sum.plus(Source::Sample, sigma / variance).plus(Source::Output, 1.0 / variance.sqrt())
        }
        Prediction::Sample => {
            sum.plus(Source::Sample, 1.0 / sigma).plus(Source::Output, -1.0 / sigma)
        }
    }
}

/// The sigmas of the training and which of them a run visits.
pub(super) struct TrainingSigmas {
    sigmas: Vec<f32>,
    timesteps: Timesteps,
}

impl TrainingSigmas {
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let timesteps = Timesteps::read(fields, Spacing::Linspace)?;
        Ok(Self { sigmas: NoiseSchedule::read_for_sigmas(fields)?.sigmas(), timesteps })
    }

    /// The sigma of timestep 0.
    fn lowest(&self) -> f64 {
        f64::from(self.sigmas[0])
    }

    /// A plan whose every step goes from one sigma to the next with `advance(sigma, next)`.
    pub(super) fn plan(
        &self,
        run: &Run,
        final_sigma: f64,
        prediction: Prediction,
        advance: impl Fn(f64, f64) -> Combination,
    ) -> Result<Plan> {
        let timesteps = self.timesteps.visit(self.sigmas.len(), run.steps);
        // torch keeps fractional timesteps in f32.
        let timesteps: Vec<f64> =
            timesteps.into_iter().map(|timestep| f64::from(timestep as f32)).collect();
        let mut sigmas: Vec<f64> =
            timesteps.iter().map(|timestep| interpolate(&self.sigmas, *timestep)).collect();
        sigmas.push(final_sigma);
        let highest = sigmas.iter().copied().fold(0.0, f64::max);
        let init_noise_sigma = match self.timesteps.spacing {
            Spacing::Linspace | Spacing::Trailing => highest,
            Spacing::Leading => (highest * highest + 1.0).sqrt(),
        };
        let timesteps = run.rest(timesteps)?;
        let sigmas = sigmas.split_off(sigmas.len() - timesteps.len() - 1);
        let noised = |sigma| Blend { original: 1.0, noise: sigma };
        let step = |(timestep, pair): (f64, &[f64])| Step {
            timestep,
            input_scale: 1.0 / (pair[0] * pair[0] + 1.0).sqrt(),
            stores: Vec::new(),
            sample: advance(pair[0], pair[1]),
            original: Combination::from(Source::Sample)
                .plus_all(-pair[0], &derivative(prediction, pair[0])),
            noised: noised(pair[1]),
        };
        Plan::new(
            run.start(init_noise_sigma, noised(sigmas[0])),
            timesteps.into_iter().zip(sigmas.windows(2)).map(step).collect(),
        )
    }
}
