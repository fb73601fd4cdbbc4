//! Slots in a GPU's memory: one allocation for all weights, a table of the slots' addresses, and uploads on a stream of their own.
//!
//! Memory and table never move, so that a captured graph serves all adapters that are loaded later. An upload copies from pinned
//! memory on its own stream. The stream first waits for everything that the engine has launched, which may still read the adapter
//! that previously occupied this memory. The slot's user polls until both the weights and the table's row have arrived.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, CudaStream};
use candle_core::{CudaDevice, Device};

use super::gains::SlotGains;
use super::memory::SlotMemory;
pub use super::staging::{AdapterImage, PinnedStaging};
use crate::arch::{ModelConfig, Site};
use crate::gpu::{Context, address, driver_error};
use crate::lora::BaseMatrices;
use crate::lora::image::{ImageLayout, SlotEntry};
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Rows of the table: slots that a batch may name. 17 MB for an 8B model, and more adapters than fit any GPU at rank 16.
pub const SLOTS: usize = 4096;

/// Shape of a site.
#[derive(Debug, Clone, Copy)]
pub struct SiteShape {
    /// Input features.
    pub k: usize,
    /// Output features of each module; 0 for modules that the site does not have.
    pub n: [usize; 3],
}

/// The slot table in device memory.
pub struct SlotTable {
    /// Device address of `[SLOTS][entries]` entries.
    pub address: u64,
    /// Entries of a slot.
    pub entries: usize,
}

/// The bytes that an adapter takes in a slot on this device; `None` on the CPU. Errors: it does not fit the layout.
pub fn image_bytes(device: &Device, weights: &AdapterWeights, model: &ModelConfig) -> Result<Option<usize>> {
    device.is_cuda().then(|| Ok(ImageLayout::new(weights, model)?.bytes)).transpose()
}

/// The slots' memory on a device; `None` for the CPU, whose slots own their memory.
pub fn open(device: &Device, model: &ModelConfig, bytes: usize) -> Result<Option<DeviceSlots>> {
    match device {
        Device::Cuda(device) => DeviceSlots::new(device, model, bytes).map(Some),
        _ => Ok(None),
    }
}

/// The slots on one GPU.
pub struct DeviceSlots {
    gpu: Arc<Context>,
    model: ModelConfig,
    memory: SlotMemory,
    /// `[SLOTS][entries]` encoded [`SlotEntry`]s.
    table: CudaSlice<u16>,
    /// The stream of uploads.
    copies: Arc<CudaStream>,
    staging: Arc<PinnedStaging>,
    uploads: HashMap<u32, SlotUpload>,
    /// Ranks of the slots that are ready, by site; see [`ImageLayout::ranks`].
    ranks: HashMap<u32, [usize; 5]>,
    gains: SlotGains,
    sites: [SiteShape; 5],
    /// Buffers for `h`, which shrink writes and expand reads; the last one is current. A step's worklist contains its address, so it
    /// may change from step to step. Smaller buffers stay, since an earlier worklist may still contain their addresses.
    shrunk: Mutex<Vec<CudaSlice<f32>>>,
}

/// A copy that is under way.
struct SlotUpload {
    done: CudaEvent,
    /// Where the image goes in the memory, in values.
    start: usize,
    /// Owns the source of the copy.
    image: AdapterImage,
}

impl DeviceSlots {
    /// Slots with `bytes` of memory. Errors: no memory, or a width that the kernels do not take.
    pub fn new(device: &CudaDevice, model: &ModelConfig, bytes: usize) -> Result<Self> {
        let gpu = Context::of(device)?;
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
        // SAFETY: kernels read only what an upload has written.
        let values = unsafe { device.alloc::<u16>(bytes / 2) }.map_err(no_room)?;
        let words = SLOTS * SlotEntry::count(model.num_layers) * SlotEntry::WORDS;
        Ok(Self {
            table: device.alloc_zeros(words).map_err(no_room)?,
            memory: SlotMemory { gpu: gpu.clone(), values },
            copies: gpu.driver().new_stream().map_err(driver_error("making a stream for uploads"))?,
            staging: Arc::new(PinnedStaging::new(gpu.clone())),
            gpu,
            model: model.clone(),
            uploads: HashMap::new(),
            ranks: HashMap::new(),
            gains: SlotGains::default(),
            sites,
            shrunk: Mutex::default(),
        })
    }

    /// Where adapters are laid out on the host.
    pub fn staging(&self) -> &Arc<PinnedStaging> {
        &self.staging
    }

