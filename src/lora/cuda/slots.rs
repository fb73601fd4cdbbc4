//! Slots in a GPU's memory: one arena for all weights, a table of where each slot's are, and uploads beside the engine's
//! stream.
//!
//! Arena and table never move, so that a captured graph serves whatever adapters are loaded later. An upload is one copy
//! out of page-locked memory by a stream of its own, which first waits for what the engine has launched so far: that may
//! still read the memory's last owner. Whoever asks for the slot polls until both, weights and row of the table, are there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DriverError, PinnedHostSlice, sys,
};
use candle_core::{CudaDevice, Device};

use super::gains::Gains;
use crate::arch::ModelConfig;
use crate::arch::Site;
use crate::gpu::address;
use crate::lora::BaseMatrices;
use crate::lora::image::{self, ImageLayout};
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Rows of the table: what a batch may name. 17 MB for an 8B model, and more adapters than fit any GPU at rank 16.
pub const SLOTS: usize = 4096;

/// Page-locked buffers: one for each loader thread, and one being copied meanwhile.
const BUFFERS: usize = 3;

/// Page-locked buffers have a multiple of this many 16-bit values, so that the next adapter of about the size fits too.
const BUFFER_STEP: usize = 1 << 20;

/// `k` and the modules' `n` of a site.
#[derive(Debug, Clone, Copy)]
pub struct SiteShape {
    /// Input features.
    pub k: usize,
    /// Output features of each module; 0 for those that the site does not have.
    pub n: [usize; 3],
}

/// The bytes that an adapter takes in a slot on this device; `None` on the CPU. Errors: it cannot be there.
pub fn image_bytes(device: &Device, weights: &AdapterWeights, model: &ModelConfig) -> Result<Option<usize>> {
    device.is_cuda().then(|| Ok(ImageLayout::new(weights, model)?.bytes)).transpose()
}

/// The memory of the slots on one GPU.
pub struct DeviceSlots {
    device: CudaDevice,
    model: ModelConfig,
    arena: CudaSlice<u16>,
    /// `[SLOTS][entries][ENTRY]`.
    table: CudaSlice<u16>,
    copies: Arc<CudaStream>,
    staging: Arc<Staging>,
    uploads: HashMap<u32, Upload>,
    /// Ranks of the slots that are ready, by site; see [`ImageLayout::ranks`].
    ranks: HashMap<u32, [usize; 5]>,
    /// What DoRA's adapters have beside the rest.
    gains: Gains,
    sites: [SiteShape; 5],
    /// What shrinking leaves for expanding: the last is the current one. Its address is part of a step's worklists, so it
    /// may be another from step to step; smaller ones stay, because a worklist that was made before may still name them.
    hidden: Mutex<Vec<CudaSlice<f32>>>,
    processors: usize,
}

/// A copy on its way.
struct Upload {
    done: CudaEvent,
    /// Where it goes in the arena, in values.
    start: usize,
    /// Holds what is being copied.
    image: Image,
}

