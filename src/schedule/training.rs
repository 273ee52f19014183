//! The noise schedule of the training: `alphas_cumprod` from the betas of the configuration.
//! Separate because every scheduler starts from it. diffusers computes it in torch's f32, and so
//! do we, rounding where torch rounds.

use super::config::Fields;
use super::plan::Blend;
use crate::{Error, Result};

/// The most training timesteps that a configuration may ask for.
const TRAIN_TIMESTEPS_MAX: i64 = 100_000;

/// The smallest positive f16: diffusers' stand-in for the zero of a schedule of zero terminal SNR
/// where a sigma is computed from it.
const ALMOST_ZERO: f32 = 5.960_464_5e-8;

/// How much of the original is left at each training timestep.
#[derive(Debug, Clone)]
pub(super) struct NoiseSchedule {
    /// Not empty; the product of `1 - beta` up to each timestep, in f32 as torch has it.
    alphas_cumprod: Vec<f32>,
}

/// `beta_schedule`.
#[derive(Clone, Copy)]
pub(super) enum BetaSchedule {
    Linear,
    ScaledLinear,
    SquaredCosine,
}

/// The betas of a class whose configuration sets none.
#[derive(Clone, Copy)]
pub(super) struct Betas {
    start: f64,
    end: f64,
    schedule: BetaSchedule,
}

impl Betas {
    /// Of most classes.
    pub(super) const USUAL: Self = Self { start: 0.0001, end: 0.02, ..Self::NARROW };
    /// Of Heun's method and DPM2.
    pub(super) const NARROW: Self =
        Self { start: 0.00085, end: 0.012, schedule: BetaSchedule::Linear };
    /// Of LCM and TCD: Stable Diffusion's.
    pub(super) const STABLE: Self = Self { schedule: BetaSchedule::ScaledLinear, ..Self::NARROW };
}

/// What a class makes of `rescale_betas_zero_snr`. One without that parameter does not see what
/// another class's configuration says, as in diffusers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rescaling {
    /// Nothing.
    Unknown,
    /// Nothing of the original is left at the last timestep.
    ToZero,
    /// Of its square 2^-24 is left, so that the first sigma is finite.
    AlmostToZero,
}

impl NoiseSchedule {
    /// Reads the betas.
    pub(super) fn read(fields: &Fields, default: Betas, rescaling: Rescaling) -> Result<Self> {
        let mut betas = betas(fields, default)?;
        let is_rescaled =
            rescaling != Rescaling::Unknown && fields.flag("rescale_betas_zero_snr", false)?;
        if is_rescaled {
            rescale_zero_terminal_snr(&mut betas);
        }
        let mut alphas_cumprod = cumulative_product(betas.iter().map(|beta| 1.0 - beta));
        if let (true, Rescaling::AlmostToZero, Some(last)) =
            (is_rescaled, rescaling, alphas_cumprod.last_mut())
        {
            *last = ALMOST_ZERO;
        }
        Ok(Self { alphas_cumprod })
    }

    /// `num_train_timesteps`.
    pub(super) fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `alphas_cumprod[timestep]`.
    ///
    /// # Errors
    /// A timestep beyond the training's, where so many steps are wanted that the spacing's offset
    /// or rounding leads there.
    pub(super) fn alpha_cumprod(&self, timestep: i64) -> Result<f64> {
        let index = usize::try_from(timestep).ok();
        let alpha = index.and_then(|index| self.alphas_cumprod.get(index));
        alpha.map(|alpha| f64::from(*alpha)).ok_or_else(|| {
            Error::usage(format!(
                "timestep {timestep} is not among the training's {}; try fewer --steps",
                self.len()
            ))
        })
    }

    /// `alphas_cumprod[timestep]`, and below the first timestep what `set_alpha_to_one` says.
    pub(super) fn alpha_cumprod_or_final(&self, timestep: i64, alpha_one: bool) -> Result<f64> {
        match timestep {
            ..0 if alpha_one => Ok(1.0),
            timestep => self.alpha_cumprod(timestep.max(0)),
        }
    }

    /// `add_noise` at a timestep.
    ///
    /// # Errors
    /// As [`alpha_cumprod`](Self::alpha_cumprod).
    pub(super) fn noised(&self, timestep: i64) -> Result<Blend> {
        let alpha = self.alpha_cumprod(timestep)?;
        Ok(Blend { original: alpha.sqrt(), noise: (1.0 - alpha).sqrt() })
    }

