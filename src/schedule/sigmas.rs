//! The sigmas that a run visits, and the derivative along them, for the schedulers whose sample is
//! `original + sigma * noise` (Karras et al. 2022): Euler's, Heun's and Adams' methods and DPM2.
//! Separate because they differ only in how they go from one sigma to the next.

use super::Run;
use super::config::Fields;
use super::plan::{Blend, Combination, Source, Step};
use super::prediction::Prediction;
use super::sigma_schedule::{Ends, SigmaSchedule, Spread, log_f32, timestep_of};
use super::spacing::{Spacing, Timesteps};
use super::training::{Betas, NoiseSchedule, Rescaling, interpolate};
use crate::Result;

/// The sigmas of the training and which of them a run visits.
pub(super) struct TrainingSigmas {
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
    timesteps: Timesteps,
    spread: Option<Spread>,
    karras_rounding: KarrasRounding,
}

/// What becomes of the timesteps of sigmas that are spaced as Karras et al. do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KarrasRounding {
    None,
    ToWholeTimesteps,
}

/// What a run visits.
pub(super) struct Visited {
    /// From noisy to clean.
    pub(super) timesteps: Vec<f64>,
    /// One more, to which the last step goes.
    pub(super) sigmas: Vec<f64>,
    /// The factor of the first noise.
    pub(super) init_noise_sigma: f64,
    /// How many come before the run begins.
    pub(super) skipped: usize,
}

impl TrainingSigmas {
    /// Of the classes that know `spread` sigmas or not.
    pub(super) fn read(
        fields: &Fields,
        betas: Betas,
        rescaling: Rescaling,
        spread: Option<Spread>,
        karras_rounding: KarrasRounding,
    ) -> Result<Self> {
        let timesteps = Timesteps::read(fields, Spacing::Linspace)?;
        let sigmas = NoiseSchedule::read(fields, betas, rescaling)?.sigmas();
        let log_sigmas = sigmas.iter().copied().map(log_f32).collect();
        Ok(Self { sigmas, log_sigmas, timesteps, spread, karras_rounding })
    }

    /// The sigma of timestep 0.
    pub(super) fn lowest(&self) -> f64 {
        f64::from(self.sigmas[0])
    }

    /// What a run visits that goes to `final_sigma`.
    pub(super) fn visit(&self, run: &Run, final_sigma: f64) -> Result<Visited> {
        let mut timesteps = to_f32(self.timesteps.visit(self.sigmas.len(), run.steps));
        let mut sigmas: Vec<f64> =
            timesteps.iter().map(|timestep| interpolate(&self.sigmas, *timestep)).collect();
        if let Some(spread) = &self.spread {
            let ends = Ends { first: sigmas[0], last: sigmas[sigmas.len() - 1] };
            sigmas = spread.sigmas(ends, run.steps);
            let timestep = |sigma: &f64| timestep_of(*sigma, &self.log_sigmas);
            timesteps = sigmas.iter().map(timestep).collect();
            let is_rounded = self.karras_rounding == KarrasRounding::ToWholeTimesteps;
            if is_rounded && spread.is(SigmaSchedule::Karras) {
                timesteps = super::spacing::round(timesteps);
            }
        }
        sigmas.push(final_sigma);
        let (timesteps, sigmas) = (to_f32(timesteps), to_f32(sigmas));
        let highest = sigmas.iter().copied().fold(0.0, f64::max);
        let init_noise_sigma = match self.timesteps.spacing {
            Spacing::Linspace | Spacing::Trailing => highest,
            Spacing::Leading => (highest * highest + 1.0).sqrt(),
        };
        let skipped = run.skipped(timesteps.len())?;
        Ok(Visited { timesteps, sigmas, init_noise_sigma, skipped })
    }

    /// The timestep of a sigma that lies between two of them.
    pub(super) fn timestep_of(&self, sigma: f64) -> f64 {
        f64::from(timestep_of(sigma, &self.log_sigmas) as f32)
    }
}

impl Visited {
    /// The steps that the run makes: their place, their timestep, and the sigmas from which and to
    /// which they go.
    pub(super) fn steps(&self) -> impl Iterator<Item = (usize, f64, f64, f64)> {
        let pairs = self.timesteps.iter().zip(self.sigmas.windows(2)).enumerate();
        pairs
            .map(|(index, (timestep, pair))| (index, *timestep, pair[0], pair[1]))
            .skip(self.skipped)
    }

    /// The first sample.
    pub(super) fn start(&self, run: &Run) -> Blend {
        run.start(self.init_noise_sigma, noised(self.sigmas[self.skipped]))
    }
}

/// torch keeps timesteps and sigmas in f32.
fn to_f32(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|value| f64::from(value as f32)).collect()
}

/// `add_noise` for a sigma.
pub(super) fn noised(sigma: f64) -> Blend {
    Blend { original: 1.0, noise: sigma }
}

/// The step that evaluates the model at a sigma and leaves `sample`, at the level of noise of
/// `next`.
pub(super) fn step(
    prediction: Prediction,
    timestep: f64,
    sigma: f64,
    next: f64,
    sample: Combination,
) -> Step {
    Step {
        timestep,
        input_scale: 1.0 / (sigma * sigma + 1.0).sqrt(),
        stores: Vec::new(),
        sample,
        original: Combination::from(Source::Sample)
            .plus_all(-sigma, &derivative(prediction, sigma)),
        noised: noised(next),
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
