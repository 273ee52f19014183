//! A CPU buffer: candle's, or a weight packed for our kernels. Separate because the forwarding of
//! candle's ops is long and says nothing new.

use candle_core::backend::BackendStorage;
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{Add, BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, Layout, Result, Shape};

use super::Device;
use super::kernels::{self, Packed};
use crate::backend::{Backend, Fused, View};

/// A buffer in this process's memory.
#[derive(Debug)]
pub struct Storage {
    data: Data,
    device: Device,
}

#[derive(Debug)]
enum Data {
    Plain(CpuStorage),
    /// Opaque to everything but the op it was prepared for.
    Packed(Packed),
}

impl Storage {
    pub(super) fn plain(plain: CpuStorage, device: Device) -> Self {
        Self { data: Data::Plain(plain), device }
    }

    /// The elements, unless this is a prepared weight.
    pub(super) fn elements(&self) -> Result<&CpuStorage> {
        match &self.data {
            Data::Plain(plain) => Ok(plain),
            Data::Packed(_) => candle_core::bail!("a prepared weight is not a tensor"),
        }
    }

    fn elements_mut(&mut self) -> Result<&mut CpuStorage> {
        match &mut self.data {
            Data::Plain(plain) => Ok(plain),
            Data::Packed(_) => candle_core::bail!("a prepared weight is not a tensor"),
        }
    }

    /// The packed weight, if this is one.
    pub(super) fn packed(&self) -> Option<&Packed> {
        match &self.data {
            Data::Plain(_) => None,
            Data::Packed(packed) => Some(packed),
        }
    }

    /// A row-major buffer of `shape` as another dtype.
    pub(super) fn cast(self, shape: &Shape, dtype: DType) -> crate::Result<Self> {
        if self.dtype() == dtype {
            return Ok(self);
        }
        Ok(self.to_dtype(&Layout::contiguous(shape.clone()), dtype)?)
    }

    /// Runs one of candle's ops on this device's threads.
    fn forward(&self, op: impl FnOnce(&CpuStorage) -> Result<CpuStorage> + Send) -> Result<Self> {
        let elements = self.elements()?;
        self.device.run(|| op(elements)).map(|plain| self.device.wrap(plain))
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Data::Plain(plain) = &mut self.data {
            kernels::give(plain);
        }
    }
}

impl Backend for Storage {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> crate::Result<Self> {
        let Some(first) = args.first() else {
            return Err(crate::Error::other(format!("{} of nothing", op.name())));
        };
        let device = &first.storage.device;
        let data = match op {
            Fused::Prepare(role) => Data::Packed(device.run(|| kernels::prepare(*role, *first))?),
            op => Data::Plain(device.run(|| kernels::fused(op, args))?),
        };
        Ok(Self { data, device: device.clone() })
    }

    fn held_bytes(&self) -> Option<u64> {
        self.packed().map(Packed::held_bytes)
    }
}

impl BackendStorage for Storage {
    type Device = Device;

    fn try_clone(&self, _: &Layout) -> Result<Self> {
        self.forward(|x| Ok(x.clone()))
    }

    fn dtype(&self) -> DType {
        match &self.data {
            Data::Plain(plain) => plain.dtype(),
            Data::Packed(packed) => packed.dtype(),
        }
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        self.elements().cloned()
    }

    fn affine(&self, l: &Layout, mul: f64, add: f64) -> Result<Self> {
        self.forward(|x| x.affine(l, mul, add))
    }

    fn powf(&self, l: &Layout, exponent: f64) -> Result<Self> {
        self.forward(|x| x.powf(l, exponent))
    }

    fn elu(&self, l: &Layout, alpha: f64) -> Result<Self> {
        self.forward(|x| x.elu(l, alpha))
    }

    fn reduce_op(&self, op: ReduceOp, l: &Layout, dims: &[usize]) -> Result<Self> {
        // candle divides by the stride of a dimension of size 1, which may be 0.
        let l = &canonical(l);
        self.forward(|x| x.reduce_op(op, l, dims))
    }

    fn cmp(&self, op: CmpOp, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let rhs = rhs.elements()?;
        self.forward(|x| x.cmp(op, rhs, l, rhs_l))
    }

    fn to_dtype(&self, l: &Layout, dtype: DType) -> Result<Self> {
        self.forward(|x| x.to_dtype(l, dtype))
    }

    fn unary_impl<U: UnaryOpT>(&self, l: &Layout) -> Result<Self> {
        self.forward(|x| x.unary_impl::<U>(l))
    }

    fn binary_impl<O: BinaryOpT>(&self, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let rhs = rhs.elements()?;
        self.forward(|x| {
            let sum = if O::NAME == Add::NAME { kernels::add(x, rhs, l, rhs_l) } else { None };
            match sum {
                Some(sum) => Ok(sum?),
                None => x.binary_impl::<O>(rhs, l, rhs_l),
            }
        })
    }

