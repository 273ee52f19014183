//! DPM-Solver++ (Lu et al. 2022), the multistep form of orders 1 to 3, as diffusers'
//! `DPMSolverMultistepScheduler` with `algorithm_type` dpmsolver++.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step, Store};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps};
use super::training::{NoiseSchedule, interpolate};
use super::{Compile, Run};
use crate::{Error, Result};

pub(super) struct DpmSolver {
    sigmas: Vec<f32>,
    /// The training timesteps whose lambda is above `lambda_min_clipped`.
    last_timestep: usize,
    timesteps: Timesteps,
    prediction: Prediction,
    order: usize,
    second_order: SecondOrder,
    lower_order_final: bool,
    euler_at_final: bool,
    final_sigma: f64,
}

/// `solver_type`: how the second order weighs the difference of two originals.
#[derive(Clone, Copy)]
enum SecondOrder {
    Midpoint,
    Heun,
}

/// Below this many steps `lower_order_final` lowers the order of the last ones.
const FEW_STEPS: usize = 15;

pub(super) fn read(fields: &Fields) -> Result<DpmSolver> {
    for flag in [
        "thresholding",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "use_dynamic_shifting",
    ] {
        fields.must_be(flag, false, false)?;
    }
    fields.must_not_be("variance_type", &["learned", "learned_range"])?;
    fields.choice("algorithm_type", (), &[("dpmsolver++", ())])?;
    // The class takes DEIS's and UniPC's solvers for the midpoint.
    let solvers = [
        ("midpoint", SecondOrder::Midpoint),
        ("heun", SecondOrder::Heun),
        ("logrho", SecondOrder::Midpoint),
        ("bh1", SecondOrder::Midpoint),
        ("bh2", SecondOrder::Midpoint),
    ];
    let sigmas = NoiseSchedule::read_for_sigmas(fields)?.sigmas();
    // lambda = ln(alpha / sigma) falls with the timestep.
    let lambda_min = fields.number("lambda_min_clipped", f64::NEG_INFINITY)?;
    let lambda = |sigma: &f32| (-f64::from(*sigma).ln()) as f32;
    let clipped = sigmas.iter().rev().take_while(|sigma| f64::from(lambda(sigma)) < lambda_min);
    let last_timestep = sigmas.len() - clipped.count();
    if last_timestep == 0 || lambda_min.is_nan() {
        return Err(fields.refuse(format!("lambda_min_clipped {lambda_min} leaves no timestep")));
    }
    let final_sigmas = [("zero", 0.0), ("sigma_min", f64::from(sigmas[0]))];
    Ok(DpmSolver {
        last_timestep,
        timesteps: Timesteps::read(fields, Spacing::Linspace)?,
        prediction: Prediction::read(fields)?,
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        second_order: fields.choice("solver_type", SecondOrder::Midpoint, &solvers)?,
        lower_order_final: fields.flag("lower_order_final", true)?,
        euler_at_final: fields.flag("euler_at_final", false)?,
        final_sigma: fields.choice("final_sigmas_type", 0.0, &final_sigmas)?,
        sigmas,
    })
}

