//! Resident matrices on the GPU. The layout is described in `kernels/quant.cuh`, the kernels' contracts in their files.

mod kernels;

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Tensor};
use half::bf16;

use self::kernels::{QuantKernels, SmallProduct, WideProduct};
use super::tiles::{INPUTS, PackedTiles, ROWS, TileFormat};
use super::{MatrixStorage, QMatrix, Source};
use crate::gpu::blas::BlasProduct;
use crate::gpu::constants::{self, CODEBOOK_TABLE_BYTES, WIDE_PRODUCT_WARPS, WIDE_STAGE_ROWS, WIDE_STAGES};
use crate::gpu::kernels::{Arg, LaunchGrid};
use crate::gpu::{Context, address, input};
use crate::ops::batch::DeviceStep;
use crate::{Error, Result};

/// Most rows of a fused product, which reads the packed weights, on Hopper. Larger products dequantise to bf16 first; where all rows
/// must take one path, they run this many rows at a time.
const FUSED_ROWS: usize = 192;
/// The same on other GPUs, and the most rows that `quant_small.cu` takes.
const SMALL_ROWS: usize = 16;
/// Most rows and bytes of activations that small products read from shared memory.
const NEAR_ROWS: usize = 8;
const NEAR_BYTES: usize = 32 << 10;
/// Warps of a thread block of a small product.
const SMALL_WARPS: usize = 8;
/// Most rows of a narrow matrix: too few for a thread block on each SM with four slices of k and 256 rows.
const NARROW: usize = 33 * 128;
/// Codebook values are rounded to bf16 after multiplication by this, which suits NF4 best: the relative error (root mean square) is
/// 8.5e-4 instead of 1.4e-3.
const NF4_FACTOR: f32 = 1.436_752;

/// Rows of one source or several, packed into tiles in device memory.
pub struct TilePart {
    gpu: Arc<Context>,
    kernels: Arc<QuantKernels>,
    format: TileFormat,
    n: usize,
    k: usize,
    words: CudaSlice<u32>,
    /// For codebooks: the pair of values of each byte as bf16, times `1 / factor`.
    pairs: Option<CudaSlice<u32>>,
    /// For codebooks: the 16 values.
    codebook: Option<CudaSlice<f32>>,
    factor: f32,
    zero: f32,
}

impl TilePart {
    /// Repacks sources and copies them to the device. Neighbours of the same format become one part: q, k and v are mostly one
    /// product.
    pub fn pack(sources: &[Source], device: &CudaDevice) -> Result<Vec<Self>> {
        let mut parts: Vec<PackedTiles> = Vec::new();
        for source in sources {
            let tiles = PackedTiles::pack(source)?;
            match parts.last_mut() {
                Some(last) if last.continues_with(&tiles) => last.append(tiles),
                _ => parts.push(tiles),
            }
        }
        let gpu = Context::of(device)?;
        parts.into_iter().map(|tiles| Self::upload(tiles, &gpu)).collect()
    }

    fn upload(tiles: PackedTiles, gpu: &Arc<Context>) -> Result<Self> {
        let device = gpu.device();
        let (mut pairs, mut codebook) = (None, None);
        if tiles.format == TileFormat::Lut {
            let value = |code: usize| u32::from(bf16::from_f32(tiles.codebook[code] * NF4_FACTOR).to_bits());
            let table: Vec<u32> = (0..256).map(|byte| value(byte & 15) | value(byte >> 4) << 16).collect();
            pairs = Some(device.clone_htod(&table)?);
            codebook = Some(device.clone_htod(&tiles.codebook[..])?);
        }
        let part = Self {
            gpu: gpu.clone(),
            kernels: gpu.kernels()?,
            format: tiles.format,
            n: tiles.n,
            k: tiles.k,
            words: device.clone_htod(&tiles.words)?,
            pairs,
            codebook,
            factor: 1.0 / NF4_FACTOR,
            zero: tiles.zero,
        };
        // The copies above may still read the host's data, which is dropped now.
        gpu.stream().synchronize().map_err(|e| Error::internal(format!("copying weights: {e}")))?;
        Ok(part)
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        4 * (self.words.len() + self.pairs.as_ref().map_or(0, |p| p.len() + 16))
    }

    /// The kernels' `WEIGHTS_ARGS`: the first arguments of all kernels that read the matrix.
    fn args(&self) -> Vec<Arg> {
        let pairs = self.pairs.as_ref().map_or(0, address);
        vec![
            address(&self.words).into(),
            pairs.into(),
            self.factor.into(),
            self.zero.into(),
            self.n.into(),
            self.k.into(),
        ]
    }

