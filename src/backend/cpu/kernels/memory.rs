//! Buffers: reading operands of any dtype and layout, making and writing results. Separate because
//! kernels then see nothing but dense or row-strided slices of f32.

use std::alloc::{Layout as Allocation, alloc_zeroed};
use std::borrow::Cow;
use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout};
use half::{bf16, f16};
use rayon::prelude::*;

use super::super::Storage;
use super::element::Element;
use super::pair::Pair;
use super::simd::prefetch;
use super::spare;
use crate::backend::View;
use crate::backend::order::fits;
use crate::error::{Error, Result};

/// Elements that one task of a parallel loop handles at least.
pub const TASK: usize = 1 << 15;

/// Numbers whose zero is all bits zero.
pub trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for f16 {}
impl Plain for bf16 {}
impl Plain for Pair {}
impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for i16 {}
impl Plain for i32 {}
impl Plain for i64 {}

/// Zeros; the pages of large buffers are first touched by whoever writes them.
///
/// # Errors
/// If there is not so much memory, where `vec!` would end the process.
pub fn zeroed<T: Plain>(len: usize) -> Result<Vec<T>> {
    let allocation = Allocation::array::<T>(len).map_err(|_| no_memory(len, size_of::<T>()))?;
    if allocation.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the size is not zero.
    let start = unsafe { alloc_zeroed(allocation) }.cast::<T>();
    if start.is_null() {
        return Err(no_memory(len, size_of::<T>()));
    }
    // SAFETY: allocated by the global allocator for `len` elements of `T`, which are all
    // initialised: for a `Plain` type, zero bytes are a value.
    Ok(unsafe { Vec::from_raw_parts(start, len, len) })
}

/// Tells the allocator, where that is glibc's, to give large buffers back to the system when they
/// are freed: on its own it keeps those of up to 32 MiB, with holes that no other weight fits into.
/// What is wanted again soon is on the [shelf](spare).
pub fn return_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        use std::sync::Once;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        /// From glibc's malloc.h.
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        /// Of small buffers, what ops need at a time is kept: else it would be 128 KiB.
        const KEPT_BYTES: c_int = 1 << 25;
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let settings = [
                (M_MMAP_THRESHOLD, spare::SMALLEST_BYTES as c_int),
                (M_TRIM_THRESHOLD, KEPT_BYTES),
            ];
            for (parameter, value) in settings {
                // SAFETY: glibc's own signature; it takes the allocator's lock, and both values are
                // sizes as it has them.
                unsafe { mallopt(parameter, value) };
            }
        });
    }
}

fn no_memory(len: usize, size: usize) -> Error {
    Error::out_of_memory(format_args!("none for {len} elements of {size} bytes"))
}

/// A result that tasks write in pieces which are not contiguous for each of them.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    whole: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` that is handed out in disjoint pieces (see `piece`).
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the whole buffer for as long as it is shared.
    pub fn new(whole: &'a mut [T]) -> Self {
        Self { start: whole.as_mut_ptr(), len: whole.len(), whole: PhantomData }
    }

    /// Hints that an element will be written soon; it need not exist.
    #[inline(always)]
    pub fn prefetch(&self, at: usize) {
        prefetch::<true, T>(self.start.wrapping_add(at));
    }

    /// The `len` elements from `start` on.
    ///
    /// # Safety
    /// While a piece is in use, no other piece may overlap it.
    #[expect(clippy::mut_from_ref, reason = "pieces are disjoint, as the caller promises")]
    pub unsafe fn piece(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "piece out of range");
        // SAFETY: within the buffer by the assertion, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// Number of elements in a storage.
pub fn len(storage: &CpuStorage) -> usize {
    match storage {
        CpuStorage::U8(v) => v.len(),
        CpuStorage::U32(v) => v.len(),
        CpuStorage::I16(v) => v.len(),
        CpuStorage::I32(v) => v.len(),
        CpuStorage::I64(v) => v.len(),
        CpuStorage::BF16(v) => v.len(),
        CpuStorage::F16(v) => v.len(),
        CpuStorage::F32(v) => v.len(),
        CpuStorage::F64(v) => v.len(),
        CpuStorage::F8E4M3(v) => v.len(),
        CpuStorage::F6E2M3(v) | CpuStorage::F6E3M2(v) => v.len(),
        CpuStorage::F4(v) | CpuStorage::F8E8M0(v) => v.len(),
    }
}

