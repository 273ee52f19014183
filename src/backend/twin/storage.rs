//! candle's traits and ours over two storages: each method runs on both. Separate because the
//! forwarding is long and says nothing new.

use candle_core::backend::BackendStorage;
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, Layout, Result};

use super::{Device, Operand};
use crate::backend::{Backend, Fused, View};
use crate::error::Error;

/// A buffer on each of two devices; their contents are equal.
#[derive(Debug)]
pub struct Storage<A: Backend, B: Backend> {
    pub(super) a: A,
    pub(super) b: B,
    pub(super) device: Device<A, B>,
    /// Number and name of the op that made it, or wrote into it last.
    pub(super) made_by: (u64, &'static str),
}

impl<A: Backend, B: Backend> Storage<A, B> {
    /// How an op's report names it.
    fn operand(&self, layout: Option<&Layout>) -> Operand {
        Operand { dtype: self.dtype(), layout: layout.cloned(), made_by: self.made_by }
    }
}

/// Runs an op that makes a buffer: of each named storage, `$run` sees first the second device's,
/// which may run behind, then the first one's.
macro_rules! both {
    (
        $name:expr, $attributes:expr, [$($x:ident = $storage:ident at $layout:expr),+], $run:expr
    ) => {{
        let operands = vec![$($storage.operand(Some($layout))),+];
        let device = [$(&$storage.device),+][0];
        let call = device.call($name, $attributes, operands);
        let b = { $(let $x = &$storage.b;)+ $run };
        let a = { $(let $x = &$storage.a;)+ $run };
        Ok(device.join(call, a, b)?)
    }};
}

/// Runs an op that writes into a buffer.
macro_rules! in_place {
    (
        $name:literal, $attributes:expr, $target:ident = $into:ident at $into_layout:expr,
        [$($x:ident = $storage:ident at $layout:expr),*], $run:expr
    ) => {{
        let operands = vec![$into.operand($into_layout), $($storage.operand($layout)),*];
        let device = $into.device.clone();
        let call = device.call($name, $attributes, operands);
        let b = { let $target = &mut $into.b; $(let $x = &$storage.b;)* $run };
        let a = { let $target = &mut $into.a; $(let $x = &$storage.a;)* $run };
        device.done(&call, a, b)?;
        $into.made_by = call.id();
        if let Some(b) = device.judge(call, &$into.a, &$into.b)? {
            $into.b = b;
        }
        Ok(())
    }};
}

/// Of ops without attributes.
const NONE: String = String::new();

impl<A: Backend, B: Backend> Backend for Storage<A, B> {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> crate::Result<Self> {
        let Some(first) = args.first() else {
            return Err(Error::other(format!("{} of nothing", op.name())));
        };
        let device = &first.storage.device;
        let operands = args.iter().map(|view| view.storage.operand(Some(view.layout))).collect();
        let call = device.call(op.name(), attributes(op), operands);
        let b = args.iter().map(|view| View { storage: &view.storage.b, layout: view.layout });
        let b = B::fused(op, &b.collect::<Vec<_>>());
        let a = args.iter().map(|view| View { storage: &view.storage.a, layout: view.layout });
        let a = A::fused(op, &a.collect::<Vec<_>>());
        if let Fused::Prepare(_) = op {
            let made_by = call.id();
            let (a, b) = device.done(&call, a, b)?;
            return Ok(Self { a, b, device: device.clone(), made_by });
        }
        device.join(call, a, b)
    }

    fn held_bytes(&self) -> Option<u64> {
        self.a.held_bytes()
    }
}

/// What a report says of an op beside its name.
fn attributes(op: &Fused) -> String {
    match op {
        Fused::Conv2d(conv) => format!("{conv:?}"),
        Fused::GroupNorm(norm) => format!("{norm:?}"),
        Fused::LayerNorm(norm) => format!("{norm:?}"),
        Fused::Attention(attention) => format!("{attention:?}"),
        Fused::Linear(linear) => format!("{linear:?}"),
        Fused::Geglu | Fused::Pixels => NONE,
        Fused::LinearCombination(coefficients) => format!("{coefficients:?}"),
        Fused::Cat { dim } => format!("dim {dim}"),
        Fused::Prepare(role) => format!("{role:?}"),
    }
}

impl<A: Backend, B: Backend> BackendStorage for Storage<A, B> {
    type Device = Device<A, B>;

