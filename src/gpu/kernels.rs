//! Our kernels: fatbins made by `kernels/build.rs`, loaded when a device is opened, launched by handle.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, sys};

use super::{Context, driver_error};
use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Dynamic shared memory that every kernel may use, in bytes. Beyond it a kernel needs `cuFuncSetAttribute`. The driver's default
/// limit is higher, but it includes the kernel's static shared memory.
const ALLOWED_SHARED: u32 = 32 << 10;

/// The kernels of one device by name.
pub struct Kernels {
    context: Arc<CudaContext>,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<String, sys::CUfunction>,
}

// SAFETY: handles that the driver lets any thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads all fatbins. Errors: the driver refuses one (it is older than the PTX, say).
    pub(super) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        context.bind_to_thread().map_err(driver_error("binding its context"))?;
        let mut kernels = Self { context: context.clone(), modules: Vec::new(), functions: HashMap::new() };
        for (file, bytes) in FATBINS {
            kernels
                .load_module(bytes)
                .map_err(|e| Error::internal(format!("the GPU's driver refuses the kernels of {file}.cu: {e:?}")))?;
        }
        Ok(kernels)
    }

    fn load_module(&mut self, fatbin: &'static [u8]) -> Result<(), DriverError> {
        let mut module = ptr::null_mut();
        let mut count = 0;
        // SAFETY: the fatbin is whole and lives as long as the program; the results are locals.
        unsafe { sys::cuModuleLoadData(&mut module, fatbin.as_ptr().cast()) }.result()?;
        self.modules.push(module);
        // SAFETY: a module that was just loaded.
        unsafe { sys::cuModuleGetFunctionCount(&mut count, module) }.result()?;
        let mut functions = vec![ptr::null_mut(); count as usize];
        // SAFETY: there is room for `count` handles.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }.result()?;
        for function in functions {
            self.functions.insert(function_name(function)?, function);
        }
        Ok(())
    }

    /// The kernel of this name. Errors: there is none.
    pub fn get(&self, name: &str) -> Result<KernelHandle> {
        let function = self.functions.get(name).ok_or_else(|| Error::internal(format!("there is no kernel {name}")))?;
        Ok(KernelHandle { function: *function, allowed_shared: Mutex::new(ALLOWED_SHARED) })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for module in &self.modules {
            // SAFETY: the context that owns the kernels has waited for its stream and goes now, so that none is launched any more.
            let _ = unsafe { sys::cuModuleUnload(*module) }.result();
        }
    }
}

/// The name of a function of a loaded module.
fn function_name(function: sys::CUfunction) -> Result<String, DriverError> {
    let mut name = ptr::null();
    // SAFETY: the name is a C string that lives as long as the function's module.
    let name = unsafe {
        sys::cuFuncGetName(&mut name, function).result()?;
        CStr::from_ptr(name)
    };
    Ok(name.to_string_lossy().into_owned())
}

/// A loaded kernel.
pub struct KernelHandle {
    function: sys::CUfunction,
    /// Bytes of dynamic shared memory that the driver was told to allow.
    allowed_shared: Mutex<u32>,
}

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for KernelHandle {}
// SAFETY: as above.
unsafe impl Sync for KernelHandle {}

impl KernelHandle {
    /// Lets launches use `bytes` of dynamic shared memory.
    fn allow_shared(&self, bytes: u32) -> Result<(), DriverError> {
        if bytes <= ALLOWED_SHARED {
            return Ok(());
        }
        let mut allowed = self.allowed_shared.lock().unwrap_or_else(PoisonError::into_inner);
        if *allowed < bytes {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a plain call.
            unsafe { sys::cuFuncSetAttribute(self.function, attribute, bytes as i32) }.result()?;
            *allowed = bytes;
        }
        Ok(())
    }

    fn failed(&self, error: DriverError) -> Error {
        let name = function_name(self.function).unwrap_or_else(|_| "a kernel".into());
        Error::internal(format!("launching {name}: {error:?}"))
    }
}

