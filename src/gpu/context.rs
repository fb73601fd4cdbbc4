//! The state of one opened GPU, and how an op finds it.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytesize::ByteSize;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, result, sys,
};
use candle_core::cuda_backend::{CudaDType, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Shape, Storage, Tensor};

use super::OpenOptions;
use super::arena::ActiveArena;
use super::kernels::{KernelSet, Kernels};
use super::uploads::UploadCache;
use crate::{Error, Result};

/// All open devices: the only static of the CUDA half. Candle's devices cannot hold our data, but each has a unique id,
/// by which an op finds the context of its tensors.
static REGISTRY: ContextRegistry = ContextRegistry { contexts: RwLock::new(Vec::new()), exclusive: Mutex::new(()) };

struct ContextRegistry {
    /// A context stays here as long as anything refers to it or to its device. [`Context::open`] drops the others, so that
    /// contexts outlive their use only until the next device is opened.
    contexts: RwLock<Vec<(DeviceId, Arc<Context>)>>,
    /// Held while a device is opened, contexts are dropped, or a graph is captured. The first two may synchronise the whole GPU
    /// (cuBLAS handles and modules come and go), which would invalidate a capture on another device's stream.
    exclusive: Mutex<()>,
}

/// The state of one opened GPU: its kernels, its properties, and the state that ops keep on it.
///
/// Everything runs on the device's own stream. Hence one workspace serves all launches of an op: they follow one another.
pub(crate) struct Context {
    device: CudaDevice,
    /// See [`OpenOptions::deterministic`].
    pub deterministic: bool,
    /// Number of streaming multiprocessors (SMs).
    pub sm_count: usize,
    /// Major number of the compute capability: 9 is Hopper.
    pub compute_major: usize,
    pub(super) kernels: Kernels,
    /// Where [`Context::output`] takes memory while a graph is captured. Only the engine's thread makes outputs then.
    arena: Mutex<Option<ActiveArena>>,
    uploads: UploadCache,
    /// State of ops by type.
    states: RwLock<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

/// Bytes of a GPU's memory.
pub(crate) struct GpuMemory {
    pub free: usize,
    total: usize,
}

impl Context {
    /// Opens a GPU: a stream of its own, no event tracking (everything runs on that stream, and events break graph
    /// capture), and all kernels loaded. Errors: the machine has no such GPU, or the driver refuses the kernels.
    pub(super) fn open(ordinal: usize, options: OpenOptions) -> Result<CudaDevice> {
        let _exclusive = Self::exclusive();
        drop_unused();
        // A machine without a driver fails in `init`, one without this GPU in `new`.
        let no_gpu = |e: String| Error::invalid(format!("there is no usable GPU {ordinal}: {e}; use --device cpu"));
        result::init().map_err(|e| no_gpu(e.to_string()))?;
        let device = CudaDevice::new_with_stream(ordinal).map_err(|e| no_gpu(e.to_string()))?;
        // SAFETY: one stream; what other streams touch (adapter uploads) is ordered by explicit events.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let property =
            |attribute| stream.context().attribute(attribute).map_err(driver_error("reading its properties"));
        let context = Self {
            kernels: Kernels::load(stream.context())?,
            deterministic: options.deterministic,
            sm_count: property(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            compute_major: property(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as usize,
            arena: Mutex::default(),
            uploads: UploadCache::default(),
            states: RwLock::default(),
            device: device.clone(),
        };
        keep_pool_memory(ordinal)?;
        let mut contexts = REGISTRY.contexts.write().unwrap_or_else(PoisonError::into_inner);
        contexts.push((device.id(), Arc::new(context)));
        Ok(device)
    }

    /// The context of a device. Errors: it was not opened by [`super::open`].
    pub fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        let contexts = REGISTRY.contexts.read().unwrap_or_else(PoisonError::into_inner);
        let found = contexts.iter().find(|(id, _)| *id == device.id());
        found.map(|(_, context)| context.clone()).ok_or_else(|| Error::internal("the GPU was not opened by gpu::open"))
    }

    /// Keeps others from opening devices, dropping contexts and capturing graphs while the guard lives.
    pub(super) fn exclusive() -> MutexGuard<'static, ()> {
        REGISTRY.exclusive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The context of a tensor's device. Errors: the tensor is on the CPU, or as [`Context::of`].
    pub fn of_tensor(x: &Tensor) -> Result<Arc<Self>> {
        Self::of(x.device().as_cuda_device()?)
    }

    /// The device.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// The device's stream.
    pub fn stream(&self) -> Arc<CudaStream> {
        self.device.cuda_stream()
    }

    /// The driver's context of the device.
    pub fn driver(&self) -> Arc<CudaContext> {
        self.device.cuda_stream().context().clone()
    }

    /// An op's state of type `T`, made at its first use and kept as long as the context: addresses inside it, which
    /// captured graphs contain, stay valid. It must hold no tensor and no clone of the device, or the device would seem to be
    /// in use for ever; a [`CudaSlice`] is fine.
    pub fn get_or_init<T: Any + Send + Sync>(&self, init: impl FnOnce(&Self) -> Result<T>) -> Result<Arc<T>> {
        let states = self.states.read().unwrap_or_else(PoisonError::into_inner);
        let found = states.get(&TypeId::of::<T>()).cloned();
        drop(states);
        let state = match found {
            Some(state) => state,
            None => {
                let new = Arc::new(init(self)?);
                let mut states = self.states.write().unwrap_or_else(PoisonError::into_inner);
                // Another thread may have been faster; its state may be in use already.
                states.entry(TypeId::of::<T>()).or_insert(new).clone()
            }
        };
        state.downcast().map_err(|_| Error::internal("a state of another type"))
    }

    /// A set of kernels, resolved at its first use. Errors: a kernel is missing.
    pub fn kernels<K: KernelSet>(&self) -> Result<Arc<K>> {
        self.get_or_init(|context| K::resolve(&context.kernels))
    }

    /// A tensor of unset values that a kernel will write, and its address. It lies in the arena while a graph is captured
    /// and the arena has room.
    pub fn output<T: CudaDType + DeviceRepr>(&self, shape: impl Into<Shape>) -> Result<(Tensor, u64)> {
        let shape = shape.into();
        if let Some(output) = self.arena().as_mut().and_then(|arena| arena.take::<T>(&self.device, &shape)) {
            return Ok(output);
        }
        // SAFETY: the caller launches a kernel that writes all of it, on the stream on which it is used.
        let slice = unsafe { self.device.alloc::<T>(shape.elem_count())? };
        let at = address(&slice);
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()));
        Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), at))
    }

    /// `words` on the device, valid while the result lives and until the stream has run what was launched by then. The last
    /// few are kept and found again by their content.
    pub fn upload(&self, words: &[u32]) -> Result<Arc<CudaSlice<u32>>> {
        self.uploads.upload(&self.device, words)
    }

    /// See [`super::next_block`].
    pub(super) fn next_block(&self) {
        if let Some(arena) = self.arena().as_mut() {
            arena.next_block();
        }
    }

    /// The arena that is in use, if one is.
    pub(super) fn arena(&self) -> MutexGuard<'_, Option<ActiveArena>> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GPU's memory.
    pub(super) fn memory(&self) -> Result<GpuMemory> {
        let (free, total) = self.driver().mem_get_info().map_err(driver_error("reading its free memory"))?;
        Ok(GpuMemory { free, total })
    }

    /// Name and memory.
    pub(super) fn describe(&self) -> Result<String> {
        let name = self.driver().name().map_err(driver_error("reading its name"))?;
        let GpuMemory { free, total } = self.memory()?;
        Ok(format!("{name}, {} in all, {} free", ByteSize(total as u64), ByteSize(free as u64)))
    }

    /// Whether nothing but the registry refers to the context or to its device.
    fn is_unused(self: &Arc<Self>) -> bool {
        // Every clone of a device holds its cuBLAS handle: here the context's own and the one asked for.
        Arc::strong_count(self) == 1 && Arc::strong_count(&self.device.cublas_handle()) == 2
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Kernels and the memory of ops must not go while something launched runs.
        let _ = self.stream().synchronize();
    }
}