    fn try_clone(&self, l: &Layout) -> Result<Self> {
        both!("copy", NONE, [x = self at l], x.try_clone(l))
    }

    fn dtype(&self) -> DType {
        self.a.dtype()
    }

    fn device(&self) -> &Device<A, B> {
        &self.device
    }

    /// The first device's, which the second one's are equal to.
    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        self.a.to_cpu_storage()
    }

    fn affine(&self, l: &Layout, mul: f64, add: f64) -> Result<Self> {
        both!("affine", format!("mul {mul}, add {add}"), [x = self at l], x.affine(l, mul, add))
    }

    fn powf(&self, l: &Layout, exponent: f64) -> Result<Self> {
        both!("powf", format!("exponent {exponent}"), [x = self at l], x.powf(l, exponent))
    }

    fn elu(&self, l: &Layout, alpha: f64) -> Result<Self> {
        both!("elu", format!("alpha {alpha}"), [x = self at l], x.elu(l, alpha))
    }

    fn reduce_op(&self, op: ReduceOp, l: &Layout, dims: &[usize]) -> Result<Self> {
        both!("reduce", format!("{op:?} over {dims:?}"), [x = self at l], x.reduce_op(op, l, dims))
    }

    fn cmp(&self, op: CmpOp, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let sign = match op {
            CmpOp::Eq => "==",
            CmpOp::Ne => "!=",
            CmpOp::Le => "<=",
            CmpOp::Ge => ">=",
            CmpOp::Lt => "<",
            CmpOp::Gt => ">",
        };
        both!("compare", sign.into(), [x = self at l, y = rhs at rhs_l], x.cmp(op, y, l, rhs_l))
    }

    fn to_dtype(&self, l: &Layout, dtype: DType) -> Result<Self> {
        both!("cast", format!("to {}", dtype.as_str()), [x = self at l], x.to_dtype(l, dtype))
    }

    fn unary_impl<U: UnaryOpT>(&self, l: &Layout) -> Result<Self> {
        both!(U::NAME, NONE, [x = self at l], x.unary_impl::<U>(l))
    }

    fn binary_impl<O: BinaryOpT>(&self, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        both!(O::NAME, NONE, [x = self at l, y = rhs at rhs_l], x.binary_impl::<O>(y, l, rhs_l))
    }

    fn where_cond(
        &self,
        l: &Layout,
        yes: &Self,
        yes_l: &Layout,
        no: &Self,
        no_l: &Layout,
    ) -> Result<Self> {
        both!(
            "where",
            NONE,
            [x = self at l, y = yes at yes_l, n = no at no_l],
            x.where_cond(l, y, yes_l, n, no_l)
        )
    }

