//! The innermost loop of every matrix product: a few rows times one panel of packed columns.
//! Separate because it is the one place with vector intrinsics. Every element is summed over
//! k in order by one accumulator, so its bits depend on nothing but its row and its column:
//! not on tiles, threads, or the batch.

use std::cell::RefCell;
use std::ops::Neg;
use std::thread::LocalKey;

use super::element::{As, Element};
#[cfg(target_arch = "aarch64")]
use super::neon::neon;
use super::simd::Isa;
use super::spare::Kept;

/// Columns of a panel; the last of a matrix may be [`HALF`] as wide.
pub const WIDTH: usize = 32;
/// Columns of a narrow last panel.
pub const HALF: usize = 16;
/// The longest piece of a sum that is worked on at once, in units: rows of it stay in the L1 cache.
pub const DEPTH: usize = 384;
/// Distance of the rows of `a`, in units: an odd number of cache lines, so that rows do not
/// fight for the same places of the cache. A constant, so that row addresses cost no registers.
pub const ROW: usize = DEPTH + 16;

/// What one lane of an instruction multiplies at a time: 4 bytes, neighbours along k.
pub trait Unit: Kept {
    /// What it is made of.
    type Number: Element + As<Self::Number> + Neg<Output = Self::Number>;
    /// How many of them.
    const NUMBERS: usize;

    /// The numbers of units, in order.
    fn numbers(units: &mut [Self]) -> &mut [Self::Number];

    /// Whether this processor multiplies it with an instruction set.
    fn runs_on(isa: Isa) -> bool;

    /// The buffer of units that each thread keeps.
    fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>>;

    /// Runs the kernel of an instruction set. If `STRIP`, the rows of `a` lie interleaved, else
    /// each by itself.
    ///
    /// # Safety
    /// `a` must have `rows` rows of `depth` units, each in [`ROW`] if not `STRIP`; `b` must have
    /// `depth · width`, `c` must have `rows` rows of `width` elements; `rows` must be at most
    /// [`Isa::rows`]; the processor must have `isa`, and [`runs_on`](Self::runs_on) be true for it.
    unsafe fn kernel<const STRIP: bool>(isa: Isa, rows: usize, width: usize, args: Args<Self>);
}

/// The operands of a kernel.
#[derive(Clone, Copy)]
pub struct Args<U> {
    /// Length of the sums, in units.
    pub depth: usize,
    /// Rows.
    pub a: *const U,
    /// A panel, `(depth, width)`.
    pub b: *const U,
    /// Where the sums are.
    pub c: *mut f32,
    /// The distance of their rows.
    pub c_row: usize,
    /// Whether they begin at 0, whatever is there.
    pub fresh: bool,
}

/// `c[r][j] += Σₖ a[r][k] · panel[k][j]` for `rows` rows and the panel's columns; if `fresh`, the
/// sums begin at 0, whatever is in `c`.
///
/// `a` has rows of [`ROW`] units of which `depth` count; `panel` is `(depth, width)` with a
/// `width` of [`WIDTH`] or [`HALF`]; rows of `c` are `c_row` elements apart.
pub fn multiply<U: Unit>(
    isa: Isa,
    (rows, depth, width): (usize, usize, usize),
    a: &[U],
    panel: &[U],
    c: &mut [f32],
    c_row: usize,
    fresh: bool,
) {
    assert!(U::runs_on(isa), "the processor does not multiply this");
    assert!(rows > 0 && depth <= DEPTH && (width == WIDTH || width == HALF) && c_row >= width);
    assert!(a.len() >= (rows - 1) * ROW + depth && panel.len() >= depth * width);
    assert!(c.len() >= (rows - 1) * c_row + width);
    let groups = rows.div_ceil(isa.rows(width));
    for group in 0..groups {
        let (first, end) = (rows * group / groups, rows * (group + 1) / groups);
        // SAFETY: `first < end ≤ rows`, so both pointers stay within what was asserted above; the
        // kernel reads `end - first` rows of `a`, the panel, and writes as many rows of `c`.
        unsafe {
            let a = a.as_ptr().add(first * ROW);
            let c = c.as_mut_ptr().add(first * c_row);
            let args = Args { depth, a, b: panel.as_ptr(), c, c_row, fresh };
            U::kernel::<false>(isa, end - first, width, args);
        }
    }
}

/// `c = a · panel` if `fresh`, else `c += a · panel`, for the rows of a strip `(depth, rows)` and
/// a panel `(depth, WIDTH)`; `c` is `(rows, WIDTH)`.
pub fn multiply_strip<U: Unit>(
    isa: Isa,
    (rows, depth): (usize, usize),
    strip: &[U],
    panel: &[U],
    c: &mut [f32],
    fresh: bool,
) {
    assert!(U::runs_on(isa) && rows > 0 && rows <= isa.rows(WIDTH));
    assert!(strip.len() >= rows * depth && panel.len() >= depth * WIDTH);
    assert!(c.len() >= rows * WIDTH);
    let (a, b, c) = (strip.as_ptr(), panel.as_ptr(), c.as_mut_ptr());
    // SAFETY: asserted above; the kernel reads the strip and the panel, and writes `rows` rows.
    unsafe {
        U::kernel::<true>(isa, rows, WIDTH, Args { depth, a, b, c, c_row: WIDTH, fresh });
    }
}