impl DeviceSlots {
    /// An arena of `bytes`. Errors: no memory, or a width that the kernels do not take.
    pub fn new(device: &CudaDevice, model: &ModelConfig, bytes: usize) -> Result<Self> {
        let sites = Site::ALL.map(|site| {
            let modules = site.modules();
            let n = std::array::from_fn(|i| modules.get(i).map_or(0, |m| m.shape(model).0));
            SiteShape { k: modules[0].shape(model).1, n }
        });
        if let Some(site) = sites.iter().find(|site| site.k % 8 != 0) {
            return Err(Error::invalid(format!(
                "adapters on a GPU need widths that are multiples of 8, not {}",
                site.k
            )));
        }
        let no_room = |e: candle_core::Error| {
            Error::invalid(format!("the GPU has no room for {bytes} bytes of adapters: lower --adapter-memory ({e})"))
        };
        let stream = device.cuda_stream();
        let context = stream.context();
        let processors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("its number of processors"))?;
        // SAFETY: kernels read only what an upload has written.
        let arena = unsafe { device.alloc::<u16>(bytes / 2) }.map_err(no_room)?;
        Ok(Self {
            table: device.alloc_zeros(SLOTS * image::entries(model) * image::ENTRY).map_err(no_room)?,
            arena,
            copies: context.new_stream().map_err(failed("a stream for uploads"))?,
            staging: Arc::new(Staging {
                context: context.clone(),
                buffers: Mutex::default(),
                returned: Condvar::new(),
            }),
            device: device.clone(),
            model: model.clone(),
            uploads: HashMap::new(),
            ranks: HashMap::new(),
            gains: Gains::default(),
            sites,
            hidden: Mutex::default(),
            processors: processors as usize,
        })
    }

    /// Where adapters are laid out on the host.
    pub fn staging(&self) -> &Arc<Staging> {
        &self.staging
    }

    /// Starts the upload of an image into `place` of the arena, in bytes, as `slot`.
    pub fn put(&mut self, slot: u32, place: Range<usize>, mut image: Image) -> Result<()> {
        let row = image.layout.row(address(&self.arena) + place.start as u64, &self.model);
        let values = image.layout.bytes / 2;
        if values > place.len() / 2 {
            return Err(Error::internal(format!("an image of {} bytes in a place of {}", 2 * values, place.len())));
        }
        let buffer = image.buffer.values(values + row.len())?;
        buffer[values..].copy_from_slice(&row);
        let start = place.start / 2;
        self.copies.join(&self.device.cuda_stream()).map_err(failed("an upload"))?;
        let mut to = self.arena.slice_mut(start..start + values);
        self.copies.memcpy_htod(&buffer[..values], &mut to).map_err(failed("an upload"))?;
        let row_at = slot as usize * row.len();
        let mut to = self.table.slice_mut(row_at..row_at + row.len());
        self.copies.memcpy_htod(&buffer[values..], &mut to).map_err(failed("an upload"))?;
        let done = self.copies.record_event(None).map_err(failed("an upload"))?;
        self.uploads.insert(slot, Upload { done, start, image });
        Ok(())
    }

    /// Whether an upload is done, and the slot usable. Never waits.
    pub fn arrived(&mut self, slot: u32) -> Result<bool> {
        if let Some(upload) = self.uploads.get(&slot) {
            if !upload.done.try_is_complete().map_err(failed("an upload"))? {
                return Ok(false);
            }
            self.ranks.insert(slot, upload.image.layout.ranks);
            if let Some(Upload { start, image, .. }) = self.uploads.remove(&slot) {
                self.gains.arrived(slot, start, image.layout);
            }
        }
        Ok(self.ranks.contains_key(&slot))
    }

    /// Forgets a slot. Its row of the table stays until the next owner's, since no batch names it.
    pub fn remove(&mut self, slot: u32) {
        self.ranks.remove(&slot);
        self.gains.remove(slot);
        if self.uploads.remove(&slot).is_some() {
            // A copy that failed may still be under way; its memory must not go to others yet.
            let _ = self.copies.synchronize();
        }
    }

    /// Ranks of a slot that is ready, all modules of a site together, by site.
    pub fn ranks(&self, slot: u32) -> Option<&[usize; 5]> {
        self.ranks.get(&slot)
    }

    /// Makes DoRA's gains of a slot's magnitudes, over the base that they scale, unless that was done or it has none. It
    /// takes about as long as a decode step, and for the first adapter of a base once over all its weights. Errors: no
    /// memory.
    pub fn prepare_gains(&mut self, slot: u32, base: &dyn BaseMatrices) -> Result<()> {
        self.gains.prepare(slot, &mut self.arena, &self.device, base)
    }

    /// Whether the rows of a slot that is ready have gains. Errors: they were not prepared.
    pub fn gained(&self, slot: u32) -> Result<bool> {
        self.gains.of(slot)
    }

    /// The slot table, and how many entries a slot has in it.
    pub fn table(&self) -> (u64, usize) {
        (address(&self.table), image::entries(&self.model))
    }

    /// The entry of a site in a slot's row of the table.
    pub fn entry(&self, layer: usize, site: Site) -> usize {
        if site == Site::Head { 4 * self.model.num_layers } else { 4 * layer + site as usize }
    }

    /// Shapes of a site.
    pub fn site(&self, site: Site) -> SiteShape {
        self.sites[site as usize]
    }

    /// The most splits of `k` at any site.
    pub fn most(&self, splits: impl Fn(usize) -> usize) -> usize {
        self.sites.iter().map(|site| splits(site.k)).max().unwrap_or(1)
    }

    /// Multiprocessors of the GPU.
    pub fn processors(&self) -> usize {
        self.processors
    }

    /// The address of room for so many intermediate values; 0 for none.
    pub fn hidden(&self, values: usize) -> Result<u64> {
        let mut hidden = self.hidden.lock().unwrap_or_else(PoisonError::into_inner);
        if hidden.last().map_or(0, CudaSlice::len) < values {
            // SAFETY: the expanding kernel reads only what the shrinking one has written.
            hidden.push(unsafe { self.device.alloc(values.next_power_of_two())? });
        }
        Ok(hidden.last().map_or(0, address))
    }
}

