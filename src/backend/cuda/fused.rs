//! Our fused ops as launches. Separate because each op's operands are brought into the order that
//! its kernel reads, which says nothing about storages.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout};

use super::Storage;
use super::arguments::{Arguments, View, int};
use super::driver::{Address, Launch};
use super::launching::{in_order, numbers};
use super::sources::{ATTENTION, ELEMENT, NORM};
use crate::backend::View as Operand;
use crate::backend::fused::{Attention, Fused, GroupNorm, LayerNorm, Meta, MetaRef, Role};
use crate::backend::order::{channels_last, dense_in_order, memory_order};
use crate::backend::weighted::Weighted;
use crate::error::{Error, Result};

/// Terms of one launch of a linear combination.
const TERMS: usize = 8;
/// Pixels up to which a group is normalised in one launch.
const FEW_PIXELS: usize = 32 * 32;
/// Numbers of a chunk of an image that is normalised in three launches.
const CHUNK_NUMBERS: usize = 16384;
/// Numbers of a row from which on a block adds it up, and not a warp.
const LONG_ROW: usize = 4096;
/// The longest head that a kernel takes.
const LONGEST_HEAD: usize = 512;
/// Heads of which tensor cores have kernels of their own.
const HEADS: [(usize, &str); 5] = [
    (48, "attention_48"),
    (64, "attention_64"),
    (80, "attention_80"),
    (128, "attention_128"),
    (160, "attention_160"),
];