    fn where_cond(
        &self,
        l: &Layout,
        yes: &Self,
        yes_l: &Layout,
        no: &Self,
        no_l: &Layout,
    ) -> Result<Self> {
        let (yes, no) = (yes.elements()?, no.elements()?);
        self.forward(|x| x.where_cond(l, yes, yes_l, no, no_l))
    }

    fn conv1d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv1D) -> Result<Self> {
        let k = k.elements()?;
        self.forward(|x| x.conv1d(l, k, k_l, p))
    }

    fn conv_transpose1d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose1D,
    ) -> Result<Self> {
        let k = k.elements()?;
        self.forward(|x| x.conv_transpose1d(l, k, k_l, p))
    }

    fn conv2d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv2D) -> Result<Self> {
        let k = k.elements()?;
        self.forward(|x| x.conv2d(l, k, k_l, p))
    }

    fn conv_transpose2d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose2D,
    ) -> Result<Self> {
        let k = k.elements()?;
        self.forward(|x| x.conv_transpose2d(l, k, k_l, p))
    }

    fn avg_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        self.forward(|x| x.avg_pool2d(l, k, s))
    }

    fn max_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        self.forward(|x| x.max_pool2d(l, k, s))
    }

    fn upsample_nearest1d(&self, l: &Layout, size: usize) -> Result<Self> {
        self.forward(|x| x.upsample_nearest1d(l, size))
    }

    fn upsample_nearest2d(&self, l: &Layout, height: usize, width: usize) -> Result<Self> {
        self.forward(|x| x.upsample_nearest2d(l, height, width))
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
        if let [_, _, h, w] = *l.dims()
            && (h, w) == (height, width)
        {
            // candle returns the whole buffer here, whatever the view.
            return self.to_dtype(l, self.dtype());
        }
        self.forward(|x| x.upsample_bilinear2d(l, height, width, align_corners, scale_h, scale_w))
    }

    fn gather(&self, l: &Layout, ids: &Self, ids_l: &Layout, dim: usize) -> Result<Self> {
        let ids = ids.elements()?;
        self.forward(|x| x.gather(l, ids, ids_l, dim))
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
        let (ids, src) = (ids.elements()?, src.elements()?);
        self.elements_mut()?.scatter_set(l, ids, ids_l, src, src_l, dim)
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
        let (ids, src) = (ids.elements()?, src.elements()?);
        self.elements_mut()?.scatter_add_set(l, ids, ids_l, src, src_l, dim)
    }

    fn index_select(&self, ids: &Self, l: &Layout, ids_l: &Layout, dim: usize) -> Result<Self> {
        let ids = ids.elements()?;
        self.forward(|x| x.index_select(ids, l, ids_l, dim))
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
        let (ids, src) = (ids.elements()?, src.elements()?);
        self.forward(|x| x.index_add(l, ids, ids_l, src, src_l, dim))
    }

    fn matmul(
        &self,
        rhs: &Self,
        bmnk: (usize, usize, usize, usize),
        l: &Layout,
        rhs_l: &Layout,
    ) -> Result<Self> {
        let (l, rhs_l, elements) = (&canonical(l), &canonical(rhs_l), rhs.elements()?);
        if bmnk.0 > 1 && !l.is_contiguous() && !rhs_l.is_contiguous() {
            // Where rhs repeats, candle takes all batches for the rows of one matrix, which it then
            // expects to lie evenly: others are read in the wrong place, even beyond the buffer.
            let dense = self.to_dtype(l, self.dtype())?;
            return dense.matmul(rhs, bmnk, &Layout::contiguous(l.shape().clone()), rhs_l);
        }
        self.forward(|x| x.matmul(elements, bmnk, l, rhs_l))
    }

    fn copy_strided_src(&self, dst: &mut Self, dst_offset: usize, l: &Layout) -> Result<()> {
        self.elements()?.copy_strided_src(dst.elements_mut()?, dst_offset, l)
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
        let (src, dst) = (self.elements()?, dst.elements_mut()?);
        src.copy2d(dst, rows, columns, src_stride, dst_stride, src_offset, dst_offset)
    }

    fn const_set(&mut self, value: Scalar, l: &Layout) -> Result<()> {
        self.elements_mut()?.const_set(value, l)
    }
}

/// The same view with the strides of dimensions of size 1 as in row-major order, where the view is
/// in that order: candle calls such a view contiguous, and then reads all of its strides.
fn canonical(layout: &Layout) -> Layout {
    match layout.is_contiguous() {
        true => Layout::contiguous_with_offset(layout.shape().clone(), layout.start_offset()),
        false => layout.clone(),
    }
}
