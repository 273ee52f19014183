//! candle's backend traits and ours over a [`Session`]: each method infers its result, appends one
//! call and returns. Separate because this is where the local and the remote device must look the
//! same.

use std::sync::Arc;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, Layout, Result};

use super::client::Session;
use super::device::Device;
use super::op::execute::batch_m_n_k;
use super::op::infer::Source;
use super::op::{Binary, Copy2d, Id, Op, Unary};
use crate::backend::elements::from_bytes;
use crate::backend::{Backend, Fused, Meta, MetaRef, Reading, Size2d, View, with_each};
use crate::error::Error;

/// A buffer on a worker, known here by its number.
pub struct Storage {
    device: Device,
    id: Id,
    /// What the worker has under that number.
    meta: Meta,
}

impl Storage {
    pub(super) fn new(device: Device, id: Id, meta: Meta) -> Self {
        Self { device, id, meta }
    }

    /// Its number in the session.
    pub fn id(&self) -> Id {
        self.id
    }

    /// What the worker has under that number.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    fn session(&self) -> &Arc<Session> {
        self.device.session()
    }

    fn source<'a>(&self, layout: &'a Layout) -> Source<'a> {
        let meta = MetaRef { dtype: self.meta.dtype, layout };
        Source { meta, len: self.meta.layout.shape().elem_count() }
    }

    /// How a view of this buffer is named on the wire.
    fn operand<'a>(&self, layout: &'a Layout) -> (Id, Option<&'a Layout>) {
        (self.id, (*layout != self.meta.layout).then_some(layout))
    }

    /// Appends an op that makes a buffer.
    fn make(&self, op: Op, others: &[View<'_, Self>], layout: &Layout) -> crate::Result<Self> {
        let this = View { storage: self, layout };
        match *others {
            [] => make(op, &[this]),
            [a] => make(op, &[this, a]),
            [a, b] => make(op, &[this, a, b]),
            _ => make(op, &[&[this], others].concat()),
        }
    }

    /// Appends an op that writes into this buffer.
    fn write(&self, op: Op, others: &[View<'_, Self>], layout: &Layout) -> Result<()> {
        let views = [&[View { storage: self, layout }], others].concat();
        check_same_worker(&self.device, views.iter().map(|view| view.storage))?;
        infer(&op, &views)?;
        self.session().call_op(&op, operands(&views))?;
        Ok(())
    }
}

fn operands<'a>(
    views: &'a [View<'a, Storage>],
) -> impl ExactSizeIterator<Item = (Id, Option<&'a Layout>)> + Clone {
    views.iter().map(|view| view.storage.operand(view.layout))
}

fn make(op: Op, views: &[View<'_, Storage>]) -> crate::Result<Storage> {
    let Some(first) = views.first() else {
        return Err(Error::other(format!("{} of nothing", op.name())));
    };
    let device = &first.storage.device;
    check_same_worker(device, views.iter().map(|view| view.storage))?;
    let meta = infer(&op, views)?;
    let id = device.session().call_op(&op, operands(views))?;
    Ok(Storage { device: device.clone(), id, meta })
}

fn infer(op: &Op, views: &[View<'_, Storage>]) -> crate::Result<Meta> {
    with_each(views, |view| view.storage.source(view.layout), |sources| op.infer(sources))
}

/// Whether all are of `device`.
///
/// # Errors
/// Names both workers.
pub(super) fn check_same_worker<'a>(
    device: &Device,
    mut storages: impl Iterator<Item = &'a Storage>,
) -> crate::Result<()> {
    match storages.find(|storage| !storage.device.same_device(device)) {
        None => Ok(()),
        Some(other) => Err(Error::other(format!(
            "an op on tensors of two workers, {} and {}: copy one with to_device",
            device.session().name(),
            other.session().name()
        ))),
    }
}

fn view<'a>(storage: &'a Storage, layout: &'a Layout) -> View<'a, Storage> {
    View { storage, layout }
}

fn closed(method: &str) -> candle_core::Error {
    Error::other(format!(
        "{method}: candle's attributes cannot be read outside of candle; use Tensor::conv2d"
    ))
    .into()
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.session().free(self.id);
    }
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Id(id) = self.id;
        write!(f, "remote::Storage(#{id} {:?} on {})", self.meta, self.session().name())
    }
}

