//! DPM-Solver++ (Lu et al. 2022), the multistep form of orders 1 to 3, as diffusers'
//! `DPMSolverMultistepScheduler` with `algorithm_type` dpmsolver++ or sde-dpmsolver++; and the
//! weights that its single-step form shares.

use super::config::Fields;
use super::plan::{Combination, Plan, Source};
use super::prediction::Prediction;
use super::solver::{FEW_STEPS, FinalSigma, History, SolverSigmas, Visited};
use super::spacing::{Spacing, Timesteps};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct DpmSolver {
    sigmas: SolverSigmas,
    prediction: Prediction,
    algorithm: Algorithm,
    order: usize,
    second_order: SecondOrder,
    lower_order_final: bool,
    euler_at_final: bool,
}

/// `algorithm_type`: the differential equation that is solved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Ordinary,
    Stochastic,
}

/// `solver_type`: how the second order weighs the difference of two originals.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum SecondOrder {
    Midpoint,
    Heun,
}

impl Algorithm {
    /// The ones that predict the original. DEIS's name is taken for the first.
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let known = [
            ("dpmsolver++", Self::Ordinary),
            ("sde-dpmsolver++", Self::Stochastic),
            ("deis", Self::Ordinary),
        ];
        fields.choice("algorithm_type", Self::Ordinary, &known)
    }
}

impl SecondOrder {
    /// DEIS's and UniPC's solvers are taken for the midpoint.
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let solvers = [
            ("midpoint", Self::Midpoint),
            ("heun", Self::Heun),
            ("logrho", Self::Midpoint),
            ("bh1", Self::Midpoint),
            ("bh2", Self::Midpoint),
        ];
        fields.choice("solver_type", Self::Midpoint, &solvers)
    }
}

/// `final_sigmas_type`.
pub(super) fn read_final_sigma(fields: &Fields) -> Result<FinalSigma> {
    let known = [("zero", FinalSigma::Zero), ("sigma_min", FinalSigma::Lowest)];
    fields.choice("final_sigmas_type", FinalSigma::Zero, &known)
}

pub(super) fn read(fields: &Fields) -> Result<DpmSolver> {
    for flag in ["thresholding", "use_lu_lambdas"] {
        fields.must_be(flag, false, false)?;
    }
    fields.must_not_be("variance_type", &["learned", "learned_range"])?;
    let training = NoiseSchedule::read(fields, Betas::USUAL, Rescaling::AlmostToZero)?;
    let timesteps = Timesteps::read(fields, Spacing::Linspace)?;
    let is_cosine = fields.is("beta_schedule", "squaredcos_cap_v2");
    let sigmas = SolverSigmas::read(fields, &training, timesteps, read_final_sigma(fields)?)?;
    Ok(DpmSolver {
        sigmas: sigmas.rounding_karras(!is_cosine).clipped(fields)?,
        prediction: Prediction::read(fields)?,
        algorithm: Algorithm::read(fields)?,
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        second_order: SecondOrder::read(fields)?,
        lower_order_final: fields.flag("lower_order_final", true)?,
        euler_at_final: fields.flag("euler_at_final", false)?,
    })
}

impl Compile for DpmSolver {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run)?;
        let history = History { length: (self.order - 1).max(1) };
        visited.plan(run, |index| {
            let (alpha, sigma) = visited.alpha_sigma(index);
            let original = self.prediction.original(alpha, sigma);
            let order = self.order_at(index, visited.count()).min(visited.done(index) + 1);
            let earlier = |back: usize| history.before(index, back);
            let sample = self.advance(&visited, index, order, &original, earlier);
            let stores = vec![history.store(index, original)];
            visited.step(index, self.prediction, stores, sample)
        })
    }
}

