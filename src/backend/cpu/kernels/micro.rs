//! The innermost loop of every matrix product: a few rows times one panel of packed columns.
//! Separate because it is the one place with vector intrinsics. Every element is summed over
//! k in order by one accumulator, so its bits depend on nothing but its row and its column:
//! not on tiles, threads, or the batch.

use super::simd::Isa;

/// Columns of a panel; the last of a matrix may be [`HALF`] as wide.
pub const WIDTH: usize = 32;
/// Columns of a narrow last panel.
pub const HALF: usize = 16;
/// The longest piece of a sum that is worked on at once: rows of it stay in the L1 cache.
pub const DEPTH: usize = 384;
/// Distance of the rows of `a`, in elements: an odd number of cache lines, so that rows do not
/// fight for the same places of the cache. A constant, so that row addresses cost no registers.
pub const ROW: usize = DEPTH + 16;

/// `c[r][j] += Σₖ a[r][k] · panel[k][j]` for `rows` rows and the panel's columns; if `fresh`, the
/// sums begin at 0, whatever is in `c`.
///
/// `a` has rows of [`ROW`] elements of which `depth` count; `panel` is `(depth, width)` with a
/// `width` of [`WIDTH`] or [`HALF`]; rows of `c` are `c_row` elements apart.
pub fn multiply(
    isa: Isa,
    (rows, depth, width): (usize, usize, usize),
    a: &[f32],
    panel: &[f32],
    c: &mut [f32],
    c_row: usize,
    fresh: bool,
) {
    assert!(rows > 0 && depth <= DEPTH && (width == WIDTH || width == HALF) && c_row >= width);
    assert!(a.len() >= (rows - 1) * ROW + depth && panel.len() >= depth * width);
    assert!(c.len() >= (rows - 1) * c_row + width);
    let most = isa.rows(width);
    let groups = rows.div_ceil(most);
    for group in 0..groups {
        let (first, end) = (rows * group / groups, rows * (group + 1) / groups);
        // SAFETY: `first < end ≤ rows`, so both pointers stay within what was asserted above; the
        // kernel reads `end - first` rows of `a`, the panel, and writes as many rows of `c`.
        unsafe {
            let a = a.as_ptr().add(first * ROW);
            let c = c.as_mut_ptr().add(first * c_row);
            kernel(isa, (end - first, width), (depth, a, panel.as_ptr(), c, c_row, fresh));
        }
    }
}

impl Isa {
    /// Most rows that the registers hold for a panel of `width`.
    fn rows(self, width: usize) -> usize {
        match (self, width) {
            (Isa::Avx512, _) => 14,
            (Isa::Avx2, WIDTH) => 3,
            (Isa::Avx2, _) => 6,
            (Isa::Portable, _) => 4,
        }
    }
}

/// Calls `$kernel::<rows, width>` for a number of rows that is known at run time only.
macro_rules! with_rows {
    ($rows:expr, $kernel:ident, $vectors:literal, $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => with_rows!(@call $kernel, $n, $vectors, $args),)*
            rows => unreachable!("{rows} rows at once"),
        }
    };
    (@call $kernel:ident, $n:literal, $vectors:literal, ($($arg:expr),*)) => {
        // SAFETY: the caller of `kernel` promises what every kernel needs.
        unsafe { $kernel::<$n, $vectors>($($arg),*) }
    };
}

/// # Safety
/// `a` must have `rows` rows of `depth` elements, `b` must have `depth · width`, `c` must have
/// `rows` rows of `width` elements; the processor must have `isa`.
unsafe fn kernel(isa: Isa, (rows, width): (usize, usize), args: Args) {
    match (isa, width) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, WIDTH) => {
            with_rows!(rows, avx512, 2, (args), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, _) => {
            with_rows!(rows, avx512, 1, (args), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, WIDTH) => with_rows!(rows, avx2, 4, (args), [1 2 3]),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => with_rows!(rows, avx2, 2, (args), [1 2 3 4 5 6]),
        (_, WIDTH) => {
            for half in [0, HALF] {
                let (depth, a, b, c, c_row, fresh) = args;
                // SAFETY: the two halves of the columns.
                let args = unsafe { (depth, a, b.add(half), c.add(half), c_row, fresh) };
                with_rows!(rows, portable, 32, (args), [1 2 3 4]);
            }
        }
        (_, _) => with_rows!(rows, portable, 16, (args), [1 2 3 4]),
    }
}

type Args = (usize, *const f32, *const f32, *mut f32, usize, bool);

