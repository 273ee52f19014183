//! Kernels that look at one place at a time, and copies of views: the ops of candle that models
//! use. Separate from the fused ops because these serve those as well.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout};

use super::arguments::{Arguments, View, int};
use super::driver::{Address, Launch, Numbers, Source};
use super::sources::{COPY, ELEMENT, MATMUL};
use super::{Device, Storage};
use crate::backend::order::dense_in_order;
use crate::error::Result;

/// Blocks of elementwise kernels at most: enough for any GPU, and each goes on.
const MOST_BLOCKS: usize = 2048;
/// Threads of a block, of all kernels here.
const THREADS: u32 = 256;
/// Elements that a block takes at once.
const BLOCK_ELEMENTS: usize = 1024;
/// Rows and columns of a product that a block computes.
const PRODUCT_TILE: usize = 32;
/// Blocks of a grid at most, but in x.
const MOST_BLOCKS_DOWN: usize = 65535;

/// The numbers of a float type that kernels compute with.
pub(super) fn numbers(dtype: DType) -> Option<Numbers> {
    match dtype {
        DType::F32 => Some(Numbers::F32),
        DType::F16 => Some(Numbers::F16),
        DType::BF16 => Some(Numbers::Bf16),
        _ => None,
    }
}

/// What the kernels call a type.
fn code(dtype: DType) -> Option<i32> {
    match dtype {
        DType::F32 => Some(0),
        DType::F16 => Some(1),
        DType::BF16 => Some(2),
        DType::U8 => Some(3),
        DType::U32 => Some(4),
        DType::I64 => Some(5),
        _ => None,
    }
}

impl Device {
    /// Launches a kernel of [`ELEMENT`] or [`COPY`] for so many elements.
    pub(super) fn launch_elements(
        &self,
        (source, kernel): (Source, &'static str),
        numbers: Numbers,
        elements: usize,
        argument: Vec<u8>,
    ) -> Result<()> {
        if elements == 0 {
            return Ok(());
        }
        let blocks = elements.div_ceil(BLOCK_ELEMENTS).min(MOST_BLOCKS) as u32;
        let grid = [blocks, 1, 1];
        self.launch(Launch {
            source,
            numbers,
            kernel,
            grid,
            block: THREADS,
            shared_bytes: 0,
            argument,
        })
    }
}

/// The order of dimensions as they are.
pub(super) fn in_order(layout: &Layout) -> Vec<usize> {
    (0..layout.dims().len()).collect()
}

/// A layout as (batch, rows, columns); None if its batch is not of one stride.
fn matrices(layout: &Layout, batch: usize, rows: usize, columns: usize) -> Option<View> {
    let (dims, stride) = (layout.dims(), layout.stride());
    let matrix = dims.len().checked_sub(2)?;
    int(batch)?;
    let outer = dims.iter().zip(stride).take(matrix).filter(|(dim, _)| **dim != 1);
    let outer: Vec<_> = outer.collect();
    let step = outer.last().map_or(0, |(_, step)| **step);
    let is_one = outer.windows(2).all(|pair| *pair[0].1 == pair[1].0 * pair[1].1);
    let stride = [step, stride[matrix], stride[matrix + 1]];
    let view = Layout::new((batch, rows, columns).into(), stride.into(), layout.start_offset());
    View::of(&view).filter(|_| is_one)
}

impl Storage {
    /// The elements of a view, stored in `order`: a copy. None if no kernel does it.
    pub(super) fn copied(&self, layout: &Layout, order: &[usize]) -> Option<Result<Self>> {
        let target = dense_in_order(layout.dims(), order);
        let made = self.device().elements(self.dtype(), layout.shape().elem_count());
        let result = match made {
            Ok(result) => result,
            Err(error) => return Some(Err(error)),
        };
        let copied = result.take(&target, self, layout)?;
        Some(copied.map(|()| result))
    }

    /// Copies a view of another buffer into a view of this one; None if no kernel does it.
    pub(super) fn take(
        &self,
        layout: &Layout,
        source: &Self,
        source_layout: &Layout,
    ) -> Option<Result<()>> {
        let kernel = match self.dtype().size_in_bytes() {
            1 => "copy_view_1",
            2 => "copy_view_2",
            4 => "copy_view_4",
            8 => "copy_view_8",
            _ => return None,
        };
        let elements = layout.shape().elem_count();
        let [from, to] = View::together([source_layout, layout], &in_order(layout))?;
        let argument = Arguments::default()
            .pointer(source.address())
            .pointer(self.address())
            .view(&from)
            .view(&to)
            .long(elements)
            .finish();
        let device = self.device();
        Some(device.launch_elements((COPY, kernel), Numbers::F32, elements, argument))
    }

    /// The elements of a view as another type, row-major; None if no kernel does it.
    pub(super) fn cast(&self, layout: &Layout, dtype: DType) -> Option<Result<Self>> {
        if dtype == self.dtype() {
            return self.copied(layout, &in_order(layout));
        }
        let (from, to) = (code(self.dtype())?, code(dtype)?);
        let elements = layout.shape().elem_count();
        let [view] = View::together([layout], &in_order(layout))?;
        Some(self.device().elements(dtype, elements).and_then(|result| {
            let argument = Arguments::default()
                .pointer(self.address())
                .pointer(result.address())
                .view(&view)
                .long(elements)
                .int(from)
                .int(to)
                .finish();
            let device = self.device();
            device.launch_elements((COPY, "cast"), Numbers::F32, elements, argument)?;
            Ok(result)
        }))
    }

