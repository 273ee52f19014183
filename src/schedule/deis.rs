//! DEIS (Zhang and Chen 2022) in the logarithm of the sigmas, of orders 1 to 3, as diffusers'
//! `DEISMultistepScheduler`: the noise is taken for a polynomial in that logarithm.

use super::config::Fields;
use super::plan::{Combination, Plan, Source};
use super::prediction::Prediction;
use super::solver::{FEW_STEPS, FinalSigma, History, SolverSigmas, Visited};
use super::spacing::{Spacing, Timesteps};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct Deis {
    sigmas: SolverSigmas,
    prediction: Prediction,
    order: usize,
    lower_order_final: bool,
}

pub(super) fn read(fields: &Fields) -> Result<Deis> {
    fields.must_be("thresholding", false, false)?;
    // The names of other solvers are taken for its own.
    let algorithms = [("deis", ()), ("dpmsolver", ()), ("dpmsolver++", ())];
    fields.choice("algorithm_type", (), &algorithms)?;
    let solvers = ["logrho", "midpoint", "heun", "bh1", "bh2"].map(|name| (name, ()));
    fields.choice("solver_type", (), &solvers)?;
    let training = NoiseSchedule::read(fields, Betas::USUAL, Rescaling::Unknown)?;
    let timesteps = Timesteps::read(fields, Spacing::Linspace)?;
    Ok(Deis {
        sigmas: SolverSigmas::read(fields, &training, timesteps, FinalSigma::LowestOrLast)?,
        prediction: Prediction::read(fields)?,
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        lower_order_final: fields.flag("lower_order_final", true)?,
    })
}

impl Compile for Deis {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run)?;
        let history = History { length: (self.order - 1).max(1) };
        visited.plan(run, |index| {
            let (alpha, sigma) = visited.alpha_sigma(index);
            let noise = self.prediction.noise(alpha, sigma);
            let lowered = self.lower_order_final && visited.count() < FEW_STEPS;
            let left = if lowered { visited.count() - index } else { self.order };
            let order = self.order.min(left).min(visited.done(index) + 1);
            let (alpha_to, _) = visited.alpha_sigma(index + 1);
            let mut sample = Combination::default().plus(Source::Sample, alpha_to / alpha);
            for (back, weight) in weights(&visited, index, order).into_iter().enumerate() {
                sample = match back {
                    0 => sample.plus_all(alpha_to * weight, &noise),
                    back => sample.plus(history.before(index, back), alpha_to * weight),
                };
            }
            visited.step(index, self.prediction, vec![history.store(index, noise)], sample)
        })
    }
}

/// The weights of the noise of this step and the ones before it.
fn weights(visited: &Visited, index: usize, order: usize) -> Vec<f64> {
    let rho = |back: usize| visited.sigmas[index - back];
    let (from, to) = (rho(0), visited.sigmas[index + 1]);
    let log = |back: usize| rho(back).ln();
    match order {
        1 => vec![to - from],
        2 => {
            // The integral of ln(t / c) / ln(b / c).
            let integral =
                |t: f64, b: usize, c: usize| t * (t.ln() - log(c) - 1.0) / (log(b) - log(c));
            let weight = |b, c| integral(to, b, c) - integral(from, b, c);
            vec![weight(0, 1), weight(1, 0)]
        }
        _ => {
            // The integral of ln(t / c) ln(t / d) / (ln(b / c) ln(b / d)).
            let integral = |t: f64, b: usize, c: usize, d: usize| {
                let (t_log, c, d) = (t.ln(), log(c), log(d));
                let product = (t_log - c) * (t_log - d) - 2.0 * t_log + c + d + 2.0;
                t * product / ((log(b) - c) * (log(b) - d))
            };
            let weight = |b, c, d| integral(to, b, c, d) - integral(from, b, c, d);
            vec![weight(0, 1, 2), weight(1, 2, 0), weight(2, 0, 1)]
        }
    }
}
