//! A backend that computes nothing: every op gives an empty storage of the right dtype. Separate
//! because tests and benches measure by it what is left: the cost of the protocol alone.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, DeviceLocation, Layout, Result, Shape, WithDType};

use tiny_sd::backend::{self, Backend, Begun, Fused, HostTensor, Noise, Outputs, View};

/// Nothing, of a dtype.
#[derive(Debug, Clone, Copy)]
pub struct Storage(DType);

/// Makes nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Device;

impl Backend for Storage {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> tiny_sd::Result<Self> {
        match (op, args) {
            (Fused::Pixels, _) => Ok(Self(DType::U8)),
            (_, [first, ..]) => Ok(*first.storage),
            (op, []) => Err(tiny_sd::Error::other(format!("{} of nothing", op.name()))),
        }
    }
}

impl backend::Device for Device {
    type Mark = ();

    fn mark(&self) -> tiny_sd::Result<()> {
        Ok(())
    }

    fn wait(&self, (): ()) -> tiny_sd::Result<()> {
        Ok(())
    }

    fn is_reached(&self, (): &()) -> bool {
        true
    }

    fn announce(
        &self,
        _: &[&HostTensor],
        _: DType,
        _: &mut dyn FnMut(u64, u64) -> tiny_sd::Result<()>,
    ) -> tiny_sd::Result<()> {
        Ok(())
    }

    fn begin_program(&self, _: &str, _: &[&Storage]) -> tiny_sd::Result<Begun<Storage>> {
        Ok(Begun::Run)
    }

    fn end_program(&self, _: &[View<'_, Storage>]) -> tiny_sd::Result<Option<Outputs<Storage>>> {
        Ok(None)
    }

    fn abort_program(&self) {}

    fn name(&self) -> String {
        "null".into()
    }

    fn default_dtype(&self) -> DType {
        DType::F32
    }

    fn randn(&self, _: Noise, _: &Shape, dtype: DType) -> tiny_sd::Result<Storage> {
        Ok(Storage(dtype))
    }

    fn upload(&self, _: &HostTensor, dtype: DType) -> tiny_sd::Result<Storage> {
        Ok(Storage(dtype))
    }
}

impl BackendDevice for Device {
    type Storage = Storage;