impl Compile for DpmSolver {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let (train, steps) = (self.sigmas.len(), run.steps);
        let timesteps = self.timesteps.visit_above_lowest(train, self.last_timestep, steps);
        if timesteps.len() > 1 && timesteps[0] == timesteps[1] {
            return Err(Error::usage(format!(
                "--steps {steps} are too many for {} timesteps with this spacing",
                self.last_timestep
            )));
        }
        let mut sigmas: Vec<f64> =
            timesteps.iter().map(|timestep| interpolate(&self.sigmas, *timestep)).collect();
        sigmas.push(self.final_sigma);
        let count = timesteps.len();
        let skipped = run.skipped(count)?;
        let noised = |index: usize| {
            let (original, noise) = alpha_sigma(sigmas[index]);
            Blend { original, noise }
        };
        let ring = (self.order - 1).max(1);
        let step = |(index, timestep): (usize, f64)| {
            let (alpha, sigma) = alpha_sigma(sigmas[index]);
            let original = self.prediction.original(alpha, sigma);
            let order = self.order_at(index, count).min(index - skipped + 1);
            let earlier = |back: usize| Source::Stored((index - back) % ring);
            let sample = self.advance(&sigmas[..index + 2], order, &original, earlier);
            let stores = vec![Store { slot: index % ring, value: original.clone() }];
            let noised = noised(index + 1);
            Step { timestep, input_scale: 1.0, stores, sample, original, noised }
        };
        let planned = timesteps.iter().copied().enumerate().skip(skipped).map(step).collect();
        let plan = Plan::new(run.start(1.0, noised(skipped)), planned);
        let twice = timesteps.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        plan.map_err(|error| match twice {
            // diffusers accepts it and gives pictures of NaN.
            Some(timestep) => Error::usage(format!(
                "--steps {steps} are too many for {} timesteps with this spacing: timestep \
                 {timestep} would come twice in a row, which this scheduler cannot compute; try \
                 fewer --steps or another --scheduler",
                self.last_timestep
            )),
            None => error,
        })
    }
}

impl DpmSolver {
    /// The order of step `index` of `count` if enough steps came before: it may fall at the end.
    fn order_at(&self, index: usize, count: usize) -> usize {
        let lowered = self.lower_order_final && count < FEW_STEPS;
        let at_end =
            index + 1 == count && (self.euler_at_final || lowered || self.final_sigma == 0.0);
        let order = if at_end {
            1
        } else if index + 2 == count && lowered {
            2
        } else {
            3
        };
        order.min(self.order)
    }

    /// The next sample. `sigmas` ends with this step's and the next one's; `original` is what this
    /// step predicts and `earlier(1)`, `earlier(2)` what the last steps did.
    fn advance(
        &self,
        sigmas: &[f64],
        order: usize,
        original: &Combination,
        earlier: impl Fn(usize) -> Source,
    ) -> Combination {
        let back = |steps: usize| sigmas[sigmas.len() - 1 - steps];
        let ((alpha_to, sigma_to), (_, sigma_from)) = (alpha_sigma(back(0)), alpha_sigma(back(1)));
        // exp(-h), where h = lambda_to - lambda_from = ln(sigma_from / sigma_to).
        let decay = back(0) / back(1);
        let h = -decay.ln();
        let step_between = |older: usize| (back(older) / back(older - 1)).ln() / h;
        let first = -alpha_to * (decay - 1.0);
        let second = match self.second_order {
            SecondOrder::Midpoint if order == 2 => 0.5 * first,
            SecondOrder::Midpoint | SecondOrder::Heun => alpha_to * ((decay - 1.0) / h + 1.0),
        };
        let sum = Combination::default()
            .plus(Source::Sample, sigma_to / sigma_from)
            .plus_all(first, original);
        match order {
            1 => sum,
            2 => {
                let weight = second / step_between(2);
                sum.plus_all(weight, original).plus(earlier(1), -weight)
            }
            _ => {
                let third = -alpha_to * ((decay - 1.0 + h) / (h * h) - 0.5);
                let (r0, r1) = (step_between(2), step_between(3));
                // D1 = d0 + r0/(r0+r1) (d0 - d1), D2 = (d0 - d1)/(r0+r1), with
                // d0 = (m0 - m1)/r0 and d1 = (m1 - m2)/r1.
                let bend = (second * r0 + third) / (r0 + r1);
                let (d0, d1) = ((second + bend) / r0, -bend / r1);
                sum.plus_all(d0, original).plus(earlier(1), d1 - d0).plus(earlier(2), -d1)
            }
        }
    }
}

/// `sample = alpha * original + sigma * noise` for `sigma / alpha` given.
fn alpha_sigma(sigma: f64) -> (f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}
