//! A device that is wrong on purpose: the CPU, but for one op. Separate because a backend is long,
//! however little it says.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::conv::{ParamsConv1D, ParamsConv2D, ParamsConvTranspose1D, ParamsConvTranspose2D};
use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::scalar::Scalar;
use candle_core::{CpuStorage, DType, DeviceLocation, Layout, Result, Shape, WithDType};
use tiny_sd::Error;
use tiny_sd::backend::{self, Backend, Begun, Fused, HostTensor, Noise, Outputs, View, cpu};

/// What is wrong with the op.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Views are read as if they began at element 0.
    ForgetsOffset,
    /// The strides of the last two dimensions are taken for each other's.
    SwapsStrides,
    /// Every element of an f32 result is too large by this part of itself.
    Imprecise(f32),
    /// The first element of an f32 result is no number.
    NotANumber,
    /// The result has one element more.
    TooLong,
    /// It does not work.
    Fails,
}

/// The CPU, but for one op.
#[derive(Debug, Clone)]
pub struct Device {
    cpu: cpu::Device,
    /// The op, by the name of the method or of the fused op.
    op: &'static str,
    fault: Fault,
}

#[derive(Debug)]
pub struct Storage {
    cpu: cpu::Storage,
    device: Device,
}

impl Device {
    pub fn new(cpu: &cpu::Device, op: &'static str, fault: Fault) -> Self {
        Self { cpu: cpu.clone(), op, fault }
    }

    fn wrap(&self, cpu: cpu::Storage) -> Storage {
        Storage { cpu, device: self.clone() }
    }

    /// What `op` takes a view for.
    fn bend(&self, op: &str, layout: &Layout) -> Layout {
        let (shape, mut stride) = (layout.shape().clone(), layout.stride().to_vec());
        match self.fault {
            _ if op != self.op => layout.clone(),
            Fault::ForgetsOffset => Layout::new(shape, stride, 0),
            Fault::SwapsStrides => {
                let last = stride.len() - 1;
                stride.swap(last - 1, last);
                Layout::new(shape, stride, layout.start_offset())
            }
            Fault::Imprecise(_) | Fault::NotANumber | Fault::TooLong | Fault::Fails => {
                layout.clone()
            }
        }
    }

    /// The result of `op`, spoilt.
    fn spoil(&self, op: &str, result: cpu::Storage) -> Result<Storage> {
        if op != self.op {
            return Ok(self.wrap(result));
        }
        let CpuStorage::F32(mut values) = result.to_cpu_storage()? else {
            return Ok(self.wrap(result));
        };
        match self.fault {
            Fault::ForgetsOffset | Fault::SwapsStrides => {}
            Fault::Imprecise(by) => values.iter_mut().for_each(|value| *value += by * *value),
            Fault::NotANumber => values[0] = f32::NAN,
            Fault::TooLong => values.push(0.0),
            Fault::Fails => candle_core::bail!("it does not work"),
        }
        Ok(self.wrap(self.cpu.storage_from_cpu_storage_owned(CpuStorage::F32(values))?))
    }
}

/// An argument as the CPU's method takes it.
trait Plain {
    type To;
    fn plain(self) -> Self::To;
}

impl<'a> Plain for &'a Storage {
    type To = &'a cpu::Storage;
    fn plain(self) -> &'a cpu::Storage {
        &self.cpu
    }
}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {$(
        impl Plain for $type {
            type To = Self;
            fn plain(self) -> Self {
                self
            }
        }
    )*};
}

plain!(
    f64,
    usize,
    bool,
    DType,
    CmpOp,
    ReduceOp,
    Option<f64>,
    (usize, usize),
    (usize, usize, usize, usize),
    &Layout,
    &[usize],
    &ParamsConv1D,
    &ParamsConv2D,
    &ParamsConvTranspose1D,
    &ParamsConvTranspose2D,
);

macro_rules! forward {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {$(
        fn $name(&self, $($arg: $type),*) -> Result<Self> {
            self.device.spoil(stringify!($name), self.cpu.$name($($arg.plain()),*)?)
        }
    )*};
}

impl Backend for Storage {
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> tiny_sd::Result<Self> {
        let device = &args[0].storage.device;
        let layouts: Vec<_> = args.iter().map(|arg| device.bend(op.name(), arg.layout)).collect();
        let views = args.iter().zip(&layouts);
        let views: Vec<_> =
            views.map(|(arg, layout)| View { storage: &arg.storage.cpu, layout }).collect();
        let result = cpu::Storage::fused(op, &views)?;
        match op {
            Fused::Prepare(_) => Ok(device.wrap(result)),
            op => Ok(device.spoil(op.name(), result)?),
        }
    }
}

impl BackendStorage for Storage {
    type Device = Device;