impl Drop for DeviceSlots {
    fn drop(&mut self) {
        // The arena goes with us, and copies are ordered by no other stream.
        let _ = self.copies.synchronize();
    }
}

/// An adapter laid out on the host, ready to be copied.
pub struct Image {
    layout: ImageLayout,
    buffer: Buffer,
}

/// Page-locked memory for adapters on their way to the GPU. Allocating it may hold up the GPU, so it is kept.
pub struct Staging {
    context: Arc<CudaContext>,
    buffers: Mutex<Buffers>,
    returned: Condvar,
}

#[derive(Default)]
struct Buffers {
    free: Vec<PinnedHostSlice<u16>>,
    /// Buffers in use.
    out: usize,
}

/// A buffer that goes back when it is dropped.
struct Buffer {
    slice: Option<PinnedHostSlice<u16>>,
    staging: Arc<Staging>,
}

impl Image {
    /// What it takes of the arena.
    pub fn bytes(&self) -> usize {
        self.layout.bytes
    }
}

impl Staging {
    /// Lays an adapter out; waits for a buffer. Errors: no page-locked memory.
    pub fn image(self: &Arc<Self>, weights: &AdapterWeights, model: &ModelConfig) -> Result<Image> {
        let layout = ImageLayout::new(weights, model)?;
        let values = layout.bytes / 2;
        // The row of the table comes behind.
        let mut buffer = self.take(values + image::entries(model) * image::ENTRY)?;
        layout.write(weights, model, buffer.values(values)?);
        Ok(Image { layout, buffer })
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, values: usize) -> Result<Buffer> {
        let mut buffers = self.lock();
        while buffers.out == BUFFERS {
            buffers = self.returned.wait(buffers).unwrap_or_else(PoisonError::into_inner);
        }
        buffers.out += 1;
        let mut buffer = Buffer { slice: None, staging: self.clone() };
        let fitting = (0..buffers.free.len()).filter(|i| buffers.free[*i].len() >= values);
        if let Some(i) = fitting.min_by_key(|i| buffers.free[*i].len()) {
            buffer.slice = Some(buffers.free.swap_remove(i));
            return Ok(buffer);
        }
        // One that is too small makes place for the new one.
        let small = if buffers.free.len() + buffers.out > BUFFERS { buffers.free.pop() } else { None };
        drop(buffers);
        drop(small);
        // SAFETY: `ImageLayout::write` and `DeviceSlots::put` write all that is copied.
        let slice = unsafe { self.context.alloc_pinned_with_flags(values.next_multiple_of(BUFFER_STEP), 0) };
        buffer.slice = Some(slice.map_err(failed("page-locked memory for an adapter"))?);
        Ok(buffer)
    }
}

impl Buffer {
    fn values(&mut self, len: usize) -> Result<&mut [u16]> {
        let slice = self.slice.as_mut().ok_or_else(|| Error::internal("an adapter's buffer is gone"))?;
        Ok(&mut slice.as_mut_slice().map_err(failed("page-locked memory"))?[..len])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut buffers = self.staging.lock();
        buffers.out -= 1;
        buffers.free.extend(self.slice.take());
        drop(buffers);
        self.staging.returned.notify_one();
    }
}

fn failed(what: &str) -> impl Fn(DriverError) -> Error {
    move |e| Error::internal(format!("the GPU failed at {what}: {e}"))
}

/// The slots' memory on a device; `None` for the CPU, whose slots are tensors' memory of their own.
pub fn open(device: &Device, model: &ModelConfig, bytes: usize) -> Result<Option<DeviceSlots>> {
    match device {
        Device::Cuda(device) => DeviceSlots::new(device, model, bytes).map(Some),
        _ => Ok(None),
    }
}