    fn codebook(&self) -> u64 {
        self.codebook.as_ref().map_or(0, address)
    }

    fn tiles(&self) -> usize {
        self.k.div_ceil(INPUTS)
    }

    /// Writes the values to `out [n, k]` bf16.
    fn dequantise(&self, out: u64) -> Result<()> {
        let grid = LaunchGrid::new((self.tiles() * self.n.div_ceil(ROWS)).div_ceil(8), 256);
        let mut args = self.args();
        args.extend([Arg::from(self.codebook()), out.into()]);
        // SAFETY: `out` has n k values; the rest is this part's own memory.
        unsafe { self.gpu.launch(self.kernels.dequantise(self.format), grid, &args) }
    }

    /// Writes rows `ids[i] - offset` to `out [rows, k]` f32, except ids of other parts.
    fn gather(&self, ids: u64, rows: usize, offset: usize, out: u64) -> Result<()> {
        let grid = LaunchGrid::new_2d(self.tiles().div_ceil(8), rows, 256);
        let mut args = self.args();
        args.extend([Arg::from(self.codebook()), ids.into(), offset.into(), out.into()]);
        // SAFETY: `ids` has `rows` ids and `out` rows k values; the kernel skips ids of other parts.
        unsafe { self.gpu.launch(self.kernels.gather(self.format), grid, &args) }
    }

    /// `y[:, column..column + n] = x [m, k] · Wᵀ` for up to [`fused_rows`] rows, `y` with `ldy` columns, bf16 or f32.
    fn product(&self, x: u64, m: usize, y: u64, ldy: usize, dtype: DType) -> Result<()> {
        let few = match slices(self.n) {
            // Without slices the wide product is faster, unless shared memory holds all activations next to the small product's rings.
            1 if fused_rows(&self.gpu) > SMALL_ROWS => (NEAR_BYTES / (2 * self.k)).clamp(1, NEAR_ROWS),
            _ => SMALL_ROWS,
        };
        if m > few { self.wide_product(x, m, y, ldy, dtype) } else { self.small_product(x, m, y, ldy, dtype) }
    }

    /// The product of up to [`SMALL_ROWS`] rows.
    fn small_product(&self, x: u64, m: usize, y: u64, ldy: usize, dtype: DType) -> Result<()> {
        let slices = slices(self.n);
        let near = 2 * m * self.k;
        let rings = self.table() + SMALL_WARPS * self.ring(constants::SMALL_RING_STAGES[self.format as usize]);
        // Small GPUs have 99 KB for a thread block, 4 of which the kernel declares itself.
        let room = if fused_rows(&self.gpu) > SMALL_ROWS { usize::MAX } else { 95 << 10 };
        let (variant, near) = match m {
            ..=NEAR_ROWS if near <= NEAR_BYTES && rings + near <= room => (SmallProduct::Near, near),
            ..=8 => (SmallProduct::Rows8, 0),
            _ => (SmallProduct::Rows16, 0),
        };
        let sums = self.group_sums(x, m)?;
        let mut args = self.args();
        let sums_at = sums.as_ref().map_or(0, |s| s.1);
        args.extend([Arg::from(x), y.into(), m.into(), ldy.into(), slices.into(), sums_at.into()]);
        let blocks = self.n.div_ceil(ROWS).div_ceil(SMALL_WARPS / slices);
        let grid = LaunchGrid { shared: (rings + near) as u32, ..LaunchGrid::new(blocks, 32 * SMALL_WARPS) };
        // SAFETY: x and y have the shapes that the caller promises, m rows of k and ldy.
        unsafe { self.gpu.launch(self.kernels.small(self.format, variant, dtype), grid, &args) }
    }