impl Backend for Storage {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> crate::Result<Self> {
        make(Op::Fused(op.clone()), args)
    }

    fn begin_read(&self) -> crate::Result<Reading> {
        let dtype = self.meta.dtype;
        let len = self.meta.layout.shape().elem_count() * dtype.size_in_bytes();
        let session = self.session().clone();
        let ticket = session.read(self.id, len as u64)?;
        Ok(Box::new(move || from_bytes(dtype, &session.data(ticket)?)))
    }
}

impl BackendStorage for Storage {
    type Device = Device;

    fn try_clone(&self, _: &Layout) -> Result<Self> {
        Ok(self.make(Op::Copy, &[], &self.meta.layout)?)
    }

    fn dtype(&self) -> DType {
        self.meta.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        Ok(self.begin_read()?()?)
    }

    fn affine(&self, l: &Layout, mul: f64, add: f64) -> Result<Self> {
        Ok(self.make(Op::Affine { mul, add }, &[], l)?)
    }

    fn powf(&self, l: &Layout, exponent: f64) -> Result<Self> {
        Ok(self.make(Op::Powf { exponent }, &[], l)?)
    }

    fn elu(&self, l: &Layout, alpha: f64) -> Result<Self> {
        Ok(self.make(Op::Elu { alpha }, &[], l)?)
    }

    fn reduce_op(&self, op: ReduceOp, l: &Layout, dims: &[usize]) -> Result<Self> {
        Ok(self.make(Op::Reduce { op: op.into(), dims: dims.to_vec() }, &[], l)?)
    }

    fn cmp(&self, op: CmpOp, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        Ok(self.make(Op::Compare(op.into()), &[view(rhs, rhs_l)], l)?)
    }

    fn to_dtype(&self, l: &Layout, dtype: DType) -> Result<Self> {
        Ok(self.make(Op::Cast { dtype }, &[], l)?)
    }

    fn unary_impl<U: UnaryOpT>(&self, l: &Layout) -> Result<Self> {
        let op = Unary::of::<U>();
        let op = op.ok_or_else(|| Error::other(format!("{} is no op of candle's", U::NAME)))?;
        Ok(self.make(Op::Unary(op), &[], l)?)
    }

    fn binary_impl<O: BinaryOpT>(&self, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        let op = Binary::of::<O>();
        let op = op.ok_or_else(|| Error::other(format!("{} is no op of candle's", O::NAME)))?;
        Ok(self.make(Op::Binary(op), &[view(rhs, rhs_l)], l)?)
    }

    fn where_cond(
        &self,
        l: &Layout,
        yes: &Self,
        yes_l: &Layout,
        no: &Self,
        no_l: &Layout,
    ) -> Result<Self> {
        Ok(self.make(Op::Where, &[view(yes, yes_l), view(no, no_l)], l)?)
    }

    fn conv1d(&self, _: &Layout, _: &Self, _: &Layout, _: &ParamsConv1D) -> Result<Self> {
        Err(closed("conv1d"))
    }

    fn conv_transpose1d(
        &self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &ParamsConvTranspose1D,
    ) -> Result<Self> {
        Err(closed("conv_transpose1d"))
    }

    fn conv2d(&self, _: &Layout, _: &Self, _: &Layout, _: &ParamsConv2D) -> Result<Self> {
        Err(closed("conv2d"))
    }

    fn conv_transpose2d(
        &self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &ParamsConvTranspose2D,
    ) -> Result<Self> {
        Err(closed("conv_transpose2d"))
    }