    fn conv1d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv1D) -> Result<Self> {
        both!("conv1d", format!("{p:?}"), [x = self at l, k = k at k_l], x.conv1d(l, k, k_l, p))
    }

    fn conv_transpose1d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose1D,
    ) -> Result<Self> {
        both!(
            "conv_transpose1d",
            format!("{p:?}"),
            [x = self at l, k = k at k_l],
            x.conv_transpose1d(l, k, k_l, p)
        )
    }

    fn conv2d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv2D) -> Result<Self> {
        both!("conv2d", format!("{p:?}"), [x = self at l, k = k at k_l], x.conv2d(l, k, k_l, p))
    }

    fn conv_transpose2d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose2D,
    ) -> Result<Self> {
        both!(
            "conv_transpose2d",
            format!("{p:?}"),
            [x = self at l, k = k at k_l],
            x.conv_transpose2d(l, k, k_l, p)
        )
    }

    fn avg_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        let attributes = format!("kernel {k:?}, stride {s:?}");
        both!("avg_pool2d", attributes, [x = self at l], x.avg_pool2d(l, k, s))
    }

    fn max_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        let attributes = format!("kernel {k:?}, stride {s:?}");
        both!("max_pool2d", attributes, [x = self at l], x.max_pool2d(l, k, s))
    }

    fn upsample_nearest1d(&self, l: &Layout, width: usize) -> Result<Self> {
        let attributes = format!("to {width}");
        both!("upsample_nearest1d", attributes, [x = self at l], x.upsample_nearest1d(l, width))
    }

    fn upsample_nearest2d(&self, l: &Layout, height: usize, width: usize) -> Result<Self> {
        both!(
            "upsample_nearest2d",
            format!("to {height} × {width}"),
            [x = self at l],
            x.upsample_nearest2d(l, height, width)
        )
    }

    fn upsample_bilinear2d(
        &self,
        l: &Layout,
        height: usize,
        width: usize,
        align_corners: bool,
        scale_h: Option<f64>,
        scale_w: Option<f64>,
    ) -> Result<Self> {
        both!(
            "upsample_bilinear2d",
            format!(
                "to {height} × {width}, align_corners {align_corners}, scales {scale_h:?}, \
                 {scale_w:?}"
            ),
            [x = self at l],
            x.upsample_bilinear2d(l, height, width, align_corners, scale_h, scale_w)
        )
    }

    fn gather(&self, l: &Layout, ids: &Self, ids_l: &Layout, dim: usize) -> Result<Self> {
        let attributes = format!("dim {dim}");
        both!("gather", attributes, [x = self at l, i = ids at ids_l], x.gather(l, i, ids_l, dim))
    }

    fn scatter_set(
        &mut self,
        l: &Layout,
        ids: &Self,
        ids_l: &Layout,
        src: &Self,
        src_l: &Layout,
        dim: usize,
    ) -> Result<()> {
        in_place!(
            "scatter_set",
            format!("dim {dim}"),
            x = self at Some(l),
            [i = ids at Some(ids_l), s = src at Some(src_l)],
            x.scatter_set(l, i, ids_l, s, src_l, dim)
        )
    }

    fn scatter_add_set(
        &mut self,
        l: &Layout,
        ids: &Self,
        ids_l: &Layout,
        src: &Self,
        src_l: &Layout,
        dim: usize,
    ) -> Result<()> {
        in_place!(
            "scatter_add_set",
            format!("dim {dim}"),
            x = self at Some(l),
            [i = ids at Some(ids_l), s = src at Some(src_l)],
            x.scatter_add_set(l, i, ids_l, s, src_l, dim)
        )
    }

    fn index_select(&self, ids: &Self, l: &Layout, ids_l: &Layout, dim: usize) -> Result<Self> {
        both!(
            "index_select",
            format!("dim {dim}"),
            [x = self at l, i = ids at ids_l],
            x.index_select(i, l, ids_l, dim)
        )
    }

    fn index_add(
        &self,
        l: &Layout,
        ids: &Self,
        ids_l: &Layout,
        src: &Self,
        src_l: &Layout,
        dim: usize,
    ) -> Result<Self> {
        both!(
            "index_add",
            format!("dim {dim}"),
            [x = self at l, i = ids at ids_l, s = src at src_l],
            x.index_add(l, i, ids_l, s, src_l, dim)
        )
    }

    fn matmul(
        &self,
        rhs: &Self,
        bmnk: (usize, usize, usize, usize),
        l: &Layout,
        rhs_l: &Layout,
    ) -> Result<Self> {
        both!("matmul", NONE, [x = self at l, y = rhs at rhs_l], x.matmul(y, bmnk, l, rhs_l))
    }

    fn copy_strided_src(&self, dst: &mut Self, offset: usize, l: &Layout) -> Result<()> {
        in_place!(
            "copy_strided",
            format!("to offset {offset}"),
            target = dst at None,
            [x = self at Some(l)],
            x.copy_strided_src(target, offset, l)
        )
    }

    fn copy2d(
        &self,
        dst: &mut Self,
        rows: usize,
        columns: usize,
        src_stride: usize,
        dst_stride: usize,
        src_offset: usize,
        dst_offset: usize,
    ) -> Result<()> {
        in_place!(
            "copy2d",
            format!(
                "{rows} × {columns}, strides {src_stride} to {dst_stride}, offsets {src_offset} \
                 to {dst_offset}"
            ),
            target = dst at None,
            [x = self at None],
            x.copy2d(target, rows, columns, src_stride, dst_stride, src_offset, dst_offset)
        )
    }

    fn const_set(&mut self, value: Scalar, l: &Layout) -> Result<()> {
        in_place!("const_set", format!("{value:?}"), x = self at Some(l), [], x.const_set(value, l))
    }
}