    /// `sqrt((1 - alphas_cumprod) / alphas_cumprod)` of every training timestep, in f32.
    pub(super) fn sigmas(&self) -> Vec<f32> {
        self.alphas_cumprod.iter().map(|alpha| ((1.0 - alpha) / alpha).sqrt()).collect()
    }
}

/// Reads `num_train_timesteps`.
pub(super) fn num_train_timesteps(fields: &Fields) -> Result<usize> {
    Ok(fields.integer("num_train_timesteps", 1000, 1..=TRAIN_TIMESTEPS_MAX)? as usize)
}

/// `np.interp(timestep, arange(len(sigmas)), sigmas)`.
pub(super) fn interpolate(sigmas: &[f32], timestep: f64) -> f64 {
    let last = sigmas.len() - 1;
    let place = timestep.clamp(0.0, last as f64);
    let index = place as usize;
    let low = f64::from(sigmas[index]);
    let high = f64::from(sigmas[(index + 1).min(last)]);
    let fraction = place - index as f64;
    // At a training timestep the slope plays no part: it may not be finite.
    if fraction == 0.0 { low } else { (high - low) * fraction + low }
}

/// A share of noise: outside of 0 to 1 no run would end in numbers, whatever its steps.
fn share(fields: &Fields, name: &str, default: f64) -> Result<f64> {
    let share = fields.number(name, default)?;
    if (0.0..1.0).contains(&share) {
        return Ok(share);
    }
    Err(fields.refuse(format!("{name} is {share}, not from 0 to 1")))
}

fn betas(fields: &Fields, default: Betas) -> Result<Vec<f32>> {
    let count = num_train_timesteps(fields)?;
    if let Some(trained) = fields.numbers("trained_betas")? {
        if trained.len() != count {
            return Err(fields.refuse(format!(
                "trained_betas has {} values, num_train_timesteps is {count}",
                trained.len()
            )));
        }
        return Ok(trained.into_iter().map(|beta| beta as f32).collect());
    }
    let start = share(fields, "beta_start", default.start)?;
    let end = share(fields, "beta_end", default.end)?;
    let known = [
        ("linear", BetaSchedule::Linear),
        ("scaled_linear", BetaSchedule::ScaledLinear),
        ("squaredcos_cap_v2", BetaSchedule::SquaredCosine),
    ];
    Ok(match fields.choice("beta_schedule", default.schedule, &known)? {
        BetaSchedule::Linear => torch_linspace(start, end, count),
        BetaSchedule::ScaledLinear => {
            let roots = torch_linspace(start.sqrt(), end.sqrt(), count);
            roots.into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosine => squared_cosine(count),
    })
}

/// `torch.linspace` in f32: from both ends towards the middle, with fused multiply-adds.
fn torch_linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = if count > 1 { (end - start) / (count - 1) as f32 } else { 0.0 };
    let at = |index: usize| {
        if index < count / 2 || count == 1 {
            step.mul_add(index as f32, start)
        } else {
            (-step).mul_add((count - 1 - index) as f32, end)
        }
    };
    (0..count).map(at).collect()
}

/// diffusers' `betas_for_alpha_bar` (Nichol and Dhariwal 2021).
fn squared_cosine(count: usize) -> Vec<f32> {
    let alpha_bar = |index: usize| {
        let time = index as f64 / count as f64;
        ((time + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2)
    };
    (0..count).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999) as f32).collect()
}

/// `torch.cumprod` in f32, which multiplies in f64 and rounds each product.
fn cumulative_product(factors: impl Iterator<Item = f32>) -> Vec<f32> {
    let product = |product: &mut f64, factor| {
        *product *= f64::from(factor);
        Some(*product as f32)
    };
    factors.scan(1.0, product).collect()
}

/// diffusers' `rescale_zero_terminal_snr` (Lin et al. 2023), in f32.
fn rescale_zero_terminal_snr(betas: &mut [f32]) {
    let mut roots = cumulative_product(betas.iter().map(|beta| 1.0 - beta));
    roots.iter_mut().for_each(|alpha| *alpha = alpha.sqrt());
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let mut before = 1.0;
    for (beta, root) in betas.iter_mut().zip(roots) {
        let root = (root - last) * scale;
        let alpha_bar = root * root;
        *beta = 1.0 - alpha_bar / before;
        before = alpha_bar;
    }
}