impl Isa {
    /// Most rows that the registers hold for a panel of `width`.
    pub fn rows(self, width: usize) -> usize {
        match (self, width) {
            (Isa::Avx512, _) => 14,
            (Isa::Avx2 | Isa::Neon, WIDTH) => 3,
            (Isa::Avx2 | Isa::Neon, _) => 6,
            (Isa::Portable, _) => 4,
        }
    }
}

/// Calls `$kernel::<rows, width, STRIP>` for a number of rows that is known at run time only.
macro_rules! with_rows {
    ($rows:expr, $kernel:ident, $vectors:literal, $args:expr, [$($n:literal)*]) => {
        match $rows {
            // SAFETY: the caller of `kernel` promises what every kernel needs.
            $($n => unsafe { $kernel::<$n, $vectors, STRIP>($args) },)*
            rows => unreachable!("{rows} rows at once"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use with_rows;

#[cfg(target_arch = "x86_64")]
/// A kernel of AVX-512: `ROWS` rows and a width of `16 · VECTORS`, with a product of that feature.
macro_rules! avx512_kernel {
    ($name:ident, $unit:ty, $features:literal, $multiply_add:ident) => {
        /// # Safety
        /// As [`Unit::kernel`], with `ROWS` rows and a width of `16 · VECTORS`.
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize, const VECTORS: usize, const STRIP: bool>(
            args: $crate::backend::cpu::kernels::micro::Args<$unit>,
        ) {
            use std::arch::x86_64::{
                _mm512_castsi512_ps, _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
                _mm512_storeu_ps,
            };
            let $crate::backend::cpu::kernels::micro::Args { depth, a, b, c, c_row, fresh } = args;
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            // SAFETY: all addresses are those that the caller promised: `ROWS × VECTORS` vectors
            // of `c`, `depth × VECTORS` of `b`, `depth` units of `ROWS` rows of `a`.
            unsafe {
                if !fresh {
                    for (r, row) in sums.iter_mut().enumerate() {
                        for (v, sum) in row.iter_mut().enumerate() {
                            *sum = _mm512_loadu_ps(c.add(r * c_row + v * 16));
                        }
                    }
                }
                for k in 0..depth {
                    let mut columns = [_mm512_setzero_ps(); VECTORS];
                    for (v, column) in columns.iter_mut().enumerate() {
                        *column = _mm512_loadu_ps(b.add((k * VECTORS + v) * 16).cast());
                    }
                    for (r, row) in sums.iter_mut().enumerate() {
                        let unit = if STRIP { k * ROWS + r } else { r * ROW + k };
                        let x = _mm512_castsi512_ps(_mm512_set1_epi32(*a.add(unit).cast()));
                        for (sum, column) in row.iter_mut().zip(columns) {
                            *sum = $multiply_add(x, column, *sum);
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
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use avx512_kernel;

impl Unit for f32 {
    type Number = f32;
    const NUMBERS: usize = 1;

    fn numbers(units: &mut [Self]) -> &mut [f32] {
        units
    }

    fn runs_on(_: Isa) -> bool {
        true
    }

    fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>> {
        thread_local! {
            static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        &SCRATCH
    }

    unsafe fn kernel<const STRIP: bool>(isa: Isa, rows: usize, width: usize, args: Args<f32>) {
        match (isa, width) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, WIDTH) => {
                with_rows!(rows, avx512, 2, args, [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, _) => {
                with_rows!(rows, avx512, 1, args, [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, WIDTH) => with_rows!(rows, avx2, 4, args, [1 2 3]),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, _) => with_rows!(rows, avx2, 2, args, [1 2 3 4 5 6]),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, WIDTH) => with_rows!(rows, neon, 8, args, [1 2 3]),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, _) => with_rows!(rows, neon, 4, args, [1 2 3 4 5 6]),
            (_, WIDTH) => {
                for half in [0, HALF] {
                    let Args { b, c, .. } = args;
                    // SAFETY: the two halves of the columns.
                    let args = unsafe { Args { b: b.add(half), c: c.add(half), ..args } };
                    with_rows!(rows, portable, 32, args, [1 2 3 4]);
                }
            }
            (_, _) => with_rows!(rows, portable, 16, args, [1 2 3 4]),
        }
    }
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_mm512_fmadd_ps;
#[cfg(target_arch = "x86_64")]
avx512_kernel!(avx512, f32, "avx512f", _mm512_fmadd_ps);

/// # Safety
/// As [`Unit::kernel`], with `ROWS` rows and a width of `8 · VECTORS`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize, const VECTORS: usize, const STRIP: bool>(args: Args<f32>) {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    let Args { depth, a, b, c, c_row, fresh } = args;
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: as in `avx512`, with vectors of 8.
    unsafe {
        if !fresh {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(c.add(r * c_row + v * 8));
                }
            }
        }
        for k in 0..depth {
            let mut columns = [_mm256_setzero_ps(); VECTORS];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = _mm256_loadu_ps(b.add((k * VECTORS + v) * 8));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.add(if STRIP { k * ROWS + r } else { r * ROW + k }));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = _mm256_fmadd_ps(x, column, *sum);
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
/// As [`Unit::kernel`], with `ROWS` rows and 16 columns of a panel whose rows are `STEP` apart.
unsafe fn portable<const ROWS: usize, const STEP: usize, const STRIP: bool>(args: Args<f32>) {
    // A fused multiply-add where every processor of the target has one; elsewhere it is a call.
    let add = |sum: f32, x: f32, y: f32| {
        if cfg!(target_arch = "aarch64") { x.mul_add(y, sum) } else { sum + x * y }
    };
    let Args { depth, a, b, c, c_row, fresh } = args;
    let mut sums = [[0f32; HALF]; ROWS];
    // SAFETY: the caller promised `ROWS` rows of 16 columns of `c`, `depth` rows of `b`, `depth`
    // elements of `ROWS` rows of `a`; arrays of f32 have no other alignment than f32.
    unsafe {
        if !fresh {
            for (r, sums) in sums.iter_mut().enumerate() {
                *sums = *c.add(r * c_row).cast::<[f32; HALF]>();
            }
        }
        for k in 0..depth {
            let columns = *b.add(k * STEP).cast::<[f32; HALF]>();
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *a.add(if STRIP { k * ROWS + r } else { r * ROW + k });
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
    use crate::backend::cpu::kernels::pair::Pair;

    /// Numbers that bf16 holds exactly, below 1.
    fn value(i: usize) -> f32 {
        ((i * 37 + 11) % 101) as f32 / 128.0 - 0.375
    }

    fn units<U: Unit>(count: usize, shift: usize) -> (Vec<U>, Vec<f32>) {
        let mut units = vec![U::default(); count];
        let wide: Vec<f32> = (0..count * U::NUMBERS).map(|i| value(i + shift)).collect();
        U::Number::narrow(&wide, U::numbers(&mut units));
        (units, wide)
    }

    /// Σ over the numbers of a unit.
    fn dot(n: usize, a: &[f32], b: &[f32], i: usize, j: usize) -> f64 {
        (0..n).map(|part| f64::from(a[i * n + part]) * f64::from(b[j * n + part])).sum()
    }

    fn check<U: Unit>(isa: Isa) {
        for (width, rows) in [HALF, WIDTH].into_iter().flat_map(|w| (1..31).map(move |r| (w, r))) {
            let n = U::NUMBERS;
            let depth = 1 + (rows * 29) % DEPTH;
            let c_row = width + rows % 3;
            let ((a, wide_a), (b, wide_b)) =
                (units::<U>(rows * ROW, 0), units::<U>(depth * width, 5));
            let before: Vec<f32> = (0..rows * c_row).map(|i| value(i + 7)).collect();
            let mut c = before.clone();
            multiply(isa, (rows, depth, width), &a, &b, &mut c, c_row, rows % 2 == 0);
            for (i, (&after, &before)) in c.iter().zip(&before).enumerate() {
                let (r, j) = (i / c_row, i % c_row);
                let product = |k| dot(n, &wide_a, &wide_b, r * ROW + k, k * width + j);
                let sum: f64 = if j < width { (0..depth).map(product).sum() } else { 0.0 };
                let first = if rows % 2 == 0 && j < width { 0.0 } else { f64::from(before) };
                let error = (f64::from(after) - first - sum).abs();
                assert!(error < 2e-5, "{isa:?} {rows}x{depth}x{width} at {r},{j}: {error}");
                assert!(j < width || after == before, "beside the panel");
            }
            if width == WIDTH && rows <= isa.rows(WIDTH) {
                strip::<U>(isa, rows, depth, (&a, &wide_a), (&b, &wide_b));
            }
        }
    }

    fn strip<U: Unit>(
        isa: Isa,
        rows: usize,
        depth: usize,
        (a, wide_a): (&[U], &[f32]),
        (b, wide_b): (&[U], &[f32]),
    ) {
        let mut c = vec![f32::NAN; rows * WIDTH];
        for (fresh, times) in [(true, 1.0), (false, 2.0)] {
            multiply_strip(isa, (rows, depth), a, b, &mut c, fresh);
            for (i, &found) in c.iter().enumerate() {
                let (r, j) = (i / WIDTH, i % WIDTH);
                let product = |k| dot(U::NUMBERS, wide_a, wide_b, k * rows + r, k * WIDTH + j);
                let sum: f64 = (0..depth).map(product).sum();
                let error = (f64::from(found) - times * sum).abs();
                assert!(error < 4e-5, "{isa:?} strip {rows}x{depth} at {r},{j}: {error}");
            }
        }
    }

    #[test]
    fn every_instruction_set_multiplies_any_number_of_rows() {
        for &isa in Isa::available() {
            check::<f32>(isa);
            if Pair::runs_on(isa) {
                check::<Pair>(isa);
            }
        }
    }
}
