//! A buffer in a GPU's memory. Separate because the forwarding of candle's ops is long and says
//! nothing new.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, Layout, Result};

use super::driver::Address;
use super::fused::{fused, reduced};
use super::memory::Memory;
use super::{Buffer, Device};
use crate::backend::elements::{from_bytes, to_bytes};
use crate::backend::order::fits;
use crate::backend::{Backend, Fused, Role, View};

/// A buffer of elements of one type.
pub struct Storage {
    buffer: Buffer,
    dtype: DType,
    elements: usize,
    /// What it was prepared for, and its dimensions then.
    prepared: Option<(Role, Vec<usize>)>,
}

impl Storage {
    pub(super) fn new(buffer: Buffer, dtype: DType, elements: usize) -> Self {
        Self { buffer, dtype, elements, prepared: None }
    }

    /// A weight in the form that an op wants.
    pub(super) fn prepared(self, role: Role, dims: &[usize]) -> Self {
        Self { prepared: Some((role, dims.to_vec())), ..self }
    }

    /// Where a prepared weight begins; none if it is a plain one. Views come from strangers, too,
    /// and kernels read a prepared weight from its first element to its last.
    ///
    /// # Errors
    /// If it was prepared for something else, or the view is not all of it.
    pub(super) fn prepared_for(
        &self,
        role: Role,
        layout: &Layout,
    ) -> crate::Result<Option<Address>> {
        let Some((own_role, own_dims)) = &self.prepared else { return Ok(None) };
        let is_whole = layout.is_contiguous() && layout.start_offset() == 0;
        if *own_role != role || layout.dims() != own_dims || !is_whole {
            return Err(crate::Error::other(format!(
                "a weight {own_dims:?} prepared for {own_role:?} is used as {:?} for {role:?}",
                layout.dims()
            )));
        }
        Ok(Some(self.address()))
    }

    /// How many there are.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.buffer.memory
    }

    /// Where a kernel finds it.
    pub(super) fn address(&self) -> Address {
        self.buffer.device.programs().place(self.memory())
    }

    /// Where a kernel finds an element.
    pub(super) fn at(&self, element: usize) -> Address {
        Address(self.address().0 + (element * self.dtype.size_in_bytes()) as u64)
    }

    /// Makes it a copy if somebody else has the same memory, or a program knows it.
    fn make_own(&mut self) -> Result<()> {
        let may_write = self.buffer.device.programs().may_write(&self.buffer.memory);
        if !may_write || Arc::get_mut(&mut self.buffer.memory).is_none() {
            *self = self.try_clone(&Layout::contiguous(self.elements))?;
        }
        Ok(())
    }

    /// A copy of elements in this process's memory.
    pub(super) fn of_host(device: &Device, host: &CpuStorage) -> crate::Result<Self> {
        let bytes = to_bytes(host)?;
        let dtype = host.dtype();
        let elements = bytes.len() / dtype.size_in_bytes();
        Ok(Self::new(Buffer::of(device, &bytes)?, dtype, elements))
    }
}

/// candle's names of ops, by their numbers in the kernels.
const UNARY: [&str; 19] = [
    "exp", "log", "sin", "cos", "abs", "neg", "recip", "sqr", "sqrt", "gelu", "gelu_erf", "erf",
    "relu", "silu", "tanh", "floor", "ceil", "round", "sign",
];
const BINARY: [&str; 6] = ["add", "sub", "mul", "div", "maximum", "minimum"];

/// The bits of a value, if it is of the type.
fn bits_of(value: Scalar, dtype: DType) -> Option<u64> {
    let (bits, of) = match value {
        Scalar::U8(value) => (value.into(), DType::U8),
        Scalar::U32(value) => (value.into(), DType::U32),
        Scalar::I64(value) => (value.cast_unsigned(), DType::I64),
        Scalar::BF16(value) => (value.to_bits().into(), DType::BF16),
        Scalar::F16(value) => (value.to_bits().into(), DType::F16),
        Scalar::F32(value) => (value.to_bits().into(), DType::F32),
        Scalar::F64(value) => (value.to_bits(), DType::F64),
        _ => return None,
    };
    (of == dtype).then_some(bits)
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda::Storage({} of {})", self.elements, self.dtype.as_str())
    }
}

impl Backend for Storage {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> crate::Result<Self> {
        fused(op, args)
    }
}

impl BackendStorage for Storage {
    type Device = Device;

