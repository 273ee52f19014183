//! Quantiles of the beta distribution with both parameters 0.6, for which Python asks scipy.
//! Separate because it is numerics of its own, and knows nothing of schedulers.

/// Both parameters.
const SHAPE: f64 = 0.6;

/// The beta function at (0.6, 0.6): gamma(0.6)² / gamma(1.2).
const BETA: f64 = 2.415_344_208_002_472_3;

/// Where the distribution function has this value, between 0 and 1.
pub(super) fn quantile(share: f64) -> f64 {
    if share > 0.5 {
        // It is symmetric, and small numbers have more digits.
        return 1.0 - quantile(1.0 - share);
    }
    if share <= 0.0 {
        return 0.0;
    }
    // x^0.6 grows like the distribution function where x is small: its root is found by Newton's
    // method in that, kept between what is known to be below and above.
    let (mut below, mut above) = (0.0_f64, 0.5_f64.powf(SHAPE));
    let mut root = (share * SHAPE * BETA).clamp(below, above);
    for _ in 0..100 {
        let x = root.powf(1.0 / SHAPE);
        let error = distribution(x) - share;
        if error > 0.0 {
            above = root;
        } else {
            below = root;
        }
        // d/d(x^0.6) of the distribution function.
        let slope = (1.0 - x).powf(SHAPE - 1.0) / (SHAPE * BETA);
        let next = root - error / slope;
        let next = if next > below && next < above { next } else { 0.5 * (below + above) };
        if (next - root).abs() <= f64::EPSILON * root {
            break;
        }
        root = next;
    }
    root.powf(1.0 / SHAPE)
}

/// The distribution function for `x` up to a half, by its power series.
fn distribution(x: f64) -> f64 {
    // x^a / B · Σ (1 - a)(2 - a)…(n - a) / n! · x^n / (a + n)
    let mut term = 1.0;
    let mut sum = 1.0 / SHAPE;
    for n in 1..200 {
        let n = f64::from(n);
        term *= (n - SHAPE) / n * x;
        sum += term / (SHAPE + n);
        if term <= f64::EPSILON * sum {
            break;
        }
    }
    x.powf(SHAPE) / BETA * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.stats.beta.ppf(share, 0.6, 0.6)` of scipy 1.17.1.
    #[test]
    fn quantiles_are_those_of_scipy() {
        for (share, expected) in [
            (0.0, 0.0),
            (1e-9, 1.855_882_462_491_41e-15),
            (0.001, 1.855_873_851_745_199e-5),
            (0.04, 0.008_663_769_384_783_34),
            (0.25, 0.175_680_378_652_694_98),
            (0.5, 0.5),
            (0.6, 0.637_299_009_246_785_6),
            (0.9, 0.960_415_594_411_219_2),
            (0.999, 0.999_981_441_261_482_6),
            (1.0, 1.0),
        ] {
            let found = quantile(share);
            assert!((found - expected).abs() <= 1e-13, "{share}: {found} is not {expected}");
        }
    }
}
