//! Which training timesteps a run visits. Separate because the schedulers share the three ways of
//! spacing (Lin et al. 2023, table 2) and their details of rounding, which are numpy's.

use super::config::Fields;
use crate::Result;

/// `timestep_spacing` of a scheduler's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spacing {
    /// Multiples of an integer ratio, then `steps_offset`.
    Leading,
    /// Downwards from the last timestep by a fractional ratio.
    Trailing,
    /// Evenly from end to end.
    Linspace,
}

/// `timestep_spacing` and `steps_offset`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timesteps {
    pub(super) spacing: Spacing,
    pub(super) offset: i64,
}

impl Timesteps {
    /// As in classes that know neither.
    pub(super) const LINSPACE: Self = Self { spacing: Spacing::Linspace, offset: 0 };

    /// Reads both; the classes have different defaults for the spacing and 0 for the offset.
    pub(super) fn read(fields: &Fields, default: Spacing) -> Result<Self> {
        let known = [
            ("leading", Spacing::Leading),
            ("trailing", Spacing::Trailing),
            ("linspace", Spacing::Linspace),
        ];
        let spacing = fields.choice("timestep_spacing", default, &known)?;
        let offset = fields.integer("steps_offset", 0, 0..=1000)?;
        Ok(Self { spacing, offset })
    }

    /// The timesteps of DDIM, PNDM and Euler for `steps` of `train` training timesteps, from noisy
    /// to clean. Not rounded where `linspace` gives fractions.
    pub(super) fn visit(self, train: usize, steps: usize) -> Vec<f64> {
        match self.spacing {
            Spacing::Linspace => reversed(linspace(0.0, (train - 1) as f64, steps)),
            Spacing::Leading => reversed(self.leading(train / steps, 0..steps)),
            Spacing::Trailing => trailing(train, train, steps),
        }
    }

    /// The timesteps of the DPM solvers, which leave the lowest of `steps + 1` out, below `last`.
    /// Always whole numbers.
    pub(super) fn visit_above_lowest(self, train: usize, last: usize, steps: usize) -> Vec<f64> {
        match self.spacing {
            Spacing::Linspace => {
                reversed(round(linspace(0.0, (last - 1) as f64, steps + 1).split_off(1)))
            }
            Spacing::Leading => reversed(self.leading(last / (steps + 1), 1..steps + 1)),
            Spacing::Trailing => trailing(train, last, steps),
        }
    }

    fn leading(self, ratio: usize, places: std::ops::Range<usize>) -> Vec<f64> {
        places.map(|place| (place * ratio) as f64 + self.offset as f64).collect()
    }
}

/// numpy's rounding, half to even.
pub(super) fn round(timesteps: Vec<f64>) -> Vec<f64> {
    timesteps.into_iter().map(f64::round_ties_even).collect()
}

/// `np.linspace(start, stop, count)`: a single one is the start.
pub(super) fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    let step = (stop - start) / (count.max(2) - 1) as f64;
    let mut values: Vec<f64> = (0..count).map(|index| index as f64 * step + start).collect();
    if let [_, .., last] = values.as_mut_slice() {
        *last = stop;
    }
    values
}

/// `np.arange(last, 0, -train / steps).round() - 1`, without the -1 at its end that rounding lets
/// in for some counts (61 of 1000, for one): diffusers would evaluate the model there, outside its
/// range, and DDIM would take the noisiest timestep's alpha for it.
fn trailing(train: usize, last: usize, steps: usize) -> Vec<f64> {
    let ratio = train as f64 / steps as f64;
    let start = last as f64;
    // arange adds multiples of the difference of its first two values.
    let step = (start - ratio) - start;
    let values = (0..steps).map(|index| (start + index as f64 * step).round_ties_even() - 1.0);
    values.filter(|timestep| *timestep >= 0.0).collect()
}

fn reversed(mut timesteps: Vec<f64>) -> Vec<f64> {
    timesteps.reverse();
    timesteps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_timesteps_stay_in_range_for_every_count() {
        let timesteps = Timesteps { spacing: Spacing::Trailing, offset: 0 };
        for steps in 1..=1000 {
            let visited = timesteps.visit(1000, steps);
            assert_eq!(visited.len(), steps);
            assert!(visited.iter().all(|timestep| (0.0..1000.0).contains(timestep)), "{steps}");
        }
    }
}
