//! A graph of a real GPU, made node by node. Separate because it is long and like nothing else.

use std::ptr::{null, null_mut};
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DriverError, result, sys};

use super::failed;
use crate::backend::cuda::driver::{Graph, Launch};
use crate::error::Result;

/// A graph that is being made: its kernels run one after the other.
struct Nodes {
    graph: sys::CUgraph,
    last: Option<sys::CUgraphNode>,
}

impl Nodes {
    fn new() -> std::result::Result<Self, DriverError> {
        let mut graph = null_mut();
        // SAFETY: the place is there.
        unsafe { sys::cuGraphCreate(&raw mut graph, 0) }.result()?;
        Ok(Self { graph, last: None })
    }

    fn push(
        &mut self,
        launch: &Launch,
        function: &CudaFunction,
    ) -> std::result::Result<(), DriverError> {
        let mut arguments = [launch.argument.as_ptr().cast_mut().cast()];
        let [grid_x, grid_y, grid_z] = launch.grid;
        let kernel = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function.cu_function(),
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            kernelParams: arguments.as_mut_ptr(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        };
        let before = self.last.as_ref().map_or(null(), std::ptr::from_ref);
        let count = usize::from(self.last.is_some());
        let mut node = null_mut();
        // SAFETY: the driver copies the argument, which is the struct that the kernel takes; what
        // it points to lasts as long as the program. The node before is of this graph.
        unsafe {
            sys::cuGraphAddKernelNode_v2(
                &raw mut node,
                self.graph,
                before,
                count,
                &raw const kernel,
            )
        }
        .result()?;
        self.last = Some(node);
        Ok(())
    }

    fn instantiate(self) -> std::result::Result<sys::CUgraphExec, DriverError> {
        // SAFETY: the graph is whole.
        unsafe { result::graph::instantiate(self.graph, sys::CUgraphInstantiate_flags(0)) }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // SAFETY: what was instantiated is a copy. A failure is told by the next call.
        let _ = unsafe { sys::cuGraphDestroy(self.graph) }.result();
    }
}

/// A graph that can be launched.
pub(super) struct Instantiated {
    graph: sys::CUgraphExec,
    #[allow(dead_code, reason = "they keep the code as long as the graph")]
    functions: Vec<CudaFunction>,
    stream: Arc<CudaStream>,
}

impl Instantiated {
    /// Of these kernels, one after the other.
    pub fn new(
        launches: &[Launch],
        functions: Vec<CudaFunction>,
        stream: Arc<CudaStream>,
    ) -> std::result::Result<Self, DriverError> {
        let mut nodes = Nodes::new()?;
        let mut all = launches.iter().zip(&functions);
        all.try_for_each(|(launch, function)| nodes.push(launch, function))?;
        Ok(Self { graph: nodes.instantiate()?, functions, stream })
    }
}

// SAFETY: a graph belongs to its context and to no thread; who has it uses it alone.
unsafe impl Send for Instantiated {}

impl Graph for Instantiated {
    fn launch(&self) -> Result<()> {
        let launched = self.stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: the graph is whole, and what its kernels point to is its program's.
            unsafe { sys::cuGraphLaunch(self.graph, self.stream.cu_stream()) }.result()
        });
        launched.map_err(|error| failed("a graph", error))
    }
}

impl Drop for Instantiated {
    fn drop(&mut self) {
        // It may be running. A failure is told by the next call.
        let _ = self.stream.synchronize();
        // SAFETY: it is not running, and nobody else has it.
        let _ = unsafe { result::graph::exec_destroy(self.graph) };
    }
}