    fn avg_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        Ok(self.make(Op::AvgPool2d { kernel: size(k), stride: size(s) }, &[], l)?)
    }

    fn max_pool2d(&self, l: &Layout, k: (usize, usize), s: (usize, usize)) -> Result<Self> {
        Ok(self.make(Op::MaxPool2d { kernel: size(k), stride: size(s) }, &[], l)?)
    }

    fn upsample_nearest1d(&self, l: &Layout, width: usize) -> Result<Self> {
        Ok(self.make(Op::UpsampleNearest1d { width }, &[], l)?)
    }

    fn upsample_nearest2d(&self, l: &Layout, height: usize, width: usize) -> Result<Self> {
        Ok(self.make(Op::UpsampleNearest2d { size: Size2d { height, width } }, &[], l)?)
    }

    fn upsample_bilinear2d(
        &self,
        l: &Layout,
        height: usize,
        width: usize,
        align_corners: bool,
        scale_height: Option<f64>,
        scale_width: Option<f64>,
    ) -> Result<Self> {
        let size = Size2d { height, width };
        let op = Op::UpsampleBilinear2d { size, align_corners, scale_height, scale_width };
        Ok(self.make(op, &[], l)?)
    }

    fn gather(&self, l: &Layout, ids: &Self, ids_l: &Layout, dim: usize) -> Result<Self> {
        Ok(self.make(Op::Gather { dim }, &[view(ids, ids_l)], l)?)
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
        self.write(Op::ScatterSet { dim }, &[view(ids, ids_l), view(src, src_l)], l)
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
        self.write(Op::ScatterAddSet { dim }, &[view(ids, ids_l), view(src, src_l)], l)
    }

    fn index_select(&self, ids: &Self, l: &Layout, ids_l: &Layout, dim: usize) -> Result<Self> {
        Ok(self.make(Op::IndexSelect { dim }, &[view(ids, ids_l)], l)?)
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
        Ok(self.make(Op::IndexAdd { dim }, &[view(ids, ids_l), view(src, src_l)], l)?)
    }

    fn matmul(
        &self,
        rhs: &Self,
        bmnk: (usize, usize, usize, usize),
        l: &Layout,
        rhs_l: &Layout,
    ) -> Result<Self> {
        let k = l.dims().last().copied().unwrap_or(0);
        let (b, m, n) = {
            let (b, m, n, _) = batch_m_n_k(l, rhs_l)?;
            (b, m, n)
        };
        if (b, m, n, k) != bmnk {
            candle_core::bail!("matmul: {l:?} and {rhs_l:?} are not {bmnk:?}");
        }
        Ok(self.make(Op::Matmul, &[view(rhs, rhs_l)], l)?)
    }

    fn copy_strided_src(&self, dst: &mut Self, offset: usize, l: &Layout) -> Result<()> {
        let whole = dst.meta.layout.clone();
        dst.write(Op::CopyStrided { offset }, &[view(self, l)], &whole)
    }

    fn copy2d(
        &self,
        dst: &mut Self,
        rows: usize,
        columns: usize,
        source_stride: usize,
        target_stride: usize,
        source_offset: usize,
        target_offset: usize,
    ) -> Result<()> {
        let copy =
            Copy2d { rows, columns, source_stride, target_stride, source_offset, target_offset };
        let whole = dst.meta.layout.clone();
        dst.write(Op::Copy2d(copy), &[view(self, &self.meta.layout)], &whole)
    }

    fn const_set(&mut self, value: Scalar, l: &Layout) -> Result<()> {
        if value.dtype() != self.meta.dtype {
            candle_core::bail!("const_set of {:?} into {:?}", value.dtype(), self.meta.dtype);
        }
        self.write(Op::ConstSet { value: value.to_f64() }, &[], l)
    }
}

fn size((height, width): (usize, usize)) -> Size2d {
    Size2d { height, width }
}