    fn new(_: usize) -> Result<Self> {
        Ok(Self)
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn same_device(&self, _: &Self) -> bool {
        true
    }

    fn zeros_impl(&self, _: &Shape, dtype: DType) -> Result<Storage> {
        Ok(Storage(dtype))
    }

    unsafe fn alloc_uninit(&self, _: &Shape, dtype: DType) -> Result<Storage> {
        Ok(Storage(dtype))
    }

    fn storage_from_slice<T: WithDType>(&self, _: &[T]) -> Result<Storage> {
        Ok(Storage(T::DTYPE))
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> Result<Storage> {
        Ok(Storage(values.dtype()))
    }

    fn storage_from_cpu_storage_owned(&self, values: CpuStorage) -> Result<Storage> {
        Ok(Storage(values.dtype()))
    }

    fn rand_uniform(&self, _: &Shape, dtype: DType, _: f64, _: f64) -> Result<Storage> {
        Ok(Storage(dtype))
    }

    fn rand_normal(&self, _: &Shape, dtype: DType, _: f64, _: f64) -> Result<Storage> {
        Ok(Storage(dtype))
    }

    fn set_seed(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_current_seed(&self) -> Result<u64> {
        Ok(0)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

impl BackendStorage for Storage {
    type Device = Device;

    fn try_clone(&self, _: &Layout) -> Result<Self> {
        Ok(*self)
    }

    fn dtype(&self) -> DType {
        self.0
    }

    fn device(&self) -> &Device {
        &Device
    }

    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        candle_core::bail!("the null device keeps nothing that could be read")
    }

    fn affine(&self, _: &Layout, _: f64, _: f64) -> Result<Self> {
        Ok(*self)
    }

    fn powf(&self, _: &Layout, _: f64) -> Result<Self> {
        Ok(*self)
    }

    fn elu(&self, _: &Layout, _: f64) -> Result<Self> {
        Ok(*self)
    }

    fn reduce_op(&self, op: ReduceOp, _: &Layout, _: &[usize]) -> Result<Self> {
        Ok(match op {
            ReduceOp::Sum | ReduceOp::Min | ReduceOp::Max => *self,
            ReduceOp::ArgMin | ReduceOp::ArgMax => Self(DType::U32),
        })
    }

    fn cmp(&self, _: CmpOp, _: &Self, _: &Layout, _: &Layout) -> Result<Self> {
        Ok(Self(DType::U8))
    }

    fn to_dtype(&self, _: &Layout, dtype: DType) -> Result<Self> {
        Ok(Self(dtype))
    }

    fn unary_impl<U: UnaryOpT>(&self, _: &Layout) -> Result<Self> {
        Ok(*self)
    }

    fn binary_impl<O: BinaryOpT>(&self, _: &Self, _: &Layout, _: &Layout) -> Result<Self> {
        Ok(*self)
    }

    fn where_cond(&self, _: &Layout, yes: &Self, _: &Layout, _: &Self, _: &Layout) -> Result<Self> {
        Ok(*yes)
    }

    fn conv1d(&self, _: &Layout, _: &Self, _: &Layout, _: &ParamsConv1D) -> Result<Self> {
        Ok(*self)
    }

    fn conv_transpose1d(
        &self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &ParamsConvTranspose1D,
    ) -> Result<Self> {
        Ok(*self)
    }

    fn conv2d(&self, _: &Layout, _: &Self, _: &Layout, _: &ParamsConv2D) -> Result<Self> {
        Ok(*self)
    }

    fn conv_transpose2d(
        &self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &ParamsConvTranspose2D,
    ) -> Result<Self> {
        Ok(*self)
    }

    fn avg_pool2d(&self, _: &Layout, _: (usize, usize), _: (usize, usize)) -> Result<Self> {
        Ok(*self)
    }

    fn max_pool2d(&self, _: &Layout, _: (usize, usize), _: (usize, usize)) -> Result<Self> {
        Ok(*self)
    }

    fn upsample_nearest1d(&self, _: &Layout, _: usize) -> Result<Self> {
        Ok(*self)
    }

    fn upsample_nearest2d(&self, _: &Layout, _: usize, _: usize) -> Result<Self> {
        Ok(*self)
    }

    fn upsample_bilinear2d(
        &self,
        _: &Layout,
        _: usize,
        _: usize,
        _: bool,
        _: Option<f64>,
        _: Option<f64>,
    ) -> Result<Self> {
        Ok(*self)
    }

    fn gather(&self, _: &Layout, _: &Self, _: &Layout, _: usize) -> Result<Self> {
        Ok(*self)
    }

    fn scatter_set(
        &mut self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: usize,
    ) -> Result<()> {
        Ok(())
    }

    fn scatter_add_set(
        &mut self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: usize,
    ) -> Result<()> {
        Ok(())
    }

    fn index_select(&self, _: &Self, _: &Layout, _: &Layout, _: usize) -> Result<Self> {
        Ok(*self)
    }

    fn index_add(
        &self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: &Self,
        _: &Layout,
        _: usize,
    ) -> Result<Self> {
        Ok(*self)
    }

    fn matmul(
        &self,
        _: &Self,
        _: (usize, usize, usize, usize),
        _: &Layout,
        _: &Layout,
    ) -> Result<Self> {
        Ok(*self)
    }

    fn copy_strided_src(&self, _: &mut Self, _: usize, _: &Layout) -> Result<()> {
        Ok(())
    }

    fn copy2d(
        &self,
        _: &mut Self,
        _: usize,
        _: usize,
        _: usize,
        _: usize,
        _: usize,
        _: usize,
    ) -> Result<()> {
        Ok(())
    }

    fn const_set(&mut self, _: Scalar, _: &Layout) -> Result<()> {
        Ok(())
    }
}