/// The kernels of an op, which [`Context::kernels`] resolves once.
pub trait KernelSet: Send + Sync + Sized + 'static {
    /// Finds them. Errors: one is missing.
    fn resolve(kernels: &Kernels) -> Result<Self>;
}

/// A [`KernelSet`] whose fields have the names of their kernels.
macro_rules! kernel_set {
    ($(#[$doc:meta])* $name:ident { $($kernel:ident),* $(,)? }) => {
        $(#[$doc])*
        struct $name {
            $($kernel: $crate::gpu::kernels::KernelHandle,)*
        }

        impl $crate::gpu::kernels::KernelSet for $name {
            fn resolve(kernels: &$crate::gpu::kernels::Kernels) -> $crate::Result<Self> {
                Ok(Self { $($kernel: kernels.get(stringify!($kernel))?,)* })
            }
        }
    };
}
pub(crate) use kernel_set;

/// A kernel for each type of its output.
pub struct ByDtype {
    pub bf16: KernelHandle,
    pub f32: KernelHandle,
}

impl ByDtype {
    /// The f32 kernel for f32, else the bf16 kernel.
    pub fn get(&self, dtype: DType) -> &KernelHandle {
        if dtype == DType::F32 { &self.f32 } else { &self.bf16 }
    }
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy)]
pub struct LaunchGrid {
    /// Thread blocks.
    pub blocks: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared: u32,
}

impl LaunchGrid {
    /// `blocks` in one dimension, without dynamic shared memory.
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self { blocks: (blocks as u32, 1, 1), threads: threads as u32, shared: 0 }
    }

    /// `x` by `y` blocks. Rows go along x: along y there may be at most 65,535.
    pub fn new_2d(x: usize, y: usize, threads: usize) -> Self {
        Self { blocks: (x as u32, y as u32, 1), ..Self::new(1, threads) }
    }
}

/// A kernel's argument: an address or a number, by value.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// Device address; 0 is null.
    Ptr(u64),
    /// `int` or `unsigned`.
    Int(i32),
    /// `float`.
    Float(f32),
}

impl From<u64> for Arg {
    fn from(address: u64) -> Self {
        Self::Ptr(address)
    }
}

impl From<usize> for Arg {
    /// Shapes and counts: all below 2^31.
    fn from(count: usize) -> Self {
        Self::Int(count as i32)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl Context {
    /// Launches a kernel on the device's stream, by programmatic dependent launch: it may start while the kernel before it
    /// ends. Every block of it waits for that one's results (`pdl_wait` in `common.cuh`) before it reads or writes memory that
    /// others use; `lora_shrink_*` explain why they wait later. An empty grid launches nothing.
    ///
    /// # Safety
    /// The arguments are those of the kernel's contract, at the top of its `.cu` file: addresses of live device memory as
    /// large as it says, used by nothing else at that point of the stream.
    pub unsafe fn launch(&self, kernel: &KernelHandle, grid: LaunchGrid, args: &[Arg]) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return Ok(());
        }
        let stream = self.stream();
        stream.context().bind_to_thread().map_err(|e| kernel.failed(e))?;
        kernel.allow_shared(grid.shared).map_err(|e| kernel.failed(e))?;
        let mut values: Vec<u64> = Vec::with_capacity(args.len());
        values.extend(args.iter().map(|arg| match *arg {
            Arg::Ptr(address) => address,
            // Arguments are read at their own size from the low bytes: little-endian, as every host of a GPU is.
            Arg::Int(value) => u64::from(value as u32),
            Arg::Float(value) => u64::from(value.to_bits()),
        }));
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        // SAFETY: plain old data.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: config and arguments outlive the call, which copies them; their meaning is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, kernel.function, pointers.as_mut_ptr(), ptr::null_mut()) }
            .result()
            .map_err(|e| kernel.failed(e))
    }
}
