//! What each op gives, or why its operands do not fit. Separate because this is the wall between
//! foreign numbers and kernels: the client uses it to go on without a reply, the worker to refuse.

use candle_core::{DType, Layout};

use super::{Binary, Copy2d, Op, Reduce};
use crate::backend::{Meta, MetaRef, Size2d, with_each};
use crate::error::{Error, Result};
use crate::remote::wire::{MAX_OPERANDS, MAX_RANK};

/// dtypes that a device computes with. The others of candle are storage formats of weights.
pub const DTYPES: &[DType] =
    &[DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];

/// What stands behind an operand: its view, and how many elements its whole buffer has.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// dtype and view.
    pub meta: MetaRef<'a>,
    /// Elements of the whole buffer.
    pub len: usize,
}

impl Op {
    /// dtype and whole layout of the result; for an op in place, of its target's view.
    ///
    /// Every layout has been checked to lie within its buffer. Never panics.
    ///
    /// # Errors
    /// Names the op and the shapes.
    pub fn infer(&self, args: &[Source<'_>]) -> Result<Meta> {
        let named = |reason: Error| reason.context(self.described(args));
        check_limits(args).map_err(named)?;
        match self {
            // It names itself.
            Op::Fused(op) => with_each(args, |arg| arg.meta, |metas| op.infer(metas)),
            op => op.infer_checked(args).map_err(named),
        }
    }

    /// The op's name and the shapes that it was asked to work on, for messages.
    pub fn described(&self, args: &[Source<'_>]) -> String {
        let shape =
            |arg: &Source<'_>| format!("{:?} {}", arg.meta.layout.dims(), arg.meta.dtype.as_str());
        let shapes = args.iter().map(shape).collect::<Vec<_>>().join(", ");
        format!("{} of ({shapes})", self.name())
    }

    fn infer_checked(&self, args: &[Source<'_>]) -> Result<Meta> {
        match self {
            Op::Affine { .. } => {
                let [x] = exactly(args)?;
                like(x, x.meta.dtype)
            }
            Op::Powf { .. } | Op::Elu { .. } | Op::Unary(_) => {
                let [x] = exactly(args)?;
                float(x)?;
                like(x, x.meta.dtype)
            }
            Op::Reduce { op, dims } => reduce(*op, dims, args),
            Op::Compare(_) => {
                let [a, b] = exactly(args)?;
                equal(a, b)?;
                like(a, DType::U8)
            }
            Op::Cast { dtype } => {
                let [x] = exactly(args)?;
                like(x, *dtype)
            }
            Op::Binary(op) => binary(*op, args),
            Op::Where => choose(args),
            Op::AvgPool2d { kernel, stride } | Op::MaxPool2d { kernel, stride } => {
                pool(*kernel, *stride, args)
            }
            Op::UpsampleNearest1d { width } => upsample_1d(*width, args),
            Op::UpsampleNearest2d { size } => upsample_2d(*size, args),
            Op::UpsampleBilinear2d { size, align_corners, scale_height, scale_width } => {
                // Where corners are aligned, scales are not looked at.
                let scales = [*scale_height, *scale_width].map(|s| s.filter(|_| !align_corners));
                bilinear_2d(*size, scales, args)
            }
            Op::Gather { dim } => gather(*dim, args),
            Op::IndexSelect { dim } => index_select(*dim, args),
            Op::IndexAdd { dim } => {
                let [x, ids, source] = exactly(args)?;
                index_add(*dim, x, ids, source)
            }
            Op::Matmul => matmul(args),
            Op::Copy => {
                let [x] = exactly(args)?;
                whole(x)
            }
            Op::Fused(op) => with_each(args, |arg| arg.meta, |metas| op.infer(metas)),
            Op::ScatterSet { dim } | Op::ScatterAddSet { dim } => {
                let [target, ids, source] = exactly(args)?;
                scatter(*dim, target, ids, source)
            }
            Op::CopyStrided { offset } => copy_strided(*offset, args),
            Op::Copy2d(copy) => copy2d(copy, args),
            Op::ConstSet { .. } => {
                let [target] = exactly(args)?;
                Ok(itself(target))
            }
            Op::Zeros { .. }
            | Op::Randn { .. }
            | Op::RandUniform { .. }
            | Op::RandNormal { .. }
            | Op::Constant { .. }
            | Op::Received { .. }
            | Op::Weight { .. } => {
                let [] = exactly(args)?;
                self.created()
            }
        }
    }

    /// What an op without operands makes.
    fn created(&self) -> Result<Meta> {
        let not_finite = || Error::other("the range is no range of numbers");
        match self {
            Op::Zeros { dtype, dims } | Op::Randn { dtype, dims, .. } => {
                Meta::row_major(*dtype, dims.clone())
            }
            Op::RandUniform { from, to, dtype, dims } => {
                let is_range = from.is_finite() && to.is_finite() && from < to;
                is_range.then_some(()).ok_or_else(not_finite)?;
                Meta::row_major(*dtype, dims.clone())
            }
            Op::RandNormal { mean, std, dtype, dims } => {
                let is_normal = mean.is_finite() && std.is_finite();
                is_normal.then_some(()).ok_or_else(not_finite)?;
                Meta::row_major(*dtype, dims.clone())
            }
            Op::Constant { dtype, bytes } => {
                let size = dtype.size_in_bytes();
                if !bytes.len().is_multiple_of(size) {
                    return Err(Error::other("half an element"));
                }
                Meta::row_major(*dtype, vec![bytes.len() / size])
            }
            Op::Received { dtype, len, .. } => Meta::row_major(*dtype, vec![*len]),
            Op::Weight { dtype, dims, .. } => {
                float_dtype(*dtype)?;
                Meta::row_major(*dtype, dims.clone())
            }
            computed => Err(Error::other(format!("{} has operands", computed.name()))),
        }
    }
}

/// What a call cannot carry is refused here, on the side that makes it.
fn check_limits(args: &[Source<'_>]) -> Result<()> {
    if args.len() > MAX_OPERANDS {
        return Err(Error::other(format!("more than {MAX_OPERANDS} operands")));
    }
    if args.iter().any(|arg| arg.meta.layout.dims().len() > MAX_RANK) {
        return Err(Error::other(format!("more than {MAX_RANK} dimensions")));
    }
    match args.iter().find(|arg| !DTYPES.contains(&arg.meta.dtype)) {
        Some(arg) => Err(Error::other(format!("{} does not travel", arg.meta.dtype.as_str()))),
        None => Ok(()),
    }
}

fn exactly<'a, const N: usize>(args: &[Source<'a>]) -> Result<[Source<'a>; N]> {
    args.try_into().map_err(|_| Error::other(format!("takes {N} operands, not {}", args.len())))
}

/// A dense row-major result of the operand's shape.
fn like(x: Source<'_>, dtype: DType) -> Result<Meta> {
    Meta::row_major(dtype, x.meta.layout.dims().to_vec())
}

fn itself(x: Source<'_>) -> Meta {
    Meta { dtype: x.meta.dtype, layout: x.meta.layout.clone() }
}

fn float(x: Source<'_>) -> Result<()> {
    float_dtype(x.meta.dtype)
}

fn float_dtype(dtype: DType) -> Result<()> {
    match dtype.is_float() {
        true => Ok(()),
        false => Err(Error::other(format!("{} is no float", dtype.as_str()))),
    }
}

fn index(x: Source<'_>) -> Result<()> {
    match x.meta.dtype {
        DType::U8 | DType::U32 | DType::I64 => Ok(()),
        other => Err(Error::other(format!("{} is no index", other.as_str()))),
    }
}

fn equal(a: Source<'_>, b: Source<'_>) -> Result<()> {
    if a.meta.layout.dims() != b.meta.layout.dims() || a.meta.dtype != b.meta.dtype {
        return Err(Error::other("the operands differ in shape or dtype"));
    }
    Ok(())
}

fn size_of(x: Source<'_>, dim: usize) -> Result<usize> {
    let size = x.meta.layout.dims().get(dim).copied();
    size.ok_or_else(|| Error::other(format!("there is no dimension {dim}")))
}

fn binary(op: Binary, args: &[Source<'_>]) -> Result<Meta> {
    let [a, b] = exactly(args)?;
    equal(a, b)?;
    if op == Binary::Div {
        float(a)?;
    }
    like(a, a.meta.dtype)
}

fn choose(args: &[Source<'_>]) -> Result<Meta> {
    let [condition, yes, no] = exactly(args)?;
    index(condition)?;
    equal(yes, no)?;
    if condition.meta.layout.dims() != yes.meta.layout.dims() {
        return Err(Error::other("the condition has another shape"));
    }
    like(yes, yes.meta.dtype)
}

fn reduce(op: Reduce, over: &[usize], args: &[Source<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    let mut dims = x.meta.layout.dims().to_vec();
    for (i, &dim) in over.iter().enumerate() {
        if size_of(x, dim)? == 0 || over[..i].contains(&dim) {
            return Err(Error::other(format!("dimension {dim} is empty or named twice")));
        }
        dims[dim] = 1;
    }
    let (single, dtype) = match op {
        Reduce::Sum => (false, x.meta.dtype),
        Reduce::Min | Reduce::Max => (true, x.meta.dtype),
        Reduce::ArgMin | Reduce::ArgMax => (true, DType::U32),
    };
    if single && over.len() != 1 {
        return Err(Error::other("takes one dimension"));
    }
    Meta::row_major(dtype, dims)
}

fn pool(kernel: Size2d, stride: Size2d, args: &[Source<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    let &[batch, channels, height, width] = x.meta.layout.dims() else {
        return Err(Error::other("the image must have 4 dimensions"));
    };
    let slide = |size: usize, kernel: usize, stride: usize| {
        let room = size.checked_sub(kernel).filter(|_| kernel > 0)?;
        Some(room.checked_div(stride)? + 1)
    };
    let out = slide(height, kernel.height, stride.height)
        .zip(slide(width, kernel.width, stride.width))
        .ok_or_else(|| Error::other("the window does not fit"))?;
    Meta::row_major(x.meta.dtype, vec![batch, channels, out.0, out.1])
}

fn upsample_1d(width: usize, args: &[Source<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    match *x.meta.layout.dims() {
        [batch, channels, from] if from > 0 && width > 0 => {
            Meta::row_major(x.meta.dtype, vec![batch, channels, width])
        }
        _ => Err(Error::other("takes (batch, channels, width), not empty")),
    }
}

fn bilinear_2d(size: Size2d, scales: [Option<f64>; 2], args: &[Source<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    float(x)?;
    let meta = upsample_2d(size, args)?;
    let from = x.meta.layout.dims().iter().skip(2);
    for ((&from, to), scale) in from.zip([size.height, size.width]).zip(scales) {
        // Where the last pixel comes from, as candle computes it.
        let last = scale.map_or(0.0, |scale| 1.0 / scale * (to as f64 - 0.5) - 0.5);
        if last.is_nan() || last >= from as f64 {
            return Err(Error::other(format!(
                "{from} pixels are not {to} at a scale of {scale:?}"
            )));
        }
    }
    Ok(meta)
}

/// A copy is of the whole buffer, in any order.
fn whole(x: Source<'_>) -> Result<Meta> {
    if x.meta.layout.shape().elem_count() != x.len {
        return Err(Error::other(format!("not the whole buffer of {}", x.len)));
    }
    like(x, x.meta.dtype)
}

fn upsample_2d(size: Size2d, args: &[Source<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    match *x.meta.layout.dims() {
        [batch, channels, height, width]
            if height > 0 && width > 0 && size.height > 0 && size.width > 0 =>
        {
            Meta::row_major(x.meta.dtype, vec![batch, channels, size.height, size.width])
        }
        _ => Err(Error::other("takes (batch, channels, height, width), not empty")),
    }
}

/// Equal but for one dimension.
fn equal_beside(dim: usize, a: &Layout, b: &Layout) -> bool {
    let (a, b) = (a.dims(), b.dims());
    a.len() == b.len() && (0..a.len()).all(|d| d == dim || a[d] == b[d])
}

fn gather(dim: usize, args: &[Source<'_>]) -> Result<Meta> {
    let [x, ids] = exactly(args)?;
    index(ids)?;
    size_of(x, dim)?;
    if !equal_beside(dim, x.meta.layout, ids.meta.layout) {
        return Err(Error::other(format!("the operands differ beside dimension {dim}")));
    }
    like(ids, x.meta.dtype)
}

fn index_select(dim: usize, args: &[Source<'_>]) -> Result<Meta> {
    let [x, ids] = exactly(args)?;
    index(ids)?;
    size_of(x, dim)?;
    let &[count] = ids.meta.layout.dims() else {
        return Err(Error::other("the indices must have 1 dimension"));
    };
    let mut dims = x.meta.layout.dims().to_vec();
    dims[dim] = count;
    Meta::row_major(x.meta.dtype, dims)
}

fn index_add(dim: usize, x: Source<'_>, ids: Source<'_>, source: Source<'_>) -> Result<Meta> {
    index(ids)?;
    if !equal_beside(dim, x.meta.layout, source.meta.layout) || x.meta.dtype != source.meta.dtype {
        return Err(Error::other(format!("the operands differ beside dimension {dim}")));
    }
    if ids.meta.layout.dims() != [size_of(source, dim)?] {
        return Err(Error::other("there must be an index for each entry"));
    }
    like(x, x.meta.dtype)
}

fn matmul(args: &[Source<'_>]) -> Result<Meta> {
    let [a, b] = exactly(args)?;
    float(a)?;
    let (Some((batch, &[m, k])), Some((b_batch, &[b_k, n]))) = (
        a.meta.layout.dims().split_last_chunk::<2>(),
        b.meta.layout.dims().split_last_chunk::<2>(),
    ) else {
        return Err(Error::other("takes matrices"));
    };
    if batch != b_batch || k != b_k || a.meta.dtype != b.meta.dtype || k == 0 {
        return Err(Error::other("the matrices do not fit"));
    }
    Meta::row_major(a.meta.dtype, [batch, &[m, n]].concat())
}

fn scatter(dim: usize, target: Source<'_>, ids: Source<'_>, source: Source<'_>) -> Result<Meta> {
    index(ids)?;
    let fits = equal_beside(dim, target.meta.layout, source.meta.layout)
        && ids.meta.layout.dims() == source.meta.layout.dims()
        && target.meta.dtype == source.meta.dtype;
    if !fits {
        return Err(Error::other(format!("the operands differ beside dimension {dim}")));
    }
    size_of(target, dim)?;
    Ok(itself(target))
}

fn copy_strided(offset: usize, args: &[Source<'_>]) -> Result<Meta> {
    let [target, source] = exactly(args)?;
    let end = offset.checked_add(source.meta.layout.shape().elem_count());
    if target.meta.dtype != source.meta.dtype || end.is_none_or(|end| end > target.len) {
        return Err(Error::other(format!("does not fit into {} elements", target.len)));
    }
    Ok(itself(target))
}

fn copy2d(copy: &Copy2d, args: &[Source<'_>]) -> Result<Meta> {
    let [target, source] = exactly(args)?;
    let within = |stride: usize, offset: usize, len: usize| {
        if copy.rows == 0 || copy.columns == 0 {
            return offset <= len;
        }
        let last = (copy.rows - 1).checked_mul(stride).and_then(|last| last.checked_add(offset));
        last.and_then(|last| last.checked_add(copy.columns)).is_some_and(|end| end <= len)
    };
    // Rows that overlap cost no memory, but work.
    let count = copy.rows.checked_mul(copy.columns);
    let fits = within(copy.source_stride, copy.source_offset, source.len)
        && within(copy.target_stride, copy.target_offset, target.len)
        && count.is_some_and(|count| count <= target.len)
        && target.meta.dtype == source.meta.dtype;
    if !fits {
        return Err(Error::other("the rows do not fit"));
    }
    Ok(itself(target))
}