    fn dtype(&self) -> DType {
        self.cpu.dtype()
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn to_cpu_storage(&self) -> Result<CpuStorage> {
        self.cpu.to_cpu_storage()
    }

    fn affine(&self, l: &Layout, mul: f64, add: f64) -> Result<Self> {
        let l = self.device.bend("affine", l);
        self.device.spoil("affine", self.cpu.affine(&l, mul, add)?)
    }

    fn unary_impl<U: UnaryOpT>(&self, l: &Layout) -> Result<Self> {
        self.device.spoil(U::NAME, self.cpu.unary_impl::<U>(l)?)
    }

    fn binary_impl<O: BinaryOpT>(&self, rhs: &Self, l: &Layout, rhs_l: &Layout) -> Result<Self> {
        self.device.spoil(O::NAME, self.cpu.binary_impl::<O>(&rhs.cpu, l, rhs_l)?)
    }

    forward! {
        fn try_clone(l: &Layout);
        fn powf(l: &Layout, exponent: f64);
        fn elu(l: &Layout, alpha: f64);
        fn reduce_op(op: ReduceOp, l: &Layout, dims: &[usize]);
        fn cmp(op: CmpOp, rhs: &Self, l: &Layout, rhs_l: &Layout);
        fn to_dtype(l: &Layout, dtype: DType);
        fn where_cond(l: &Layout, yes: &Self, yes_l: &Layout, no: &Self, no_l: &Layout);
        fn conv1d(l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv1D);
        fn conv_transpose1d(l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConvTranspose1D);
        fn conv2d(l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConv2D);
        fn conv_transpose2d(l: &Layout, k: &Self, k_l: &Layout, p: &ParamsConvTranspose2D);
        fn avg_pool2d(l: &Layout, kernel: (usize, usize), stride: (usize, usize));
        fn max_pool2d(l: &Layout, kernel: (usize, usize), stride: (usize, usize));
        fn upsample_nearest1d(l: &Layout, size: usize);
        fn upsample_nearest2d(l: &Layout, height: usize, width: usize);
        fn upsample_bilinear2d(
            l: &Layout,
            height: usize,
            width: usize,
            align_corners: bool,
            scale_h: Option<f64>,
            scale_w: Option<f64>,
        );
        fn gather(l: &Layout, ids: &Self, ids_l: &Layout, dim: usize);
        fn index_select(ids: &Self, l: &Layout, ids_l: &Layout, dim: usize);
        fn index_add(
            l: &Layout,
            ids: &Self,
            ids_l: &Layout,
            src: &Self,
            src_l: &Layout,
            dim: usize,
        );
        fn matmul(rhs: &Self, bmnk: (usize, usize, usize, usize), l: &Layout, rhs_l: &Layout);
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
        self.cpu.scatter_set(l, &ids.cpu, ids_l, &src.cpu, src_l, dim)
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
        self.cpu.scatter_add_set(l, &ids.cpu, ids_l, &src.cpu, src_l, dim)
    }

    fn copy_strided_src(&self, dst: &mut Self, offset: usize, l: &Layout) -> Result<()> {
        let l = self.device.bend("copy_strided", l);
        self.cpu.copy_strided_src(&mut dst.cpu, offset, &l)?;
        let written = dst.device.cpu.storage_from_cpu_storage_owned(dst.to_cpu_storage()?)?;
        *dst = dst.device.spoil("copy_strided", written)?;
        Ok(())
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
        let (src, dst) = (&self.cpu, &mut dst.cpu);
        src.copy2d(dst, rows, columns, src_stride, dst_stride, src_offset, dst_offset)
    }

    fn const_set(&mut self, value: Scalar, l: &Layout) -> Result<()> {
        self.cpu.const_set(value, &self.device.bend("const_set", l))
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

    fn begin_program(&self, _: &str, _: &[&Storage]) -> tiny_sd::Result<Begun<Storage>> {
        Err(Error::other("a program, which a pair of devices must not begin"))
    }

    fn end_program(&self, _: &[View<'_, Storage>]) -> tiny_sd::Result<Option<Outputs<Storage>>> {
        Ok(None)
    }

    fn abort_program(&self) {}

    fn announce(
        &self,
        tensors: &[&HostTensor],
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64) -> tiny_sd::Result<()>,
    ) -> tiny_sd::Result<()> {
        self.cpu.announce(tensors, dtype, progress)
    }

    fn name(&self) -> String {
        "wrong".into()
    }

    fn default_dtype(&self) -> DType {
        DType::F16
    }

    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> tiny_sd::Result<Storage> {
        Ok(self.spoil("randn", self.cpu.randn(noise, shape, dtype)?)?)
    }

    fn upload(&self, tensor: &HostTensor, dtype: DType) -> tiny_sd::Result<Storage> {
        Ok(self.spoil("upload", self.cpu.upload(tensor, dtype)?)?)
    }
}

impl BackendDevice for Device {
    type Storage = Storage;

    fn new(_: usize) -> Result<Self> {
        candle_core::bail!("by its fault, not by a number")
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn same_device(&self, _: &Self) -> bool {
        true
    }

    fn zeros_impl(&self, shape: &Shape, dtype: DType) -> Result<Storage> {
        self.spoil("zeros", self.cpu.zeros_impl(shape, dtype)?)
    }

    unsafe fn alloc_uninit(&self, shape: &Shape, dtype: DType) -> Result<Storage> {
        self.zeros_impl(shape, dtype)
    }

    fn storage_from_slice<T: WithDType>(&self, values: &[T]) -> Result<Storage> {
        self.spoil("constant", self.cpu.storage_from_slice(values)?)
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> Result<Storage> {
        self.storage_from_cpu_storage_owned(values.clone())
    }

    /// Never spoilt: it is how a twin mends what differs a little.
    fn storage_from_cpu_storage_owned(&self, values: CpuStorage) -> Result<Storage> {
        Ok(self.wrap(self.cpu.storage_from_cpu_storage_owned(values)?))
    }

    /// Whatever it draws is no one else's.
    fn rand_uniform(&self, shape: &Shape, dtype: DType, _: f64, _: f64) -> Result<Storage> {
        self.zeros_impl(shape, dtype)
    }

    fn rand_normal(&self, shape: &Shape, dtype: DType, _: f64, _: f64) -> Result<Storage> {
        self.zeros_impl(shape, dtype)
    }

    fn set_seed(&self, _: u64) -> Result<()> {
        candle_core::bail!("no seed")
    }

    fn get_current_seed(&self) -> Result<u64> {
        candle_core::bail!("no seed")
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