/// Drops contexts that nothing refers to. The caller holds [`Context::exclusive`].
fn drop_unused() {
    let mut contexts = REGISTRY.contexts.write().unwrap_or_else(PoisonError::into_inner);
    let (unused, used): (Vec<_>, Vec<_>) = contexts.drain(..).partition(|(_, context)| context.is_unused());
    *contexts = used;
    // Dropping waits for the devices' streams: not under the lock, which every op takes.
    drop(contexts);
    drop(unused);
}

/// Lets the allocator keep freed memory: by default it goes back to the system at every synchronisation.
fn keep_pool_memory(ordinal: usize) -> Result<()> {
    let mut pool = std::ptr::null_mut();
    let mut all = u64::MAX;
    // SAFETY: plain calls with pointers to locals that outlive them; the ordinal was opened before.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, ordinal as i32).result().map_err(driver_error("its memory pool"))?;
        let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let set = sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast());
        set.result().map_err(driver_error("its memory pool"))?;
    }
    Ok(())
}

/// An error of the driver at some action.
pub(crate) fn driver_error(action: &str) -> impl Fn(DriverError) -> Error {
    move |e| Error::internal(format!("the GPU failed at {action}: {e:?}"))
}

/// The address of a slice's first element.
pub(crate) fn address<T: DeviceRepr>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// The address of a contiguous tensor's first element, given the tensor's storage.
pub(crate) fn tensor_address<T: CudaDType + DeviceRepr>(
    op: &'static str,
    storage: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<u64> {
    let (start, _) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    Ok(address(storage.as_cuda_slice::<T>()?) + (start * size_of::<T>()) as u64)
}

/// The address of a contiguous tensor's first element on the GPU, valid while the tensor lives.
pub(crate) fn input<T: CudaDType + DeviceRepr>(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => Ok(tensor_address::<T>("gpu-input", storage, layout)?),
        _ => Err(Error::internal("a tensor on the CPU where the GPU needs it")),
    }
}