    /// The whole buffer, whatever the view.
    fn try_clone(&self, _: &Layout) -> Result<Self> {
        let whole = Layout::contiguous(self.elements);
        self.or_on_host(self.copied(&whole, &[0]), |x| x.try_clone(&whole))
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.buffer.device
    }

    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        Ok(from_bytes(self.dtype, &self.buffer.read()?)?)
    }

    fn affine(&self, l: &Layout, mul: f64, add: f64) -> Result<Self> {
        let kernel = self.unary("affine", l, |a| a.double(mul).double(add));
        self.or_on_host(kernel, |x| x.affine(l, mul, add))
    }

    fn powf(&self, l: &Layout, exponent: f64) -> Result<Self> {
        self.on_host(|x| x.powf(l, exponent))
    }

    fn elu(&self, l: &Layout, alpha: f64) -> Result<Self> {
        self.on_host(|x| x.elu(l, alpha))
    }

    fn reduce_op(&self, op: ReduceOp, l: &Layout, dims: &[usize]) -> Result<Self> {
        let code = match op {
            ReduceOp::Sum => Some(0),
            ReduceOp::Min => Some(1),
            ReduceOp::Max => Some(2),
            ReduceOp::ArgMin | ReduceOp::ArgMax => None,
        };
        let kernel = code.and_then(|code| reduced(code, View { storage: self, layout: l }, dims));
        self.or_on_host(kernel, |x| x.reduce_op(op, l, dims))
    }

    fn cmp(&self, op: CmpOp, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let rhs = &rhs.host()?;
        self.on_host(|x| x.cmp(op, rhs, l, rhs_l))
    }

    fn to_dtype(&self, l: &Layout, dtype: DType) -> Result<Self> {
        self.or_on_host(self.cast(l, dtype), |x| x.to_dtype(l, dtype))
    }

    fn unary_impl<U: UnaryOpT>(&self, l: &Layout) -> Result<Self> {
        let kernel = UNARY.iter().position(|name| *name == U::NAME);
        let kernel = kernel.and_then(|op| self.unary("unary", l, |a| a.int(op as i32)));
        self.or_on_host(kernel, |x| x.unary_impl::<U>(l))
    }

    fn binary_impl<O: BinaryOpT>(&self, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let kernel = BINARY.iter().position(|name| *name == O::NAME);
        let kernel = kernel.and_then(|op| self.binary(op as i32, l, (rhs, rhs_l)));
        self.or_on_host(kernel, |x| x.binary_impl::<O>(&rhs.host()?, l, rhs_l))
    }

    fn where_cond(
        &self,
        l: &Layout,
        yes: &Self,
        yes_l: &Layout,
        no: &Self,
        no_l: &Layout,
    ) -> Result<Self> {
        let (yes, no) = (&yes.host()?, &no.host()?);
        self.on_host(|x| x.where_cond(l, yes, yes_l, no, no_l))
    }

    fn conv1d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv1D) -> Result<Self> {
        let k = &k.host()?;
        self.on_host(|x| x.conv1d(l, k, k_l, p))
    }

    fn conv_transpose1d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose1D,
    ) -> Result<Self> {
        let k = &k.host()?;
        self.on_host(|x| x.conv_transpose1d(l, k, k_l, p))
    }

    fn conv2d(&self, l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv2D) -> Result<Self> {
        let k = &k.host()?;
        self.on_host(|x| x.conv2d(l, k, k_l, p))
    }

    fn conv_transpose2d(
        &self,
        l: &Layout,
        k: &Self,
        k_l: &Layout,
        p: &ParamsConvTranspose2D,
    ) -> Result<Self> {
        let k = &k.host()?;
        self.on_host(|x| x.conv_transpose2d(l, k, k_l, p))
    }

    fn avg_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        self.on_host(|x| x.avg_pool2d(l, k, s))
    }

    fn max_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        self.on_host(|x| x.max_pool2d(l, k, s))
    }

    fn upsample_nearest1d(&self, l: &Layout, size: usize) -> Result<Self> {
        self.on_host(|x| x.upsample_nearest1d(l, size))
    }

    fn upsample_nearest2d(&self, l: &Layout, height: usize, width: usize) -> Result<Self> {
        self.on_host(|x| x.upsample_nearest2d(l, height, width))
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
        self.on_host(|x| x.upsample_bilinear2d(l, height, width, align_corners, scale_h, scale_w))
    }

    fn gather(&self, l: &Layout, ids: &Self, ids_l: &Layout, dim: usize) -> Result<Self> {
        let ids = &ids.host()?;
        self.on_host(|x| x.gather(l, ids, ids_l, dim))
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
        let (ids, src) = (&ids.host()?, &src.host()?);
        self.change_on_host(|x| x.scatter_set(l, ids, ids_l, src, src_l, dim))
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
        let (ids, src) = (&ids.host()?, &src.host()?);
        self.change_on_host(|x| x.scatter_add_set(l, ids, ids_l, src, src_l, dim))
    }

    fn index_select(&self, ids: &Self, l: &Layout, ids_l: &Layout, dim: usize) -> Result<Self> {
        let kernel = self.selected(l, (ids, ids_l), dim);
        self.or_on_host(kernel, |x| x.index_select(&ids.host()?, l, ids_l, dim))
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
        let (ids, src) = (&ids.host()?, &src.host()?);
        self.on_host(|x| x.index_add(l, ids, ids_l, src, src_l, dim))
    }

    fn matmul(
        &self,
        rhs: &Self,
        bmnk: (usize, usize, usize, usize),
        l: &Layout,
        rhs_l: &Layout,
    ) -> Result<Self> {
        let kernel = self.product(bmnk, l, (rhs, rhs_l));
        self.or_on_host(kernel, |x| x.matmul(&rhs.host()?, bmnk, l, rhs_l))
    }

    fn copy_strided_src(&self, dst: &mut Self, dst_offset: usize, l: &Layout) -> Result<()> {
        let place = Layout::contiguous_with_offset(l.shape().clone(), dst_offset);
        dst.make_own()?;
        // candle leaves out what does not fit.
        let fits = fits(&place, dst.elements);
        if let Some(copied) = fits.then(|| dst.take(&place, self, l)).flatten() {
            return Ok(copied?);
        }
        let source = self.host()?;
        dst.change_on_host(|x| source.copy_strided_src(x, dst_offset, l))
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
        let source = self.host()?;
        dst.change_on_host(|x| {
            source.copy2d(x, rows, columns, src_stride, dst_stride, src_offset, dst_offset)
        })
    }

    fn const_set(&mut self, value: Scalar, l: &Layout) -> Result<()> {
        self.make_own()?;
        let bits = bits_of(value, self.dtype);
        match bits.and_then(|bits| self.filled(l, bits)) {
            Some(filled) => Ok(filled?),
            None => self.change_on_host(|x| x.const_set(value, l)),
        }
    }
}
