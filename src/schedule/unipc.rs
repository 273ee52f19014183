//! UniPC (Zhao et al. 2023), a predictor and a corrector of orders 1 to 3, as diffusers'
//! `UniPCMultistepScheduler`: the output at the end of a step corrects that step, and then makes
//! the next one.

use super::config::Fields;
use super::dpm_solver::read_final_sigma;
use super::plan::{Combination, Plan, Source, Store};
use super::prediction::Prediction;
use super::solver::{FinalSigma, History, SolverSigmas, Visited};
use super::spacing::{Spacing, Timesteps};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct UniPc {
    sigmas: SolverSigmas,
    prediction: Prediction,
    target: Target,
    order: usize,
    scaling: Scaling,
    lower_order_final: bool,
    /// Places whose step is not corrected.
    disable_corrector: Vec<f64>,
}

/// `predict_x0`: of what the solver makes a polynomial.
#[derive(Clone, Copy)]
enum Target {
    Original,
    Noise,
}

/// `solver_type`: the paper's B(h).
#[derive(Clone, Copy)]
enum Scaling {
    /// h.
    Bh1,
    /// exp(h) - 1.
    Bh2,
}

pub(super) fn read(fields: &Fields) -> Result<UniPc> {
    fields.must_be("thresholding", false, false)?;
    for name in ["solver_p", "shift_terminal"] {
        fields.must_be_null(name)?;
    }
    // The names of other solvers are taken for its second one.
    let solvers = [
        ("bh1", Scaling::Bh1),
        ("bh2", Scaling::Bh2),
        ("midpoint", Scaling::Bh2),
        ("heun", Scaling::Bh2),
        ("logrho", Scaling::Bh2),
    ];
    let training = NoiseSchedule::read(fields, Betas::USUAL, Rescaling::AlmostToZero)?;
    let timesteps = Timesteps::read(fields, Spacing::Linspace)?;
    let final_sigma = match read_final_sigma(fields)? {
        FinalSigma::Zero => FinalSigma::Zero,
        FinalSigma::Lowest | FinalSigma::LowestOrLast => FinalSigma::LowestOrLast,
    };
    let predicts_original = fields.flag("predict_x0", true)?;
    Ok(UniPc {
        sigmas: SolverSigmas::read(fields, &training, timesteps, final_sigma)?,
        prediction: Prediction::read(fields)?,
        target: if predicts_original { Target::Original } else { Target::Noise },
        order: fields.integer("solver_order", 2, 1..=3)? as usize,
        scaling: fields.choice("solver_type", Scaling::Bh2, &solvers)?,
        lower_order_final: fields.flag("lower_order_final", true)?,
        disable_corrector: fields.numbers("disable_corrector")?.unwrap_or_default(),
    })
}

impl Compile for UniPc {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = self.sigmas.visit(run)?;
        let history = History { length: self.order };
        // The corrected sample with which the last step began.
        let start = self.order;
        visited.plan(run, |index| {
            let (alpha, sigma) = visited.alpha_sigma(index);
            let output = match self.target {
                Target::Original => self.prediction.original(alpha, sigma),
                Target::Noise => self.prediction.noise(alpha, sigma),
            };
            let earlier = |back: usize| Combination::from(history.before(index, back));
            let is_corrected =
                visited.done(index) > 0 && !self.disable_corrector.contains(&((index - 1) as f64));
            let sample = if is_corrected {
                let order = self.order_at(&visited, index - 1);
                let start = Source::Stored(start).into();
                let outputs: Vec<_> = (1..=order).map(earlier).collect();
                self.go(&visited, index - 1, start, &outputs, Some(&output))
            } else {
                Source::Sample.into()
            };
            let order = self.order_at(&visited, index);
            let mut outputs = vec![output.clone()];
            outputs.extend((1..order).map(earlier));
            let next = self.go(&visited, index, sample.clone(), &outputs, None);
            let stores = vec![history.store(index, output), Store { slot: start, value: sample }];
            visited.step(index, self.prediction, stores, next)
        })
    }
}

