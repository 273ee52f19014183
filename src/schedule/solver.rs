//! What the solvers have in common that think in `alpha * original + sigma * noise` with
//! `alpha² + sigma² = 1` and step in the logarithm of `alpha / sigma`: DPM-Solver++, DEIS, UniPC.
//! Separate because they visit the same timesteps, and their histories work alike.

use super::Run;
use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step, Store};
use super::prediction::Prediction;
use super::sigma_schedule::{Ends, SigmaSchedule, Spread, log_f32, timestep_of};
use super::spacing::{Timesteps, round};
use super::training::{NoiseSchedule, interpolate};
use crate::{Error, Result};

/// Below this many steps `lower_order_final` lowers the order of the last ones.
pub(super) const FEW_STEPS: usize = 15;

/// The sigmas of the training (`sigma / alpha`) and which of them a run visits.
pub(super) struct SolverSigmas {
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
    /// The training timesteps whose lambda is above `lambda_min_clipped`.
    last_timestep: usize,
    timesteps: Timesteps,
    spread: Option<Spread>,
    /// Whether Karras' timesteps are rounded before they are cut to whole ones.
    rounds_karras: bool,
    final_sigma: FinalSigma,
}

/// To which sigma the last step goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FinalSigma {
    Zero,
    /// The lowest of the training.
    Lowest,
    /// The lowest of the training, but from spread sigmas the last one of them, once more.
    LowestOrLast,
}

/// What a run visits.
pub(super) struct Visited {
    /// Steps that were asked for, and the timesteps there are for them.
    steps: usize,
    available: usize,
    /// From noisy to clean.
    pub(super) timesteps: Vec<f64>,
    /// One more, to which the last step goes.
    pub(super) sigmas: Vec<f64>,
    /// How many come before the run begins.
    pub(super) skipped: usize,
}

impl SolverSigmas {
    /// Reads how they are spread; the rest is each class's own.
    pub(super) fn read(
        fields: &Fields,
        training: &NoiseSchedule,
        timesteps: Timesteps,
        final_sigma: FinalSigma,
    ) -> Result<Self> {
        for flag in ["use_flow_sigmas", "use_dynamic_shifting"] {
            fields.must_be(flag, false, false)?;
        }
        let sigmas = training.sigmas();
        Ok(Self {
            last_timestep: sigmas.len(),
            log_sigmas: sigmas.iter().copied().map(log_f32).collect(),
            sigmas,
            timesteps,
            spread: Spread::read(fields)?,
            rounds_karras: true,
            final_sigma,
        })
    }

    /// As `DPMSolverMultistepScheduler` has it, which keeps the fractions of Karras' timesteps for
    /// a moment where the betas are those of a cosine.
    pub(super) fn rounding_karras(self, rounds_karras: bool) -> Self {
        Self { rounds_karras, ..self }
    }

    /// Without the timesteps below `lambda_min_clipped`, which it reads.
    pub(super) fn clipped(self, fields: &Fields) -> Result<Self> {
        // lambda = ln(alpha / sigma) falls with the timestep.
        let lambda_min = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        let lambda = |sigma: &f32| (-f64::from(*sigma).ln()) as f32;
        let clipped = self.sigmas.iter().rev();
        let clipped = clipped.take_while(|sigma| f64::from(lambda(sigma)) < lambda_min).count();
        let last_timestep = self.sigmas.len() - clipped;
        if last_timestep == 0 || lambda_min.is_nan() {
            let message = format!("lambda_min_clipped {lambda_min} leaves no timestep");
            return Err(fields.refuse(message));
        }
        Ok(Self { last_timestep, ..self })
    }