/// Refuses a layout that reaches beyond its storage: what keeps every kernel within bounds.
pub fn check(view: View<'_, Storage>) -> Result<()> {
    let len = len(view.storage.elements()?);
    // An empty view must not overflow either.
    let count = view.layout.dims().iter().try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1)));
    if count.is_some() && fits(view.layout, len) {
        return Ok(());
    }
    let (dims, stride) = (view.layout.dims(), view.layout.stride());
    let offset = view.layout.start_offset();
    Err(Error::other(format!(
        "a layout {dims:?} with strides {stride:?} at {offset} reaches beyond {len} elements"
    )))
}

/// The elements of a view in row-major order of its dimensions taken in `order`, borrowed if they
/// lie so and are f32.
pub fn dense<'a>(view: View<'a, Storage>, order: &[usize]) -> Result<Cow<'a, [f32]>> {
    check(view)?;
    let layout = view.layout.permute(order)?;
    match view.storage.elements()? {
        CpuStorage::F32(values) => match contiguous(values, &layout) {
            Some(values) => Ok(Cow::Borrowed(values)),
            None => Ok(Cow::Owned(widened(values, &layout)?)),
        },
        CpuStorage::F16(values) => Ok(Cow::Owned(widened(values, &layout)?)),
        CpuStorage::BF16(values) => Ok(Cow::Owned(widened(values, &layout)?)),
        other => Err(unsupported(other.dtype())),
    }
}

/// As [`dense`], in the order of the dimensions.
pub fn row_major<'a>(view: View<'a, Storage>) -> Result<Cow<'a, [f32]>> {
    dense(view, &(0..view.layout.dims().len()).collect::<Vec<_>>())
}

/// As [`dense`], with the channels of an image last.
pub fn channels_last<'a>(view: View<'a, Storage>) -> Result<Cow<'a, [f32]>> {
    dense(view, &[0, 2, 3, 1])
}

/// The elements of a view's buffer, within which the view lies.
fn elements<'a, T: Element>(view: View<'a, Storage>) -> Result<&'a [T]> {
    check(view)?;
    let storage = view.storage.elements()?;
    T::of(storage).ok_or_else(|| {
        let (found, wanted) = (storage.dtype().as_str(), T::DTYPE.as_str());
        Error::other(format!("an operand is {found}, not {wanted}"))
    })
}

/// The elements of a view in row-major order of its dimensions taken in `order`, borrowed if they
/// lie so.
pub fn in_order<'a, T: Element>(view: View<'a, Storage>, order: &[usize]) -> Result<Cow<'a, [T]>> {
    let (values, layout) = (elements(view)?, view.layout.permute(order)?);
    if let Some(values) = contiguous(values, &layout) {
        return Ok(Cow::Borrowed(values));
    }
    let mut result = spare::take(layout.shape().elem_count())?;
    let source = Gather::new(&layout);
    source.each_task(&mut result, |start, piece| source.copy_from(values, start, piece));
    Ok(Cow::Owned(result))
}

/// Vectors along the last dimension of an operand, each contiguous.
pub struct Rows<'a, T: Element> {
    values: Cow<'a, [T]>,
    start: usize,
    /// Sizes and strides of the dimensions before the last.
    outer: Vec<(usize, usize)>,
    width: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    /// Reads an operand; one with a contiguous last dimension is not copied, however its rows lie.
    pub fn read(view: View<'a, Storage>) -> Result<Self> {
        let values = elements(view)?;
        let (dims, stride) = (view.layout.dims(), view.layout.stride());
        let (Some((&width, dims)), Some((&step, stride))) =
            (dims.split_last(), stride.split_last())
        else {
            return Err(Error::other("an operand has no dimensions"));
        };
        if step == 1 || width == 1 {
            let start = view.layout.start_offset();
            let values = Cow::Borrowed(values);
            return Ok(Self { values, start, outer: merged(dims, stride), width });
        }
        let order: Vec<usize> = (0..view.layout.dims().len()).collect();
        let values = in_order(view, &order)?;
        let outer = vec![(values.len() / width.max(1), width)];
        Ok(Self { values, start: 0, outer, width })
    }

    /// The row of a row-major index over the dimensions before the last.
    pub fn row(&self, index: usize) -> &[T] {
        let start = self.start + place(&self.outer, index);
        &self.values[start..start + self.width]
    }
}

/// Sizes and strides without dimensions of size 1, neighbours joined where they lie evenly.
fn merged(dims: &[usize], stride: &[usize]) -> Vec<(usize, usize)> {
    if dims.contains(&0) {
        return vec![(0, 1)];
    }
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (&dim, &stride) in dims.iter().zip(stride).filter(|(dim, _)| **dim != 1) {
        match runs.last_mut() {
            Some((count, step)) if Some(*step) == dim.checked_mul(stride) => {
                (*count, *step) = (*count * dim, stride);
            }
            _ => runs.push((dim, stride)),
        }
    }
    runs
}