impl DpmSolver {
    /// The order of step `index` of `count` if enough steps came before: it may fall at the end.
    fn order_at(&self, index: usize, count: usize) -> usize {
        let lowered = self.lower_order_final && count < FEW_STEPS;
        let at_end =
            index + 1 == count && (self.euler_at_final || lowered || self.sigmas.ends_at_zero());
        let order = if at_end {
            1
        } else if index + 2 == count && lowered {
            2
        } else {
            3
        };
        order.min(self.order)
    }

    /// The next sample; `original` is what this step predicts and `earlier(1)`, `earlier(2)` what
    /// the last steps did.
    fn advance(
        &self,
        visited: &Visited,
        index: usize,
        order: usize,
        original: &Combination,
        earlier: impl Fn(usize) -> Source,
    ) -> Combination {
        let weights = Weights::new(visited, index, index + 1, self.algorithm);
        let ratio =
            |older: usize| visited.length(index - older, index + 1 - older) / weights.length;
        let sum = weights.first_order(Source::Sample, original);
        match order {
            1 => sum,
            2 => {
                let weight = weights.second(self.second_order) / ratio(1);
                sum.plus_all(weight, original).plus(earlier(1), -weight)
            }
            _ => {
                let (r0, r1) = (ratio(1), ratio(2));
                // D1 = d0 + r0/(r0+r1) (d0 - d1), D2 = (d0 - d1)/(r0+r1), with
                // d0 = (m0 - m1)/r0 and d1 = (m1 - m2)/r1.
                let second = weights.second(SecondOrder::Heun);
                let bend = (second * r0 + weights.third) / (r0 + r1);
                let (d0, d1) = ((second + bend) / r0, -bend / r1);
                sum.plus_all(d0, original).plus(earlier(1), d1 - d0).plus(earlier(2), -d1)
            }
        }
    }
}

/// The weights of a step's summands.
pub(super) struct Weights {
    sample: f64,
    /// Of the original.
    first: f64,
    /// Of its first derivative, with [`SecondOrder::Heun`].
    heun: f64,
    /// Of its second derivative.
    pub(super) third: f64,
    noise: f64,
    /// Of the step, in the logarithm of `alpha / sigma`.
    pub(super) length: f64,
}

impl Weights {
    /// Of a step between two places.
    pub(super) fn new(visited: &Visited, from: usize, to: usize, algorithm: Algorithm) -> Self {
        let ((alpha, sigma_to), (_, sigma_from)) =
            (visited.alpha_sigma(to), visited.alpha_sigma(from));
        // exp(-h), where h = lambda_to - lambda_from.
        let decay = visited.sigmas[to] / visited.sigmas[from];
        let h = -decay.ln();
        match algorithm {
            Algorithm::Ordinary => Self {
                sample: sigma_to / sigma_from,
                first: -alpha * (decay - 1.0),
                heun: alpha * ((decay - 1.0) / h + 1.0),
                third: -alpha * ((decay - 1.0 + h) / (h * h) - 0.5),
                noise: 0.0,
                length: h,
            },
            Algorithm::Stochastic => {
                let (square, twice) = (decay * decay, 2.0 * h);
                Self {
                    sample: sigma_to / sigma_from * decay,
                    first: alpha * (1.0 - square),
                    heun: alpha * ((1.0 - square) / -twice + 1.0),
                    third: alpha * ((1.0 - square - twice) / (twice * twice) - 0.5),
                    noise: sigma_to * (1.0 - square).sqrt(),
                    length: h,
                }
            }
        }
    }

    /// What every order has: the sample that the step begins with, the original, and noise.
    pub(super) fn first_order(&self, sample: Source, original: &Combination) -> Combination {
        Combination::default()
            .plus(sample, self.sample)
            .plus_all(self.first, original)
            .plus(Source::Noise, self.noise)
    }

    /// Of the original's first derivative.
    pub(super) fn second(&self, order: SecondOrder) -> f64 {
        match order {
            SecondOrder::Midpoint => 0.5 * self.first,
            SecondOrder::Heun => self.heun,
        }
    }
}