    /// The product of up to [`FUSED_ROWS`] rows, for which there are [`ArrivalCounters`], on Hopper.
    fn wide_product(&self, x: u64, m: usize, y: u64, ldy: usize, dtype: DType) -> Result<()> {
        let slices = slices(self.n);
        let variant = WideProduct::for_rows(m, self.n <= NARROW);
        let (tokens, teams) = (variant.tokens(), variant.teams());
        let pieces = m.div_ceil(tokens);
        let rows = ROWS * WIDE_PRODUCT_WARPS / teams;
        let (blocks, layers) = (self.n.div_ceil(rows), slices / teams);
        // The activations in the order of the products, and their sums over groups.
        let group = self.format.sum_group();
        let arranged = self.gpu.output::<bf16>(pieces * self.tiles() * tokens * INPUTS)?;
        let sums = match group {
            Some(group) => Some(self.gpu.output::<f32>(pieces * self.tiles() * tokens * (INPUTS / group))?),
            None => None,
        };
        let sums = sums.as_ref().map_or(0, |s| s.1);
        let args: [Arg; 6] =
            [x.into(), m.into(), self.k.into(), group.unwrap_or(0).into(), arranged.1.into(), sums.into()];
        let blocks_of = |x: usize, y: usize, z: usize| (x as u32, y as u32, z as u32);
        let grid = LaunchGrid { blocks: blocks_of(self.tiles(), tokens / 16, pieces), ..LaunchGrid::new(1, 64) };
        let kernel = if self.format.bits8() { &self.kernels.arrange_8 } else { &self.kernels.arrange_4 };
        // SAFETY: x has m rows of k; the rest has the sizes of the contract.
        unsafe { self.gpu.launch(kernel, grid, &args)? };

        let partial = match layers {
            1 => None,
            _ => Some(self.gpu.output::<f32>(pieces * blocks * layers * rows * tokens)?),
        };
        let partial = partial.as_ref().map_or(0, |p| p.1);
        let mut args = self.args();
        args.extend([Arg::from(arranged.1), y.into(), m.into(), ldy.into(), slices.into(), sums.into()]);
        let arrivals = self.gpu.get_or_init(ArrivalCounters::new)?;
        args.extend([Arg::from(partial), address(&arrivals.0).into()]);
        // The stages of activations with their sums, the codebook's table, and a ring for each warp. The sums at the end take less.
        let tiles = self.format.chunk().min(WIDE_STAGE_ROWS / tokens / teams);
        let stage = tiles * tokens * (2 * INPUTS + group.map_or(0, |group| INPUTS / group * 4));
        let ring = self.ring(constants::WIDE_RING_STAGES[self.format as usize]);
        let shared = WIDE_STAGES * teams * stage + self.table() + WIDE_PRODUCT_WARPS * ring;
        let grid = LaunchGrid {
            blocks: blocks_of(blocks, layers, pieces),
            shared: shared as u32,
            ..LaunchGrid::new(1, 32 * WIDE_PRODUCT_WARPS)
        };
        // SAFETY: as above; `partial` and the counters have the sizes of the contract.
        unsafe { self.gpu.launch(self.kernels.wide(self.format, variant, dtype), grid, &args) }
    }

    /// Bytes of a codebook's table in shared memory.
    fn table(&self) -> usize {
        if self.format == TileFormat::Lut { CODEBOOK_TABLE_BYTES } else { 0 }
    }

    /// Bytes of a warp's ring of chunks.
    fn ring(&self, stages: usize) -> usize {
        stages * self.format.chunk_bytes().next_multiple_of(128) + 128
    }

    /// `x [m, k]` summed over the groups, for formats with mins.
    fn group_sums(&self, x: u64, m: usize) -> Result<Option<(Tensor, u64)>> {
        let Some(group) = self.format.sum_group() else { return Ok(None) };
        let count = self.tiles() * INPUTS / group * 64;
        let sums = self.gpu.output::<f32>(count)?;
        let args = [Arg::from(x), m.into(), self.k.into(), group.into(), sums.1.into()];
        // SAFETY: x has m rows of k, and sums the size of the contract.
        unsafe { self.gpu.launch(&self.kernels.group_sums, LaunchGrid::new(count.div_ceil(256), 256), &args)? };
        Ok(Some(sums))
    }
}

/// Slices of k: as many as give every SM a thread block. They depend on the shape alone, since they decide the order of sums.
fn slices(n: usize) -> usize {
    match n.div_ceil(256) {
        _ if n <= NARROW => 8,
        100.. => 1,
        34.. => 2,
        _ => 4,
    }
}

/// An upper bound of the bytes that a product of up to `rows` rows with a matrix `[n, k]` needs in addition to its result: activations in
/// the order of the products, their sums over groups of 16, and sums of up to four thread blocks.
pub fn workspace_bytes(n: usize, k: usize, rows: usize) -> usize {
    let rows = rows.min(FUSED_ROWS).next_multiple_of(64);
    let sums = if slices(n) > 1 { 4 * 4 * rows * n.next_multiple_of(256) } else { 0 };
    rows * k.next_multiple_of(INPUTS) * 9 / 4 + sums
}