/// The elements of `layout` if they follow each other.
pub fn contiguous<'a, T>(values: &'a [T], layout: &Layout) -> Option<&'a [T]> {
    let runs = merged(layout.dims(), layout.stride());
    let count = layout.shape().elem_count();
    let start = layout.start_offset();
    match runs.as_slice() {
        _ if count == 0 => Some(&[]),
        [] | [(_, 1)] => values.get(start..start.checked_add(count)?),
        _ => None,
    }
}

fn widened<T: Element>(values: &[T], layout: &Layout) -> Result<Vec<f32>> {
    let mut result = spare::take(layout.shape().elem_count())?;
    let source = Gather::new(layout);
    source.each_task(&mut result, |start, piece| T::gather(values, &source, start, piece));
    Ok(result)
}

/// Copies a strided view into a dense buffer, any piece of it.
pub struct Gather {
    offset: usize,
    /// Merged (size, stride), slowest first; never empty.
    runs: Vec<(usize, usize)>,
}

impl Gather {
    /// Of the elements of `layout` in row-major order.
    pub fn new(layout: &Layout) -> Self {
        let mut runs = merged(layout.dims(), layout.stride());
        if runs.is_empty() {
            runs.push((1, 1));
        }
        Self { offset: layout.start_offset(), runs }
    }

    /// Splits a dense `result` among tasks: calls `fill(index of the first element, piece)`.
    pub fn each_task<U: Send>(&self, result: &mut [U], fill: impl Fn(usize, &mut [U]) + Sync) {
        // Whole rows where possible, so that pieces start at their beginning.
        let row = self.runs.last().map_or(1, |run| run.0).max(1);
        let task = TASK.next_multiple_of(row.min(TASK));
        result.par_chunks_mut(task).enumerate().for_each(|(i, piece)| fill(i * task, piece));
    }

    /// Where the `index`-th element lies.
    pub fn place(&self, index: usize) -> usize {
        self.offset + place(&self.runs, index)
    }

    /// Elements from the `start`-th on.
    pub fn copy_from<T: Copy>(&self, values: &[T], start: usize, piece: &mut [T]) {
        let run = |from: usize, to: &mut [T]| to.copy_from_slice(&values[from..from + to.len()]);
        self.copy(start, piece, |from| values[from], run);
    }

    /// Elements from the `start`-th on: `one` reads an element of the source, `run` a contiguous
    /// run from an element on.
    pub fn copy<T>(
        &self,
        start: usize,
        piece: &mut [T],
        one: impl Fn(usize) -> T,
        run: impl Fn(usize, &mut [T]),
    ) {
        let [outer @ .., (width, step)] = self.runs.as_slice() else { return };
        if *width == 0 {
            return;
        }
        let (mut row, mut column) = (start / width, start % width);
        let mut rest = piece;
        while !rest.is_empty() {
            let base = self.offset + place(outer, row);
            // Rows that lie side by side are copied together, a block of columns at a time, so
            // that each cache line of the source is used up while it is there.
            let together = match outer.last() {
                Some(&(count, 1)) if column == 0 && *step != 1 => {
                    (count - row % count).min(16).min(rest.len() / width)
                }
                _ => 0,
            };
            if together > 1 {
                let (block, after) = rest.split_at_mut(together * width);
                for first in (0..*width).step_by(16) {
                    for (i, row) in block.chunks_exact_mut(*width).enumerate() {
                        for (j, to) in row.iter_mut().enumerate().skip(first).take(16) {
                            *to = one(base + i + j * step);
                        }
                    }
                }
                row += together;
                rest = after;
                continue;
            }
            let (now, after) = rest.split_at_mut((width - column).min(rest.len()));
            if *step == 1 {
                run(base + column, now);
            } else {
                for (j, to) in now.iter_mut().enumerate() {
                    *to = one(base + (column + j) * step);
                }
            }
            (row, column, rest) = (row + 1, 0, after);
        }
    }
}

/// Where the `index`-th row begins.
fn place(outer: &[(usize, usize)], mut index: usize) -> usize {
    let Some(((_, slowest), faster)) = outer.split_first() else { return 0 };
    let mut place = 0;
    for &(size, stride) in faster.iter().rev() {
        place += index % size * stride;
        index /= size;
    }
    place + index * slowest
}

/// For dtypes that kernels do not compute in.
pub fn unsupported(dtype: DType) -> Error {
    Error::other(format!("{} is not supported here; use f32, f16 or bf16", dtype.as_str()))
}