    /// Starts the upload of an image into `place` of the memory, in bytes, as `slot`.
    pub fn put(&mut self, slot: u32, place: Range<usize>, mut image: AdapterImage) -> Result<()> {
        if image.bytes() > place.len() {
            return Err(Error::internal(format!("an image of {} bytes in a place of {}", image.bytes(), place.len())));
        }
        let (start, failed) = (place.start / 2, driver_error("uploading an adapter"));
        let row = image.layout.table_row(address(&self.memory.values) + place.start as u64, &self.model);
        let (values, row) = image.with_row(&row)?;
        self.copies.join(&self.gpu.stream()).map_err(&failed)?;
        let mut to = self.memory.values.slice_mut(start..start + values.len());
        self.copies.memcpy_htod(values, &mut to).map_err(&failed)?;
        let row_start = slot as usize * row.len();
        let mut to = self.table.slice_mut(row_start..row_start + row.len());
        self.copies.memcpy_htod(row, &mut to).map_err(&failed)?;
        let done = self.copies.record_event(None).map_err(&failed)?;
        self.uploads.insert(slot, SlotUpload { done, start, image });
        Ok(())
    }

    /// Whether an upload is done, and the slot usable. Never waits.
    pub fn arrived(&mut self, slot: u32) -> Result<bool> {
        if let Some(upload) = self.uploads.get(&slot) {
            if !upload.done.try_is_complete().map_err(driver_error("uploading an adapter"))? {
                return Ok(false);
            }
            self.ranks.insert(slot, upload.image.layout.ranks);
            if let Some(SlotUpload { start, image, .. }) = self.uploads.remove(&slot) {
                self.gains.arrived(slot, start, image.layout);
            }
        }
        Ok(self.ranks.contains_key(&slot))
    }

    /// Forgets a slot. Its row of the table stays until the next upload to the slot: no batch names the slot before that.
    pub fn remove(&mut self, slot: u32) {
        self.ranks.remove(&slot);
        self.gains.remove(slot);
        if self.uploads.remove(&slot).is_some() {
            // A copy that failed may still be under way; its memory must not go to others yet.
            let _ = self.copies.synchronize();
        }
    }

    /// Total ranks of a slot that is ready, by site; see [`ImageLayout::ranks`].
    pub fn ranks(&self, slot: u32) -> Option<&[usize; 5]> {
        self.ranks.get(&slot)
    }

    /// Turns a slot's magnitudes into DoRA's gains over the base, unless that is done or it has none. It takes about as long
    /// as a decode step; the first adapter of a base needs one pass over all weights too. Errors: no memory.
    pub fn prepare_gains(&mut self, slot: u32, base: &dyn BaseMatrices) -> Result<()> {
        self.gains.prepare(slot, &mut self.memory, base)
    }

    /// Whether the rows of a slot that is ready have gains. Errors: they were not prepared.
    pub fn has_gains(&self, slot: u32) -> Result<bool> {
        self.gains.of(slot)
    }

    /// The slot table.
    pub fn table(&self) -> SlotTable {
        SlotTable { address: address(&self.table), entries: SlotEntry::count(self.model.num_layers) }
    }

    /// The index of a site's entry in a slot's row of the table.
    pub fn entry(&self, layer: usize, site: Site) -> usize {
        SlotEntry::index(layer, site, self.model.num_layers)
    }

    /// Shape of a site.
    pub fn site(&self, site: Site) -> SiteShape {
        self.sites[site as usize]
    }

    /// The largest number of splits of `k` at any site.
    pub fn most_splits(&self, splits: impl Fn(usize) -> usize) -> usize {
        self.sites.iter().map(|site| splits(site.k)).max().unwrap_or(1)
    }

    /// The address of a buffer for `values` values of `h`; 0 if `values` is 0 and there is none.
    pub fn shrunk(&self, values: usize) -> Result<u64> {
        let mut shrunk = self.shrunk.lock().unwrap_or_else(PoisonError::into_inner);
        if shrunk.last().map_or(0, CudaSlice::len) < values {
            // SAFETY: expand reads only what shrink has written.
            shrunk.push(unsafe { self.gpu.device().alloc(values.next_power_of_two())? });
        }
        Ok(shrunk.last().map_or(0, address))
    }
}

impl Drop for DeviceSlots {
    fn drop(&mut self) {
        // The memory goes with the slots, and no other stream waits for the copies.
        let _ = self.copies.synchronize();
    }
}