/// Most rows of a fused product: `quant_wide.cu` needs instructions that only Hopper has.
fn fused_rows(gpu: &Context) -> usize {
    if gpu.compute_major == 9 { FUSED_ROWS } else { SMALL_ROWS }
}

/// Counters of thread blocks that have arrived, which are zero between products. One buffer serves all launches, since products
/// follow one another; captured graphs contain its address.
struct ArrivalCounters(CudaSlice<i32>);

impl ArrivalCounters {
    /// 256-row blocks of the widest matrix with slices, for each 64 rows of activations.
    const COUNT: usize = 99 * FUSED_ROWS.div_ceil(64);

    fn new(gpu: &Context) -> Result<Self> {
        Ok(Self(gpu.device().alloc_zeros::<i32>(Self::COUNT)?))
    }
}

impl QMatrix {
    /// `x [m, k] bf16 -> [m, n]`.
    pub(super) fn multiply_cuda(&self, parts: &[TilePart], x: &Tensor, dtype: DType) -> Result<Tensor> {
        let (m, k) = x.dims2()?;
        if k != self.k {
            return Err(Error::internal(format!("product of [{m}, {k}] with a [{}, {}] matrix", self.n, self.k)));
        }
        let gpu = &parts[0].gpu;
        let at_once = fused_rows(gpu);
        // The kernels' loads need aligned rows.
        let fused = k % 8 == 0 && (m <= at_once || dtype == DType::F32 || gpu.deterministic);
        if !fused {
            return Ok(x.matmul(&self.dequantised(parts)?.t()?)?.to_dtype(dtype)?);
        }
        let (y, to) = match dtype {
            DType::F32 => gpu.output::<f32>((m, self.n))?,
            _ => gpu.output::<bf16>((m, self.n))?,
        };
        let x = input::<bf16>(x)?;
        for first in (0..m).step_by(at_once) {
            let rows = at_once.min(m - first);
            let mut column = 0;
            for part in parts {
                let to = to + ((first * self.n + column) * dtype.size_in_bytes()) as u64;
                part.product(x + (2 * first * self.k) as u64, rows, to, self.n, dtype)?;
                column += part.n;
            }
        }
        Ok(y)
    }

    /// `dy [m, n] bf16 -> [m, k]`, whose shape was checked.
    pub(super) fn multiply_transposed_cuda(&self, parts: &[TilePart], dy: &Tensor, dtype: DType) -> Result<Tensor> {
        let (gpu, m) = (&parts[0].gpu, dy.dim(0)?);
        let (dx, to) = match dtype {
            DType::F32 => gpu.output::<f32>((m, self.k))?,
            _ => gpu.output::<bf16>((m, self.k))?,
        };
        let values = self.dequantised(parts)?;
        let (a, b) = ((input::<bf16>(dy)?, self.n), input::<bf16>(&values)?);
        let product = BlasProduct { m, n: self.k, k: self.n, a, b, b_transposed: false, c: to, dtype };
        // SAFETY: shapes of the tensors.
        unsafe { product.launch(gpu)? };
        Ok(dx)
    }

    /// All values `[n, k]` bf16. Errors: the matrix is on the CPU.
    pub(in crate::ops) fn values_cuda(&self) -> Result<Tensor> {
        match &self.storage {
            MatrixStorage::Tiles(parts) => self.dequantised(parts),
            MatrixStorage::Panels(_) => Err(Error::internal("weights on the CPU where the GPU needs them")),
        }
    }

    /// All values `[n, k]` bf16.
    fn dequantised(&self, parts: &[TilePart]) -> Result<Tensor> {
        let (values, mut to) = parts[0].gpu.output::<bf16>((self.n, self.k))?;
        for part in parts {
            part.dequantise(to)?;
            to += (2 * part.n * self.k) as u64;
        }
        Ok(values)
    }

    /// Rows `ids`, or the tokens of `step`, as `[rows, k]` f32.
    pub(super) fn gather_cuda(&self, parts: &[TilePart], ids: &[u32], step: Option<&DeviceStep>) -> Result<Tensor> {
        let gpu = &parts[0].gpu;
        let uploaded;
        let (ids, rows) = match step {
            Some(step) => (step.tokens, step.rows),
            None => {
                uploaded = gpu.device().clone_htod(ids)?;
                (address(&uploaded), ids.len())
            }
        };
        let (out, to) = gpu.output::<f32>((rows, self.k))?;
        let mut offset = 0;
        for part in parts {
            part.gather(ids, rows, offset, to)?;
            offset += part.n;
        }
        Ok(out)
    }
}
