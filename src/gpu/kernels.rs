//! Our kernels: fatbins made by `kernels/build.rs`, loaded at start, launched by name.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::OnceLock;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys;

use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Every kernel by name. One process drives one GPU; modules stay loaded until it ends.
static KERNELS: OnceLock<HashMap<String, Function>> = OnceLock::new();

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Loads all fatbins. Errors: the driver refuses one (it is older than the PTX, say).
pub fn load(device: &CudaDevice) -> Result<()> {
    if KERNELS.get().is_some() {
        return Ok(());
    }
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(|e| Error::internal(format!("the GPU's context: {e}")))?;
    let mut kernels = HashMap::new();
    for (file, bytes) in FATBINS {
        let refused = |e| Error::internal(format!("the GPU's driver refuses the kernels of {file}.cu: {e:?}"));
        let mut module = ptr::null_mut();
        let mut count = 0;
        // SAFETY: the fatbin is whole and lives as long as the program; the results are locals.
        let mut functions = unsafe {
            sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast()).result().map_err(refused)?;
            sys::cuModuleGetFunctionCount(&mut count, module).result().map_err(refused)?;
            vec![ptr::null_mut(); count as usize]
        };
        // SAFETY: there is room for `count` handles.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }.result().map_err(refused)?;
        for function in functions {
            let mut name = ptr::null();
            // SAFETY: a handle of the module, whose names are C strings that live as long as it.
            let name = unsafe {
                sys::cuFuncGetName(&mut name, function).result().map_err(refused)?;
                CStr::from_ptr(name)
            };
            kernels.insert(name.to_string_lossy().into_owned(), Function(function));
        }
    }
    // A second thread that was faster has loaded the same.
    let _ = KERNELS.set(kernels);
    Ok(())
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks.
    pub blocks: (u32, u32, u32),
    /// Threads a block.
    pub threads: u32,
    /// Dynamic shared memory a block, bytes.
    pub shared: u32,
}

impl Grid {
    /// `blocks` in one dimension, no dynamic shared memory, no overlap.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: (blocks as u32, 1, 1), threads, shared: 0 }
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

/// Launches a kernel on the device's stream, by programmatic dependent launch: it may start while the kernel before it ends, and
/// waits for that one's results itself (`pdl_wait` in `common.cuh`), in every block, before it reads or writes what others do (`lora_shrink_*` say why they wait later).
///
/// # Safety
/// The arguments are those of the kernel's contract, at the top of its `.cu` file: addresses of live device memory as
/// large as it says, used by nothing else at that point of the stream.
pub unsafe fn launch(device: &CudaDevice, name: &str, grid: Grid, args: &[Arg]) -> candle_core::Result<()> {
    if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
        return Ok(());
    }
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(|e| failed(name, e))?;
    let kernels = KERNELS.get().ok_or_else(|| candle_core::Error::Msg("the GPU was not opened".into()))?;
    let Function(function) =
        *kernels.get(name).ok_or_else(|| candle_core::Error::Msg(format!("there is no kernel {name}")))?;
    // What a kernel declares itself counts too.
    if grid.shared > 32 << 10 {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a plain call.
        unsafe { sys::cuFuncSetAttribute(function, attribute, grid.shared as i32) }
            .result()
            .map_err(|e| failed(name, e))?;
    }
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
    unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), ptr::null_mut()) }
        .result()
        .map_err(|e| failed(name, e))
}

fn failed(name: &str, error: impl std::fmt::Debug) -> candle_core::Error {
    candle_core::Error::Msg(format!("launching {name}: {error:?}"))
}