    /// What a run visits.
    pub(super) fn visit(&self, run: &Run) -> Result<Visited> {
        let (train, steps) = (self.sigmas.len(), run.steps);
        let lowest = f64::from(self.sigmas[0]);
        let (mut timesteps, mut sigmas): (Vec<f64>, Vec<f64>);
        if let Some(spread) = &self.spread {
            let ends = Ends { first: f64::from(self.sigmas[train - 1]), last: lowest };
            sigmas = spread.sigmas(ends, steps);
            timesteps = sigmas.iter().map(|sigma| timestep_of(*sigma, &self.log_sigmas)).collect();
            if self.rounds_karras && spread.is(SigmaSchedule::Karras) {
                timesteps = round(timesteps);
            }
            timesteps.iter_mut().for_each(|timestep| *timestep = timestep.trunc());
        } else {
            timesteps = self.timesteps.visit_above_lowest(train, self.last_timestep, steps);
            sigmas =
                timesteps.iter().map(|timestep| interpolate(&self.sigmas, *timestep)).collect();
        }
        sigmas.push(match self.final_sigma {
            FinalSigma::Zero => 0.0,
            FinalSigma::LowestOrLast if self.spread.is_some() => sigmas[sigmas.len() - 1],
            FinalSigma::Lowest | FinalSigma::LowestOrLast => lowest,
        });
        // torch keeps them in f32.
        sigmas.iter_mut().for_each(|sigma| *sigma = f64::from(*sigma as f32));
        if timesteps.len() > 1 && timesteps[0] == timesteps[1] {
            return Err(Error::usage(format!(
                "--steps {steps} are too many for {} timesteps with this spacing",
                self.last_timestep
            )));
        }
        let skipped = run.skipped(timesteps.len())?;
        let available = self.last_timestep;
        Ok(Visited { steps, available, timesteps, sigmas, skipped })
    }

    /// Whether the last step goes to no noise at all.
    pub(super) fn ends_at_zero(&self) -> bool {
        self.final_sigma == FinalSigma::Zero
    }
}

impl Visited {
    /// Steps of the whole schedule.
    pub(super) fn count(&self) -> usize {
        self.timesteps.len()
    }

    /// The plan of a step for each place in the schedule from where the run begins.
    pub(super) fn plan(&self, run: &Run, step: impl FnMut(usize) -> Step) -> Result<Plan> {
        let planned = (self.skipped..self.count()).map(step).collect();
        let plan = Plan::new(run.start(1.0, noised(self.sigmas[self.skipped])), planned);
        let twice = self.timesteps.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        plan.map_err(|error| match twice {
            // diffusers accepts it and gives pictures of NaN.
            Some(timestep) => Error::usage(format!(
                "--steps {} are too many for {} timesteps with this spacing: timestep {timestep} \
                 would come twice in a row, which this scheduler cannot compute; try fewer --steps \
                 or another --scheduler",
                self.steps, self.available
            )),
            None => error,
        })
    }

    /// The step in this place, which leaves `sample` and keeps `stores`.
    pub(super) fn step(
        &self,
        index: usize,
        prediction: Prediction,
        stores: Vec<Store>,
        sample: Combination,
    ) -> Step {
        let (alpha, sigma) = self.alpha_sigma(index);
        Step {
            timestep: self.timesteps[index],
            input_scale: 1.0,
            stores,
            sample,
            original: prediction.original(alpha, sigma),
            noised: noised(self.sigmas[index + 1]),
        }
    }

    /// `sample = alpha * original + sigma * noise` in this place.
    pub(super) fn alpha_sigma(&self, index: usize) -> (f64, f64) {
        alpha_sigma(self.sigmas[index])
    }

    /// From one place to another in the logarithm of `alpha / sigma`; infinite where the other one
    /// has no noise.
    pub(super) fn length(&self, from: usize, to: usize) -> f64 {
        (self.sigmas[from] / self.sigmas[to]).ln()
    }

    /// How many steps the run made before this place.
    pub(super) fn done(&self, index: usize) -> usize {
        index - self.skipped
    }
}

/// `sample = alpha * original + sigma * noise` for `sigma / alpha` given.
fn alpha_sigma(sigma: f64) -> (f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

/// `add_noise` for `sigma / alpha`.
fn noised(sigma: f64) -> Blend {
    let (original, noise) = alpha_sigma(sigma);
    Blend { original, noise }
}

/// A ring of what the last steps computed, in the slots from 0.
#[derive(Clone, Copy)]
pub(super) struct History {
    /// How many steps' values are kept.
    pub(super) length: usize,
}

impl History {
    /// What step `index` keeps.
    pub(super) fn store(self, index: usize, value: Combination) -> Store {
        Store { slot: index % self.length, value }
    }

    /// What was kept `back` steps before step `index`, from 1 to the length.
    pub(super) fn before(self, index: usize, back: usize) -> Source {
        Source::Stored((index - back) % self.length)
    }
}