impl UniPc {
    fn order_at(&self, visited: &Visited, index: usize) -> usize {
        let left = if self.lower_order_final { visited.count() - index } else { self.order };
        self.order.min(left).min(visited.done(index) + 1)
    }

    /// Where the step from place `index` leads, from `sample` there, by the `outputs` there and
    /// before; the corrector also knows the one at the step's `end`.
    fn go(
        &self,
        visited: &Visited,
        index: usize,
        sample: Combination,
        outputs: &[Combination],
        end: Option<&Combination>,
    ) -> Combination {
        let ((alpha_from, sigma_from), (alpha_to, sigma_to)) =
            (visited.alpha_sigma(index), visited.alpha_sigma(index + 1));
        let length = visited.length(index, index + 1);
        let (ratio, factor, h) = match self.target {
            Target::Original => (sigma_to / sigma_from, -alpha_to, -length),
            Target::Noise => (alpha_to / alpha_from, -sigma_to, length),
        };
        let scale = match self.scaling {
            Scaling::Bh1 => h,
            Scaling::Bh2 => h.exp_m1(),
        };
        // Where outputs are, in steps from here, and their differences from the one here.
        let here = &outputs[0];
        let mut places: Vec<f64> =
            (1..outputs.len()).map(|back| -visited.length(index - back, index) / length).collect();
        let difference = |other: &Combination, place: f64| {
            Combination::default().plus_all(1.0 / place, other).plus_all(-1.0 / place, here)
        };
        let known = outputs[1..].iter().zip(&places);
        let mut differences: Vec<_> =
            known.map(|(other, place)| difference(other, *place)).collect();
        if let Some(end) = end {
            places.push(1.0);
            differences.push(difference(end, 1.0));
        }
        let weights = match places.as_slice() {
            // Not solved for, in both roles.
            [_] => vec![0.5],
            places => solve(places, &moments(h, scale, places.len())),
        };
        let sum =
            Combination::default().plus_all(ratio, &sample).plus_all(factor * h.exp_m1(), here);
        let terms = weights.iter().zip(&differences);
        terms.fold(sum, |sum, (weight, term)| sum.plus_all(factor * scale * weight, term))
    }
}

/// The right-hand side: n! times the n-th of the functions that the paper calls phi, less what
/// comes before it in the series of the exponential function, over B(h).
fn moments(h: f64, scale: f64, count: usize) -> Vec<f64> {
    let mut phi = h.exp_m1() / h - 1.0;
    let mut factorial = 1.0;
    let mut moments = Vec::with_capacity(count);
    for power in 1..=count {
        moments.push(phi * factorial / scale);
        factorial *= (power + 1) as f64;
        phi = phi / h - 1.0 / factorial;
    }
    moments
}

/// Weights whose sum, each times its place to the power of 0, 1, …, is each of the moments.
fn solve(places: &[f64], moments: &[f64]) -> Vec<f64> {
    let count = places.len();
    let mut rows: Vec<Vec<f64>> = (0..count)
        .map(|power| {
            let row = places.iter().map(|place| place.powi(power as i32));
            row.chain([moments[power]]).collect()
        })
        .collect();
    // Gauss and Jordan's elimination; at most three rows.
    for pivot in 0..count {
        let best =
            (pivot..count).max_by(|a, b| rows[*a][pivot].abs().total_cmp(&rows[*b][pivot].abs()));
        rows.swap(pivot, best.unwrap_or(pivot));
        let scaled: Vec<f64> = rows[pivot].iter().map(|value| value / rows[pivot][pivot]).collect();
        for row in rows.iter_mut() {
            let factor = row[pivot];
            row.iter_mut().zip(&scaled).for_each(|(value, scaled)| *value -= factor * scaled);
        }
        rows[pivot] = scaled;
    }
    rows.iter().map(|row| row[count]).collect()
}
