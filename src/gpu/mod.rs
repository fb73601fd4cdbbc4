//! The GPU: which device runs the model, and what the CUDA halves of the ops share.
//!
//! A build without the feature `cuda` has only [`open`], which then refuses every GPU.

#[cfg(feature = "cuda")]
pub mod arena;
#[cfg(feature = "cuda")]
pub mod blas;
#[cfg(feature = "cuda")]
pub mod kernels;
#[cfg(feature = "cuda")]
pub mod uploads;

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use crate::{Error, Result};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU, where this build and this machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
                _ => Err(format!("{text:?} is no device: auto, cpu, cuda or cuda:N")),
            },
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Whether a sequence's bits must be the same however its rows are put into steps.
static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// From now on all rows take one path on a GPU, whatever the size of their step: products with the packed weights, attention by
/// the prompts' kernel, launch by launch. To be called before anything runs. The CPU has only one path.
pub fn be_deterministic() {
    DETERMINISTIC.store(true, Ordering::Relaxed);
}

/// Whether [`be_deterministic`] was called.
#[cfg(feature = "cuda")]
pub fn deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed)
}

/// Opens the device. Errors: a GPU was asked for and this build has no CUDA, or the machine has no such GPU.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(open_cuda(0).unwrap_or(Device::Cpu)),
        DeviceChoice::Cuda(ordinal) => open_cuda(ordinal),
    }
}

/// Free bytes of a GPU; `None` for the CPU.
pub fn free_memory(device: &Device) -> Result<Option<usize>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => memory().map(|(free, _)| Some(free)),
        _ => Ok(None),
    }
}

/// What GPU there is, for `doctor`.
pub fn describe() -> String {
    #[cfg(feature = "cuda")]
    {
        let described = open(DeviceChoice::Cuda(0)).and_then(|device| name(&device));
        described.unwrap_or_else(|e| e.message)
    }
    #[cfg(not(feature = "cuda"))]
    "not used by this build (--features cuda)".into()
}

/// A decoder block begins: what the block before the last has made is not needed any more.
pub fn next_block() {
    #[cfg(feature = "cuda")]
    arena::next_block();
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> Result<Device> {
    Err(Error::invalid("this build has no CUDA: build it with --features cuda, or use --device cpu"))
}

#[cfg(feature = "cuda")]
pub use cuda::*;

#[cfg(feature = "cuda")]
mod cuda {
    use bytesize::ByteSize;
    use candle_core::cuda_backend::CudaDType;
    use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, result};
    use candle_core::op::BackpropOp;
    use candle_core::{CudaDevice, CudaStorage, Layout, Shape, Storage, Tensor};

    use super::*;

    /// Opens a GPU: its own stream, no event tracking (everything runs on that stream, and events break graph capture),
    /// and all kernels loaded.
    pub(super) fn open_cuda(ordinal: usize) -> Result<Device> {
        // A machine without a driver fails in `init`, one without this GPU in `new`.
        let no_gpu = |e: String| Error::invalid(format!("there is no usable GPU {ordinal}: {e}; use --device cpu"));
        result::init().map_err(|e| no_gpu(e.to_string()))?;
        let device = CudaDevice::new_with_stream(ordinal).map_err(|e| no_gpu(e.to_string()))?;
        // SAFETY: one stream; what other streams touch (adapter uploads) is ordered by explicit events.
        unsafe { device.disable_event_tracking() };
        kernels::load(&device)?;
        keep_pool_memory(ordinal)?;
        Ok(Device::Cuda(device))
    }

    /// Lets the allocator keep freed memory: by default it goes back to the system at every synchronisation.
    fn keep_pool_memory(ordinal: usize) -> Result<()> {
        use candle_core::cuda_backend::cudarc::driver::sys;
        let failed = |e| Error::internal(format!("the GPU's memory pool: {e:?}"));
        let mut pool = std::ptr::null_mut();
        let mut all = u64::MAX;
        // SAFETY: plain calls with pointers to locals that outlive them; the ordinal was opened above.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, ordinal as i32).result().map_err(failed)?;
            let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast()).result().map_err(failed)?;
        }
        Ok(())
    }

    /// The address of a slice's first element.
    pub fn address<T: DeviceRepr>(slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(slice.stream()).0
    }

    /// The address of a contiguous tensor's first element.
    pub fn tensor_address<T: CudaDType + DeviceRepr>(
        op: &'static str,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<u64> {
        let (start, _) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
        Ok(address(storage.as_cuda_slice::<T>()?) + (start * size_of::<T>()) as u64)
    }

    /// The address of a contiguous tensor's first element on the GPU, good while the tensor lives.
    pub fn input<T: CudaDType + DeviceRepr>(x: &Tensor) -> Result<u64> {
        let (storage, layout) = x.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok(tensor_address::<T>("gpu-input", storage, layout)?),
            _ => Err(Error::internal("a tensor on the CPU where the GPU needs it")),
        }
    }

    /// A tensor of unset values to be written by a kernel, and its address.
    pub fn output<T: CudaDType + DeviceRepr>(device: &CudaDevice, shape: impl Into<Shape>) -> Result<(Tensor, u64)> {
        let shape = shape.into();
        if let Some(output) = arena::take::<T>(&shape) {
            return Ok(output);
        }
        // SAFETY: whoever asked for it launches the kernel that writes all of it, on the stream that it is used on.
        let slice = unsafe { device.alloc::<T>(shape.elem_count())? };
        let at = address(&slice);
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
        Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), at))
    }

    /// Name and memory of a GPU.
    pub(super) fn name(device: &Device) -> Result<String> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let name = stream.context().name().map_err(|e| Error::internal(format!("the GPU's name: {e}")))?;
        let (free, total) = memory()?;
        Ok(format!("{name}, {} in all, {} free", ByteSize(total as u64), ByteSize(free as u64)))
    }

    /// Free and total bytes of the current device.
    pub fn memory() -> Result<(usize, usize)> {
        result::mem_get_info().map_err(|e| Error::internal(format!("the GPU's memory: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, want) in [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda(0))]
        {
            assert_eq!(text.parse(), Ok(want));
        }
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!(DeviceChoice::Cuda(3).to_string(), "cuda:3");
        for wrong in ["gpu", "cuda:", "cuda:-1", "cuda:x", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    /// 64 GPUs are in no machine: with or without CUDA, the error says so and what to do.
    #[test]
    fn a_gpu_that_is_not_there_is_a_clear_error_and_auto_takes_the_cpu() {
        let error = open(DeviceChoice::Cuda(64)).expect_err("no such GPU");
        assert!(error.message.contains("--device cpu"), "{error}");
        assert!(open(DeviceChoice::Cpu).expect("a CPU").is_cpu());
        if !cfg!(feature = "cuda") {
            assert!(open(DeviceChoice::Auto).expect("a CPU").is_cpu());
        }
    }
}