/// # Safety
/// As [`kernel`], with `ROWS` rows and a width of `16 · VECTORS`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const ROWS: usize, const VECTORS: usize>((depth, a, b, c, c_row, fresh): Args) {
    use std::arch::x86_64::{
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: all addresses are those that the caller promised: `ROWS × VECTORS` vectors of `c`,
    // `depth × VECTORS` of `b`, `depth` elements of `ROWS` rows of `a`.
    unsafe {
        for (r, row) in sums.iter_mut().enumerate().filter(|_| !fresh) {
            for (v, sum) in row.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(c.add(r * c_row + v * 16));
            }
        }
        for k in 0..depth {
            let mut columns = [_mm512_setzero_ps(); VECTORS];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = _mm512_loadu_ps(b.add((k * VECTORS + v) * 16));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(r * ROW + k));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = _mm512_fmadd_ps(x, column, *sum);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * c_row + v * 16), *sum);
            }
        }
    }
}

/// # Safety
/// As [`kernel`], with `ROWS` rows and a width of `8 · VECTORS`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize, const VECTORS: usize>((depth, a, b, c, c_row, fresh): Args) {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: as in `avx512`, with vectors of 8.
    unsafe {
        for (r, row) in sums.iter_mut().enumerate().filter(|_| !fresh) {
            for (v, sum) in row.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(c.add(r * c_row + v * 8));
            }
        }
        for k in 0..depth {
            let mut x = [_mm256_setzero_ps(); ROWS];
            for (r, x) in x.iter_mut().enumerate() {
                *x = _mm256_set1_ps(*a.add(r * ROW + k));
            }
            for v in 0..VECTORS {
                let column = _mm256_loadu_ps(b.add((k * VECTORS + v) * 8));
                for (row, x) in sums.iter_mut().zip(x) {
                    row[v] = _mm256_fmadd_ps(x, column, row[v]);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * c_row + v * 8), *sum);
            }
        }
    }
}

/// # Safety
/// As [`kernel`], with `ROWS` rows and 16 columns of a panel whose rows are `STEP` apart.
unsafe fn portable<const ROWS: usize, const STEP: usize>((depth, a, b, c, c_row, fresh): Args) {
    // A fused multiply-add where every processor of the target has one; elsewhere it is a call.
    let add = |sum: f32, x: f32, y: f32| {
        if cfg!(target_arch = "aarch64") { x.mul_add(y, sum) } else { sum + x * y }
    };
    let mut sums = [[0f32; HALF]; ROWS];
    // SAFETY: the caller promised `ROWS` rows of 16 columns of `c`, `depth` rows of `b`, `depth`
    // elements of `ROWS` rows of `a`; arrays of f32 have no other alignment than f32.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate().filter(|_| !fresh) {
            *sums = *c.add(r * c_row).cast::<[f32; HALF]>();
        }
        for k in 0..depth {
            let columns = *b.add(k * STEP).cast::<[f32; HALF]>();
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *a.add(r * ROW + k);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = add(*sum, x, column);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            *c.add(r * c_row).cast::<[f32; HALF]>() = *sums;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_multiplies_any_number_of_rows() {
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 101.0 - 0.5;
        for &isa in Isa::available() {
            for width in [HALF, WIDTH] {
                for rows in 1..31 {
                    let depth = 1 + (rows * 29) % DEPTH;
                    let c_row = width + rows % 3;
                    let a: Vec<f32> = (0..rows * ROW).map(value).collect();
                    let b: Vec<f32> = (0..depth * width).map(|i| value(i + 5)).collect();
                    let mut c: Vec<f32> = (0..rows * c_row).map(|i| value(i + 7)).collect();
                    let before = c.clone();
                    multiply(isa, (rows, depth, width), &a, &b, &mut c, c_row, rows % 2 == 0);
                    for (i, (&after, &before)) in c.iter().zip(&before).enumerate() {
                        let (r, j) = (i / c_row, i % c_row);
                        if j >= width {
                            assert_eq!(after, before, "beside the panel");
                            continue;
                        }
                        let sum: f64 = (0..depth)
                            .map(|k| f64::from(a[r * ROW + k]) * f64::from(b[k * width + j]))
                            .sum();
                        let before = if rows % 2 == 0 { 0.0 } else { f64::from(before) };
                        let error = (f64::from(after) - before - sum).abs();
                        assert!(error < 1e-5, "{isa:?} {rows}x{depth}x{width} at {r},{j}");
                    }
                }
            }
        }
    }
}
