//! Running a checked op on any backend: one exhaustive match from the table to candle's traits and
//! ours. Separate because it is the only place of the remote side that is generic over `Backend`.

use candle_core::backend::BackendDevice;
use candle_core::op as candle;
use candle_core::scalar::Scalar;
use candle_core::{DType, Layout, Shape};
use half::{bf16, f16};

use super::{Binary, Copy2d, Op, Unary};
use crate::backend::elements::from_bytes;
use crate::backend::{Backend, Device, View};
use crate::error::{Error, Result};

/// Runs an op that makes a buffer. `infer` has accepted the operands.
///
/// `Received` and `Weight` are not for here: what arrives from outside is the session's business.
///
/// # Errors
/// Whatever the backend cannot do.
pub fn execute<B: Backend>(op: &Op, device: &B::Device, args: &[View<'_, B>]) -> Result<B> {
    match args {
        [] => create(op, device),
        [x, rest @ ..] => compute(op, *x, rest, args),
    }
}

fn create<B: Backend>(op: &Op, device: &B::Device) -> Result<B> {
    match op {
        Op::Zeros { dtype, dims } => Ok(device.zeros_impl(&shape(dims), *dtype)?),
        Op::Randn { noise, dtype, dims } => device.randn(*noise, &shape(dims), *dtype),
        Op::RandUniform { from, to, dtype, dims } => {
            Ok(device.rand_uniform(&shape(dims), *dtype, *from, *to)?)
        }
        Op::RandNormal { mean, std, dtype, dims } => {
            Ok(device.rand_normal(&shape(dims), *dtype, *mean, *std)?)
        }
        Op::Constant { dtype, bytes } => {
            Ok(device.storage_from_cpu_storage_owned(from_bytes(*dtype, bytes)?)?)
        }
        op => Err(misplaced(op)),
    }
}

fn compute<B: Backend>(
    op: &Op,
    x: View<'_, B>,
    rest: &[View<'_, B>],
    all: &[View<'_, B>],
) -> Result<B> {
    let (s, l) = (x.storage, x.layout);
    let result = match (op, rest) {
        (Op::Affine { mul, add }, []) => s.affine(l, *mul, *add),
        (Op::Powf { exponent }, []) => s.powf(l, *exponent),
        (Op::Elu { alpha }, []) => s.elu(l, *alpha),
        (Op::Reduce { op, dims }, []) => s.reduce_op((*op).into(), l, dims),
        (Op::Compare(op), [y]) => s.cmp((*op).into(), y.storage, l, y.layout),
        (Op::Cast { dtype }, []) => s.to_dtype(l, *dtype),
        (Op::Unary(op), []) => unary(*op, x),
        (Op::Binary(op), [y]) => binary(*op, x, *y),
        (Op::Where, [yes, no]) => s.where_cond(l, yes.storage, yes.layout, no.storage, no.layout),
        (Op::AvgPool2d { kernel, stride }, []) => {
            s.avg_pool2d(l, (kernel.height, kernel.width), (stride.height, stride.width))
        }
        (Op::MaxPool2d { kernel, stride }, []) => {
            s.max_pool2d(l, (kernel.height, kernel.width), (stride.height, stride.width))
        }
        (Op::UpsampleNearest1d { width }, []) => s.upsample_nearest1d(l, *width),
        (Op::UpsampleNearest2d { size }, []) => s.upsample_nearest2d(l, size.height, size.width),
        (Op::UpsampleBilinear2d { size, align_corners, scale_height, scale_width }, []) => s
            .upsample_bilinear2d(
                l,
                size.height,
                size.width,
                *align_corners,
                *scale_height,
                *scale_width,
            ),
        (Op::Gather { dim }, [ids]) => s.gather(l, ids.storage, ids.layout, *dim),
        (Op::IndexSelect { dim }, [ids]) => s.index_select(ids.storage, l, ids.layout, *dim),
        (Op::IndexAdd { dim }, [ids, src]) => {
            s.index_add(l, ids.storage, ids.layout, src.storage, src.layout, *dim)
        }
        (Op::Matmul, [y]) => s.matmul(y.storage, batch_m_n_k(l, y.layout)?, l, y.layout),
        (Op::Copy, []) => s.try_clone(l),
        (Op::Fused(op), _) => return B::fused(op, all),
        (op, _) => return Err(misplaced(op)),
    };
    Ok(result?)
}

/// Runs an op that writes into its first operand.
///
/// # Errors
/// Whatever the backend cannot do.
pub fn execute_in_place<B: Backend>(
    op: &Op,
    target: &mut B,
    layout: &Layout,
    args: &[View<'_, B>],
) -> Result<()> {
    match (op, args) {
        (Op::ScatterSet { dim }, [ids, src]) => {
            target.scatter_set(layout, ids.storage, ids.layout, src.storage, src.layout, *dim)?;
        }
        (Op::ScatterAddSet { dim }, [ids, src]) => {
            target.scatter_add_set(
                layout,
                ids.storage,
                ids.layout,
                src.storage,
                src.layout,
                *dim,
            )?;
        }
        (Op::CopyStrided { offset }, [src]) => {
            src.storage.copy_strided_src(target, *offset, src.layout)?;
        }
        // Rows of nothing may be many and far apart.
        (Op::Copy2d(Copy2d { rows: 0, .. } | Copy2d { columns: 0, .. }), [_]) => {}
        (Op::Copy2d(copy), [src]) => {
            let Copy2d {
                rows,
                columns,
                source_stride,
                target_stride,
                source_offset,
                target_offset,
            } = *copy;
            src.storage.copy2d(
                target,
                rows,
                columns,
                source_stride,
                target_stride,
                source_offset,
                target_offset,
            )?;
        }
        (Op::ConstSet { value }, []) => {
            target.const_set(scalar(target.dtype(), *value)?, layout)?;
        }
        (op, _) => return Err(misplaced(op)),
    }
    Ok(())
}

fn misplaced(op: &Op) -> Error {
    Error::other(format!("{} cannot run with these operands", op.name()))
}

fn shape(dims: &[usize]) -> Shape {
    Shape::from(dims.to_vec())
}

/// What candle wants beside the layouts, of matrices that `infer` has accepted.
pub fn batch_m_n_k(a: &Layout, b: &Layout) -> Result<(usize, usize, usize, usize)> {
    match (a.dims().split_last_chunk::<2>(), b.dims().split_last_chunk::<2>()) {
        (Some((batch, &[m, k])), Some((_, &[_, n]))) => Ok((batch.iter().product(), m, n, k)),
        _ => Err(Error::other("matmul takes matrices")),
    }
}

fn unary<B: Backend>(op: Unary, View { storage, layout }: View<'_, B>) -> candle_core::Result<B> {
    match op {
        Unary::Exp => storage.unary_impl::<candle::Exp>(layout),
        Unary::Log => storage.unary_impl::<candle::Log>(layout),
        Unary::Sin => storage.unary_impl::<candle::Sin>(layout),
        Unary::Cos => storage.unary_impl::<candle::Cos>(layout),
        Unary::Abs => storage.unary_impl::<candle::Abs>(layout),
        Unary::Neg => storage.unary_impl::<candle::Neg>(layout),
        Unary::Recip => storage.unary_impl::<candle::Recip>(layout),
        Unary::Sqr => storage.unary_impl::<candle::Sqr>(layout),
        Unary::Sqrt => storage.unary_impl::<candle::Sqrt>(layout),
        Unary::Gelu => storage.unary_impl::<candle::Gelu>(layout),
        Unary::GeluErf => storage.unary_impl::<candle::GeluErf>(layout),
        Unary::Erf => storage.unary_impl::<candle::Erf>(layout),
        Unary::Relu => storage.unary_impl::<candle::Relu>(layout),
        Unary::Silu => storage.unary_impl::<candle::Silu>(layout),
        Unary::Tanh => storage.unary_impl::<candle::Tanh>(layout),
        Unary::Floor => storage.unary_impl::<candle::Floor>(layout),
        Unary::Ceil => storage.unary_impl::<candle::Ceil>(layout),
        Unary::Round => storage.unary_impl::<candle::Round>(layout),
        Unary::Sign => storage.unary_impl::<candle::Sign>(layout),
    }
}

fn binary<B: Backend>(op: Binary, a: View<'_, B>, b: View<'_, B>) -> candle_core::Result<B> {
    let (s, l) = (a.storage, a.layout);
    match op {
        Binary::Add => s.binary_impl::<candle::Add>(b.storage, l, b.layout),
        Binary::Sub => s.binary_impl::<candle::Sub>(b.storage, l, b.layout),
        Binary::Mul => s.binary_impl::<candle::Mul>(b.storage, l, b.layout),
        Binary::Div => s.binary_impl::<candle::Div>(b.storage, l, b.layout),
        Binary::Maximum => s.binary_impl::<candle::Maximum>(b.storage, l, b.layout),
        Binary::Minimum => s.binary_impl::<candle::Minimum>(b.storage, l, b.layout),
    }
}

fn scalar(dtype: DType, value: f64) -> Result<Scalar> {
    Ok(match dtype {
        DType::U8 => Scalar::U8(value as u8),
        DType::U32 => Scalar::U32(value as u32),
        DType::I64 => Scalar::I64(value as i64),
        DType::BF16 => Scalar::BF16(bf16::from_f64(value)),
        DType::F16 => Scalar::F16(f16::from_f64(value)),
        DType::F32 => Scalar::F32(value as f32),
        DType::F64 => Scalar::F64(value),
        other => return Err(Error::other(format!("{} does not travel", other.as_str()))),
    })
}
