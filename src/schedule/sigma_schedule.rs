//! Other spacings of the sigmas than that of the timesteps: where users say "Karras". Separate
//! because most schedulers take them, each with its own ends and its own way of rounding.

use super::beta;
use super::config::Fields;
use super::spacing::linspace;
use crate::Result;

/// How the sigmas of a run are spaced between the first and the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigmaSchedule {
    /// Karras et al. 2022, equation 5 with a rho of 7: more steps where there is little noise.
    Karras,
    /// Evenly in the logarithm.
    Exponential,
    /// By quantiles of a beta distribution (Lee et al. 2024): more steps at both ends.
    Beta,
}

const RHO: f64 = 7.0;

impl SigmaSchedule {
    /// Every one, in the order in which help lists them.
    pub const ALL: [Self; 3] = [Self::Karras, Self::Exponential, Self::Beta];

    /// What the name of a scheduler ends in, such as `karras`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Karras => "karras",
            Self::Exponential => "exponential",
            Self::Beta => "beta",
        }
    }

    /// AUTOMATIC1111's name, for the "Schedule type" of a picture's metadata.
    pub fn label(self) -> &'static str {
        match self {
            Self::Karras => "Karras",
            Self::Exponential => "Exponential",
            Self::Beta => "Beta",
        }
    }

    /// The field of a configuration that switches it on.
    pub(super) fn field(self) -> &'static str {
        match self {
            Self::Karras => "use_karras_sigmas",
            Self::Exponential => "use_exponential_sigmas",
            Self::Beta => "use_beta_sigmas",
        }
    }

    /// From the first sigma down to the last one.
    fn spread(self, ends: Ends, count: usize) -> Vec<f64> {
        let Ends { first, last } = ends;
        match self {
            Self::Karras => {
                let (from, to) = (first.powf(1.0 / RHO), last.powf(1.0 / RHO));
                let ramp = linspace(0.0, 1.0, count).into_iter();
                ramp.map(|place| (from + place * (to - from)).powf(RHO)).collect()
            }
            Self::Exponential => {
                linspace(first.ln(), last.ln(), count).into_iter().map(f64::exp).collect()
            }
            Self::Beta => {
                let places = linspace(0.0, 1.0, count).into_iter();
                places.map(|place| last + beta::quantile(1.0 - place) * (first - last)).collect()
            }
        }
    }
}

/// The first and the last sigma of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) first: f64,
    pub(super) last: f64,
}

/// A configuration's spacing of the sigmas, and the ends that it may set.
pub(super) struct Spread {
    schedule: SigmaSchedule,
    sigma_max: Option<f64>,
    sigma_min: Option<f64>,
}

impl Spread {
    /// Reads which of the spacings is switched on, if any.
    pub(super) fn read(fields: &Fields) -> Result<Option<Self>> {
        let mut found = None;
        for schedule in SigmaSchedule::ALL {
            if !fields.flag(schedule.field(), false)? {
                continue;
            }
            if let Some(other) = found.replace(schedule) {
                let (one, two) = (other.field(), schedule.field());
                return Err(fields.refuse(format!("{one} and {two} are both true")));
            }
        }
        let Some(schedule) = found else { return Ok(None) };
        let end = |name| match fields.optional_number(name)? {
            Some(sigma) if !(sigma > 0.0 && sigma.is_finite()) => {
                Err(fields.refuse(format!("{name} is {sigma}, not a number above 0")))
            }
            end => Ok(end),
        };
        Ok(Some(Self { schedule, sigma_max: end("sigma_max")?, sigma_min: end("sigma_min")? }))
    }

    /// Between the run's own ends where the sigmas are Karras', as `LMSDiscreteScheduler` has it.
    pub(super) fn without_ends_for_karras(self) -> Self {
        match self.schedule {
            SigmaSchedule::Karras => Self { sigma_max: None, sigma_min: None, ..self },
            SigmaSchedule::Exponential | SigmaSchedule::Beta => self,
        }
    }

    /// Whether it is this one.
    pub(super) fn is(&self, schedule: SigmaSchedule) -> bool {
        self.schedule == schedule
    }

    /// So many sigmas, between these ends where the configuration sets no others.
    pub(super) fn sigmas(&self, ends: Ends, count: usize) -> Vec<f64> {
        let first = self.sigma_max.unwrap_or(ends.first);
        let last = self.sigma_min.unwrap_or(ends.last);
        self.schedule.spread(Ends { first, last }, count)
    }
}

/// The timestep of a sigma, between those of the training's sigmas around it, whose logarithms are
/// `log_sigmas`: diffusers' `_sigma_to_t`.
pub(super) fn timestep_of(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let log_sigma = sigma.max(1e-10).ln();
    let below = log_sigmas.iter().rposition(|log| log_sigma >= f64::from(*log));
    let low = below.unwrap_or(0).min(log_sigmas.len().saturating_sub(2));
    let high = (low + 1).min(log_sigmas.len() - 1);
    let (log_low, log_high) = (log_sigmas[low], log_sigmas[high]);
    let share = (f64::from(log_low) - log_sigma) / f64::from(log_low - log_high);
    let share = share.clamp(0.0, 1.0);
    (1.0 - share) * low as f64 + share * high as f64
}

/// Numerator and denominator of `log(1 + x)` for x around 0, the lowest power first.
const LOG_TERMS: [(f32, f32); 6] = [
    (0.0, 1.0),
    (1.0, 2.612_677_6),
    (2.112_677_6, 2.453_006),
    (1.480_000_6, 0.986_494_3),
    (0.380_883_78, 0.154_647_63),
    (0.025_899_792, 0.005_875_095_3),
];

/// numpy's `log` of an f32, which is not always the nearest f32 (as its kernel for AVX2 and
/// AVX-512 has it): where a timestep is cut to a whole number, the last bit decides to which one.
pub(super) fn log_f32(value: f32) -> f32 {
    const MANTISSA: u32 = 0x007f_ffff;
    const HALF: u32 = 0x3f00_0000;
    if !value.is_normal() || value < 0.0 {
        return value.ln();
    }
    let bits = value.to_bits();
    // From a half to one, times two to this.
    let mut exponent = (bits >> 23) as f32 - 126.0;
    let mut mantissa = f32::from_bits(bits & MANTISSA | HALF);
    if mantissa <= std::f32::consts::FRAC_1_SQRT_2 {
        mantissa += mantissa;
        exponent -= 1.0;
    }
    let x = mantissa - 1.0;
    let (mut numerator, mut denominator) = LOG_TERMS[5];
    for (above, below) in LOG_TERMS[..5].iter().rev() {
        numerator = numerator.mul_add(x, *above);
        denominator = denominator.mul_add(x, *below);
    }
    exponent.mul_add(std::f32::consts::LN_2, numerator / denominator)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `np.log(np.float32(x))` of numpy 2.4.6, as bits: the last four are not the nearest f32.
    #[test]
    fn a_logarithm_has_numpys_bits() {
        for (value, expected) in [
            (0x3f28_aadc, 0xbed5_a19c),
            (0x4163_336d, 0x4029_cec8),
            (0x3f4a_cabe, 0xbe6e_96b6),
            (0x3ee0_42c7, 0xbf53_54f0),
            (0x3f4f_377e, 0xbe58_7c65),
            (0x3fab_3ce2, 0x3e95_00fc),
        ] {
            let found = log_f32(f32::from_bits(value));
            assert_eq!(found.to_bits(), expected, "{value:x}: {found}");
        }
    }
}