/// Runs an op: on the GPU if there is a kernel for these operands, else on the host.
///
/// # Errors
/// As [`Backend::fused`](crate::backend::Backend::fused).
pub(super) fn fused(op: &Fused, args: &[Operand<'_, Storage>]) -> Result<Storage> {
    if args.is_empty() {
        return Err(Error::other(format!("{} of nothing", op.name())));
    }
    match on_gpu(op, args) {
        Some(result) => result,
        None => Storage::fused_on_host(op, args),
    }
}

fn on_gpu(op: &Fused, args: &[Operand<'_, Storage>]) -> Option<Result<Storage>> {
    let [x, rest @ ..] = args else { return None };
    let bias = |place: usize| rest.get(place).copied();
    match op {
        Fused::Conv2d(attributes) => {
            let operands = Weighted::of(args, attributes.residual);
            Some(operands.and_then(|operands| attributes.launch(&operands)))
        }
        Fused::GroupNorm(attributes) => attributes.launch(*x, *rest.first()?, bias(1)?),
        Fused::LayerNorm(attributes) => attributes.launch(*x, *rest.first()?, bias(1)?),
        Fused::Attention(attributes) => attributes.launch(*x, *rest.first()?, bias(1)?),
        Fused::Linear(attributes) => {
            let operands = Weighted::of(args, attributes.residual);
            Some(operands.and_then(|operands| attributes.launch(&operands)))
        }
        Fused::Geglu => geglu(*x),
        Fused::LinearCombination(coefficients) => combination(coefficients, args),
        Fused::Cat { dim } => cat(*dim, op, args),
        Fused::Pixels => pixels(*x),
        Fused::Prepare(role) => prepare(*role, *x),
    }
}

/// A dense operand and where it begins: itself, if it lies so, or a copy.
pub(super) struct Dense {
    #[allow(dead_code, reason = "it keeps the memory until the launch")]
    pub copy: Option<Storage>,
    pub address: Address,
}

impl Dense {
    /// With its dimensions in this order in memory.
    fn in_order(x: Operand<'_, Storage>, order: &[usize]) -> Result<Self> {
        let wanted = dense_in_order(x.layout.dims(), order);
        let is_same =
            |d: usize| x.layout.dims()[d] == 1 || x.layout.stride()[d] == wanted.stride()[d];
        if (0..order.len()).all(is_same) {
            return Ok(Self { copy: None, address: x.storage.at(x.layout.start_offset()) });
        }
        let copied = x.storage.copied(x.layout, order);
        let copy = copied.unwrap_or_else(|| Err(too_odd(x.layout)))?;
        let address = copy.address();
        Ok(Self { copy: Some(copy), address })
    }

    pub fn row_major(x: Operand<'_, Storage>) -> Result<Self> {
        Self::in_order(x, &in_order(x.layout))
    }

    /// Pixel by pixel, the channels of each side by side.
    pub fn channels_last(x: Operand<'_, Storage>) -> Result<Self> {
        Self::in_order(x, &[0, 2, 3, 1])
    }

    /// Of an operand that may be missing.
    pub fn maybe<'a>(
        x: Option<Operand<'a, Storage>>,
        dense: impl FnOnce(Operand<'a, Storage>) -> Result<Self>,
    ) -> Result<Self> {
        match x {
            Some(x) => dense(x),
            None => Ok(Self { copy: None, address: Address(0) }),
        }
    }
}

fn too_odd(layout: &Layout) -> Error {
    let (dims, stride) = (layout.dims(), layout.stride());
    Error::other(format!("{dims:?} with strides {stride:?} has too many or too large dimensions"))
}

/// Sizes as a kernel counts them.
pub(super) fn ints<const N: usize>(sizes: [usize; N]) -> Result<[i32; N]> {
    let mut ints = [0; N];
    for (to, size) in ints.iter_mut().zip(sizes) {
        *to = int(size).ok_or_else(|| Error::other(format!("{size} is too large for a GPU")))?;
    }
    Ok(ints)
}

impl GroupNorm {
    fn launch(
        &self,
        x: Operand<'_, Storage>,
        weight: Operand<'_, Storage>,
        bias: Operand<'_, Storage>,
    ) -> Option<Result<Storage>> {
        let numbers = numbers(x.storage.dtype())?;
        let &[batch, channels, height, width] = x.layout.dims() else { return None };
        let pixels = height * width;
        let chunk = (CHUNK_NUMBERS / channels.max(1)).max(1);
        let chunks = pixels.div_ceil(chunk).max(1);
        let run = || -> Result<Storage> {
            let device = x.storage.device();
            let image = Dense::channels_last(x)?;
            let (weight, bias) = (Dense::row_major(weight)?, Dense::row_major(bias)?);
            let result = device.elements(x.storage.dtype(), x.layout.shape().elem_count())?;
            let is_small = pixels <= FEW_PIXELS;
            let partials = if is_small { 0 } else { batch * self.groups * chunks * 2 };
            let partials = device.elements(DType::F32, partials)?;
            let stats = if is_small { 0 } else { batch * self.groups * 2 };
            let stats = device.elements(DType::F32, stats)?;
            let [b, c, g, chunk, n] = ints([batch, channels, self.groups, chunk, chunks])?;
            let argument = Arguments::default()
                .pointer(image.address)
                .pointer(weight.address)
                .pointer(bias.address)
                .pointer(result.address())
                .pointer(partials.address())
                .pointer(stats.address())
                .long(pixels)
                .int(b)
                .int(c)
                .int(g)
                .int(chunk)
                .int(n)
                .int(i32::from(self.silu))
                .double(self.eps)
                .finish();
            let run = |kernel, blocks: usize, block, shared_bytes| -> Result<()> {
                let [blocks, images] = ints([blocks, batch])?;
                let grid = [blocks.cast_unsigned(), images.cast_unsigned(), 1];
                let source = NORM;
                let argument = argument.clone();
                device.launch(Launch {
                    source,
                    numbers,
                    kernel,
                    grid,
                    block,
                    shared_bytes,
                    argument,
                })
            };
            match (batch * pixels, is_small) {
                (0, _) => {}
                (_, true) => run("group_norm", self.groups, 256, 0)?,
                (_, false) => {
                    let [shared] = ints([4 * (channels.max(1024) + self.groups)])?;
                    run("group_norm_partials", chunks, 256, shared.cast_unsigned())?;
                    run("group_norm_combine", self.groups, 128, 0)?;
                    let most = 16 * device.multiprocessors();
                    let blocks = (pixels * channels).div_ceil(1024).min(most);
                    run("group_norm_apply", blocks, 256, 0)?;
                }
            }
            Ok(result)
        };
        Some(run())
    }
}

impl LayerNorm {
    fn launch(
        &self,
        x: Operand<'_, Storage>,
        weight: Operand<'_, Storage>,
        bias: Operand<'_, Storage>,
    ) -> Option<Result<Storage>> {
        let numbers = numbers(x.storage.dtype())?;
        let size = int(*x.layout.dims().last()?)?;
        let run = || -> Result<Storage> {
            let device = x.storage.device();
            let input = Dense::row_major(x)?;
            let (weight, bias) = (Dense::row_major(weight)?, Dense::row_major(bias)?);
            let elements = x.layout.shape().elem_count();
            let result = device.elements(x.storage.dtype(), elements)?;
            let rows = elements / size as usize;
            let argument = Arguments::default()
                .pointer(input.address)
                .pointer(weight.address)
                .pointer(bias.address)
                .pointer(result.address())
                .long(rows)
                .int(size)
                .double(self.eps)
                .finish();
            let [blocks] = ints([rows.div_ceil(8)])?;
            if rows > 0 {
                device.launch(Launch {
                    source: NORM,
                    numbers,
                    kernel: "layer_norm",
                    grid: [blocks.cast_unsigned(), 1, 1],
                    block: 256,
                    shared_bytes: 0,
                    argument,
                })?;
            }
            Ok(result)
        };
        Some(run())
    }
}

impl Attention {
    fn launch(
        &self,
        query: Operand<'_, Storage>,
        key: Operand<'_, Storage>,
        value: Operand<'_, Storage>,
    ) -> Option<Result<Storage>> {
        let dtype = query.storage.dtype();
        let numbers = numbers(dtype)?;
        let &[batch, queries, inner] = query.layout.dims() else { return None };
        let keys = *key.layout.dims().get(1)?;
        let head_dim = inner / self.heads;
        if head_dim > LONGEST_HEAD {
            return None;
        }
        let device = query.storage.device();
        let has_tensor_cores = device.multiplies_halves(dtype) && head_dim.is_multiple_of(8);
        let (kernel, tile, block) = HEADS
            .iter()
            .find(|(most, _)| has_tensor_cores && head_dim <= *most)
            .map_or(("attention_general", 32, 256), |(_, kernel)| (*kernel, 64, 128));
        let run = || -> Result<Storage> {
            let rows = [query, key, value].map(Rows::of);
            let [query, key, value] = rows;
            let (query, key, value) = (query?, key?, value?);
            let result = device.elements(dtype, batch * queries * inner)?;
            let start = Arguments::default()
                .pointer(query.address)
                .pointer(key.address)
                .pointer(value.address)
                .pointer(result.address());
            let strides = [&query, &key, &value]
                .into_iter()
                .fold(start, |all, rows| all.long(rows.batch_stride).long(rows.row_stride));
            let sizes = ints([batch, self.heads, head_dim, queries, keys])?;
            let argument = sizes
                .into_iter()
                .fold(strides, Arguments::int)
                .int(i32::from(self.causal))
                .float(self.scale as f32)
                .finish();
            let [blocks, heads, images] = ints([queries.div_ceil(tile), self.heads, batch])?;
            if batch * queries > 0 {
                device.launch(Launch {
                    source: ATTENTION,
                    numbers,
                    kernel,
                    grid: [blocks, heads, images].map(i32::cast_unsigned),
                    block,
                    shared_bytes: 0,
                    argument,
                })?;
            }
            Ok(result)
        };
        Some(run())
    }
}

/// An operand of attention, whose rows are dense.
struct Rows {
    #[allow(dead_code, reason = "it keeps the memory until the launch")]
    copy: Option<Storage>,
    address: Address,
    batch_stride: usize,
    row_stride: usize,
}

impl Rows {
    fn of(x: Operand<'_, Storage>) -> Result<Self> {
        let &[_, rows, inner] = x.layout.dims() else {
            return Err(Error::other("an operand of attention has 3 dimensions"));
        };
        if let &[batch_stride, row_stride, 1] = x.layout.stride() {
            let address = x.storage.at(x.layout.start_offset());
            return Ok(Self { copy: None, address, batch_stride, row_stride });
        }
        let Dense { copy, address } = Dense::row_major(x)?;
        Ok(Self { copy, address, batch_stride: rows * inner, row_stride: inner })
    }
}

/// A sum, minimum or maximum, by its number in the kernel, over the last dimensions.
pub(super) fn reduced(
    code: i32,
    x: Operand<'_, Storage>,
    dims: &[usize],
) -> Option<Result<Storage>> {
    let numbers = numbers(x.storage.dtype())?;
    let (all, mut over) = (x.layout.dims(), dims.to_vec());
    over.sort_unstable();
    let first = all.len().checked_sub(over.len())?;
    if !over.iter().copied().eq(first..all.len()) {
        return None;
    }
    let rows: usize = all.get(..first)?.iter().product();
    let size: usize = all.get(first..)?.iter().product();
    if rows == 0 || size == 0 {
        return None;
    }
    let run = || -> Result<Storage> {
        let device = x.storage.device();
        let input = Dense::row_major(x)?;
        let result = device.elements(x.storage.dtype(), rows)?;
        let argument = Arguments::default()
            .pointer(input.address)
            .pointer(result.address())
            .long(rows)
            .long(size)
            .int(code)
            .finish();
        let (kernel, blocks, block) = match size > LONG_ROW {
            true => ("reduce_long", rows, 1024),
            false => ("reduce", rows.div_ceil(8), 256),
        };
        let [blocks] = ints([blocks])?;
        device.launch(Launch {
            source: NORM,
            numbers,
            kernel,
            grid: [blocks.cast_unsigned(), 1, 1],
            block,
            shared_bytes: 0,
            argument,
        })?;
        Ok(result)
    };
    Some(run())
}

fn geglu(x: Operand<'_, Storage>) -> Option<Result<Storage>> {
    let numbers = numbers(x.storage.dtype())?;
    let size = int(*x.layout.dims().last()? / 2)?;
    let run = || -> Result<Storage> {
        let device = x.storage.device();
        let input = Dense::row_major(x)?;
        let elements = x.layout.shape().elem_count() / 2;
        let result = device.elements(x.storage.dtype(), elements)?;
        let argument = Arguments::default()
            .pointer(input.address)
            .pointer(result.address())
            .long(elements / size as usize)
            .int(size)
            .finish();
        device.launch_elements((ELEMENT, "geglu"), numbers, elements, argument)?;
        Ok(result)
    };
    Some(run())
}

fn combination(coefficients: &[f64], args: &[Operand<'_, Storage>]) -> Option<Result<Storage>> {
    let first = args.first()?;
    let numbers = numbers(first.storage.dtype())?;
    if args.len() > TERMS {
        return None;
    }
    let order = memory_order(first.layout);
    // All of a launch's views have one shape: what is not there repeats the first.
    let layouts: [&Layout; TERMS] = std::array::from_fn(|i| args.get(i).unwrap_or(first).layout);
    let views = View::together(layouts, &order)?;
    let elements = first.layout.shape().elem_count();
    let device = first.storage.device();
    Some(device.elements(first.storage.dtype(), elements).and_then(|result| {
        let start = Arguments::default().pointer(result.address());
        let start = (0..TERMS)
            .fold(start, |all, i| all.pointer(args.get(i).unwrap_or(first).storage.address()));
        let start = views.iter().fold(start, Arguments::view);
        let coefficient = |i: usize| coefficients.get(i).copied().unwrap_or_default();
        let start = (0..TERMS).fold(start, |all, i| all.double(coefficient(i)));
        let [terms] = ints([args.len()])?;
        let argument = start.long(elements).int(terms).finish();
        let kernel = (ELEMENT, "linear_combination");
        device.launch_elements(kernel, numbers, elements, argument)?;
        Ok(result)
    }))
}

fn cat(dim: usize, op: &Fused, args: &[Operand<'_, Storage>]) -> Option<Result<Storage>> {
    let first = args.first()?;
    let metas: Vec<_> =
        args.iter().map(|arg| MetaRef { dtype: arg.storage.dtype(), layout: arg.layout }).collect();
    let Ok(Meta { layout, dtype }) = op.infer(&metas) else { return None };
    let result = match first.storage.device().elements(dtype, layout.shape().elem_count()) {
        Ok(result) => result,
        Err(error) => return Some(Err(error)),
    };
    let mut start = 0;
    for arg in args {
        let size = arg.layout.dims()[dim];
        let place = layout.narrow(dim, start, size).ok()?;
        if let Err(error) = result.take(&place, arg.storage, arg.layout)? {
            return Some(Err(error));
        }
        start += size;
    }
    Some(Ok(result))
}

fn pixels(x: Operand<'_, Storage>) -> Option<Result<Storage>> {
    let numbers = numbers(x.storage.dtype())?;
    let view = View::of(x.layout)?;
    let elements = x.layout.shape().elem_count();
    let device = x.storage.device();
    Some(device.elements(DType::U8, elements).and_then(|result| {
        let argument = Arguments::default()
            .pointer(x.storage.address())
            .pointer(result.address())
            .view(&view)
            .finish();
        device.launch_elements((ELEMENT, "pixels"), numbers, elements, argument)?;
        Ok(result)
    }))
}

/// Linear weights row by row, those of convolutions with the channels of each tap side by side.
fn prepare(role: Role, weight: Operand<'_, Storage>) -> Option<Result<Storage>> {
    let order = match role {
        Role::Linear => in_order(weight.layout),
        Role::Conv2d { .. } => memory_order(&channels_last(weight.layout.dims().try_into().ok()?)),
    };
    // Dimensions of size 1 have no place in an order; where they stand changes nothing.
    let copied = weight.storage.copied(weight.layout, &order)?;
    Some(copied.map(|copy| copy.prepared(role, weight.layout.dims())))
}
