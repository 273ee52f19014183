//! DPM-Solver++ (Lu et al. 2022), the single-step form of orders 1 to 3, as diffusers'
//! `DPMSolverSinglestepScheduler`: steps come in groups as long as the order, and all steps of a
//! group go from the sample with which it began.

use super::config::Fields;
use super::dpm_solver::{Algorithm, SecondOrder, Weights, read_final_sigma};
use super::plan::{Combination, Plan, Source, Store};
use super::prediction::Prediction;
use super::solver::{History, SolverSigmas, Visited};
use super::spacing::Timesteps;
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

/// The slot of the sample with which a group began, after those of the originals.
const FIRST_SAMPLE: usize = HISTORY.length;
const HISTORY: History = History { length: 2 };

pub(super) struct DpmSinglestep {
    sigmas: SolverSigmas,
    prediction: Prediction,
    algorithm: Algorithm,
    order: usize,
    second_order: SecondOrder,
    lower_order_final: bool,
}

pub(super) fn read(fields: &Fields) -> Result<DpmSinglestep> {
    fields.must_be("thresholding", false, false)?;
    fields.must_not_be("variance_type", &["learned", "learned_range"])?;
    let training = NoiseSchedule::read(fields, Betas::USUAL, Rescaling::Unknown)?;
    let final_sigma = read_final_sigma(fields)?;
    let sigmas = SolverSigmas::read(fields, &training, Timesteps::LINSPACE, final_sigma)?;
    Ok(DpmSinglestep {
        sigmas: sigmas.clipped(fields)?,
        prediction: Prediction::read(fields)?,
        algorithm: Algorithm::read(fields)?,
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        second_order: SecondOrder::read(fields)?,
        lower_order_final: fields.flag("lower_order_final", false)?,
    })
}

impl Compile for DpmSinglestep {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run)?;
        let orders = self.orders(run.steps);
        visited.plan(run, |index| {
            let (alpha, sigma) = visited.alpha_sigma(index);
            let original = self.prediction.original(alpha, sigma);
            // A run that begins in the middle of a group begins a new one.
            let order = orders[index].min(visited.done(index) + 1);
            let sample = self.advance(&visited, index, order, &original);
            let mut stores = vec![HISTORY.store(index, original)];
            if order == 1 {
                stores.push(Store { slot: FIRST_SAMPLE, value: Source::Sample.into() });
            }
            visited.step(index, self.prediction, stores, sample)
        })
    }
}

impl DpmSinglestep {
    /// The order of each step, which is its place in its group.
    fn orders(&self, steps: usize) -> Vec<usize> {
        let order = self.order;
        let ends_at_zero = self.sigmas.ends_at_zero();
        let is_whole = steps.is_multiple_of(order);
        let mut orders: Vec<usize> = (0..steps).map(|index| index % order + 1).collect();
        // Where the last group is whole, lower_order_final makes it [1, 2, 1] or [1, 1].
        let is_lowered = ends_at_zero || self.lower_order_final && is_whole;
        if let (true, Some(last)) = (is_lowered, orders.last_mut()) {
            *last = 1;
        }
        orders
    }

    /// The next sample; `original` is what this step, the last of its group, predicts.
    fn advance(
        &self,
        visited: &Visited,
        index: usize,
        order: usize,
        original: &Combination,
    ) -> Combination {
        let first = index + 1 - order;
        let weights = Weights::new(visited, first, index + 1, self.algorithm);
        let ratio = |place: usize| visited.length(first, place) / weights.length;
        let earlier = |back: usize| HISTORY.before(index, back);
        let start = Source::Stored(FIRST_SAMPLE);
        match order {
            1 => weights.first_order(Source::Sample, original),
            2 => {
                let weight = weights.second(self.second_order) / ratio(index);
                let sum = weights.first_order(start, &earlier(1).into());
                sum.plus_all(weight, original).plus(earlier(1), -weight)
            }
            _ => {
                let (r0, r1) = (ratio(index), ratio(index - 1));
                let second = weights.second(SecondOrder::Heun);
                // Of d0 = (m1 - m2)/r1 and d1 = (m0 - m2)/r0: the derivative is d1 by itself, or
                // (r0 d0 - r1 d1)/(r0 - r1), and then the second one is 2 (d1 - d0)/(r0 - r1).
                let (d0, d1) = match self.second_order {
                    SecondOrder::Midpoint => (0.0, second / r0),
                    SecondOrder::Heun => {
                        let gap = r0 - r1;
                        let d0 = (second * r0 - 2.0 * weights.third) / gap;
                        let d1 = (2.0 * weights.third - second * r1) / gap;
                        (d0 / r1, d1 / r0)
                    }
                };
                let sum = weights.first_order(start, &earlier(2).into());
                sum.plus_all(d1, original).plus(earlier(1), d0).plus(earlier(2), -d0 - d1)
            }
        }
    }
}