    /// A kernel of [`ELEMENT`] with one operand; None if none does it.
    pub(super) fn unary(
        &self,
        kernel: &'static str,
        layout: &Layout,
        attributes: impl Fn(Arguments) -> Arguments,
    ) -> Option<Result<Self>> {
        let numbers = numbers(self.dtype())?;
        let elements = layout.shape().elem_count();
        let [view] = View::together([layout], &in_order(layout))?;
        Some(self.device().elements(self.dtype(), elements).and_then(|result| {
            let start = Arguments::default()
                .pointer(self.address())
                .pointer(result.address())
                .view(&view)
                .long(elements);
            let argument = attributes(start).finish();
            let device = self.device();
            device.launch_elements((ELEMENT, kernel), numbers, elements, argument)?;
            Ok(result)
        }))
    }

    /// An op of two operands by its number in the kernel; None if no kernel does it.
    pub(super) fn binary(
        &self,
        op: i32,
        layout: &Layout,
        (other, other_layout): (&Self, &Layout),
    ) -> Option<Result<Self>> {
        let numbers = numbers(self.dtype())?;
        let elements = layout.shape().elem_count();
        let [left, right] = View::together([layout, other_layout], &in_order(layout))?;
        Some(self.device().elements(self.dtype(), elements).and_then(|result| {
            let argument = Arguments::default()
                .pointer(self.address())
                .pointer(other.address())
                .pointer(result.address())
                .view(&left)
                .view(&right)
                .long(elements)
                .int(op)
                .finish();
            let device = self.device();
            device.launch_elements((ELEMENT, "binary"), numbers, elements, argument)?;
            Ok(result)
        }))
    }

    /// Entries of a dimension; None if no kernel does it. An index out of range gives zeros.
    pub(super) fn selected(
        &self,
        layout: &Layout,
        (ids, ids_layout): (&Self, &Layout),
        dim: usize,
    ) -> Option<Result<Self>> {
        let kernel = match self.dtype().size_in_bytes() {
            1 => "index_select_1",
            2 => "index_select_2",
            4 => "index_select_4",
            8 => "index_select_8",
            _ => return None,
        };
        let id_type = code(ids.dtype()).filter(|code| *code >= 3)?;
        let (first, end) = ids_layout.contiguous_offsets()?;
        let view = View::of(layout)?;
        let dims: usize =
            layout.dims().iter().enumerate().filter(|d| d.0 != dim).map(|d| d.1).product();
        let elements = dims.checked_mul(end - first)?;
        let ids_address = ids.at(first);
        let dim = int(dim)?;
        Some(self.device().elements(self.dtype(), elements).and_then(|result| {
            let argument = Arguments::default()
                .pointer(self.address())
                .pointer(ids_address)
                .pointer(result.address())
                .pointer(Address(0))
                .view(&view)
                .long(end - first)
                .int(dim)
                .int(id_type)
                .finish();
            let device = self.device();
            device.launch_elements((COPY, kernel), Numbers::F32, elements, argument)?;
            Ok(result)
        }))
    }

    /// A product of (batch, m, k) and (batch, k, n) matrices; None if no kernel does it.
    pub(super) fn product(
        &self,
        (batch, m, n, k): (usize, usize, usize, usize),
        layout: &Layout,
        (right, right_layout): (&Self, &Layout),
    ) -> Option<Result<Self>> {
        let numbers = numbers(self.dtype())?;
        let [left_view, right_view] =
            [(layout, m, k), (right_layout, k, n)].map(|(l, m, n)| matrices(l, batch, m, n));
        let (left_view, right_view) = (left_view?, right_view?);
        let (across, down) = (n.div_ceil(PRODUCT_TILE), m.div_ceil(PRODUCT_TILE));
        if down > MOST_BLOCKS_DOWN || batch > MOST_BLOCKS_DOWN {
            return None;
        }
        let grid = [across as u32, down as u32, batch as u32];
        Some(self.device().elements(self.dtype(), batch * m * n).and_then(|result| {
            let argument = Arguments::default()
                .pointer(self.address())
                .pointer(right.address())
                .pointer(result.address())
                .view(&left_view)
                .view(&right_view)
                .finish();
            if !grid.contains(&0) {
                self.device().launch(Launch {
                    source: MATMUL,
                    numbers,
                    kernel: "matmul",
                    grid,
                    block: THREADS,
                    shared_bytes: 0,
                    argument,
                })?;
            }
            Ok(result)
        }))
    }

    /// One value, by its bits, at every element of a view; None if no kernel does it.
    pub(super) fn filled(&self, layout: &Layout, bits: u64) -> Option<Result<()>> {
        let kernel = match self.dtype().size_in_bytes() {
            1 => "fill_1",
            2 => "fill_2",
            4 => "fill_4",
            8 => "fill_8",
            _ => return None,
        };
        let elements = layout.shape().elem_count();
        let [view] = View::together([layout], &in_order(layout))?;
        let argument =
            Arguments::default().pointer(self.address()).view(&view).long(elements).bits(bits);
        let device = self.device();
        let argument = argument.finish();
        Some(device.launch_elements((COPY, kernel), Numbers::F32, elements, argument))
    }
}
