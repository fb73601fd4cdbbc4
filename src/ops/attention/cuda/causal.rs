//! Training's attention: see `kernels/attention_causal.cu` for the kernels' contracts.

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::{Heads, THREADS};
use crate::gpu::constants::{ATTENTION_TILE_ROWS, CAUSAL_ANY_TILE, CAUSAL_TILE_KEYS, MAX_HEAD_DIM};
use crate::gpu::kernels::{Arg, KernelHandle, KernelSet, Kernels, LaunchGrid};
use crate::gpu::{Context, address, input};
use crate::{Error, Result};

/// Threads of a thread block of the dot products.
const DELTA_THREADS: usize = 256;

struct CausalKernels {
    delta: KernelHandle,
    forward: ByWidth,
    query_gradient: ByWidth,
    key_gradient: ByWidth,
}

/// A kernel for each width of heads that tensor cores take, and one for all other widths.
struct ByWidth {
    w64: KernelHandle,
    w96: KernelHandle,
    w128: KernelHandle,
    any: KernelHandle,
}

impl KernelSet for CausalKernels {
    fn resolve(kernels: &Kernels) -> Result<Self> {
        let by_width = |name: &str| -> Result<ByWidth> {
            let get = |width: &str| kernels.get(&format!("{name}_{width}"));
            Ok(ByWidth { w64: get("64")?, w96: get("96")?, w128: get("128")?, any: get("any")? })
        };
        Ok(Self {
            delta: kernels.get("attn_delta")?,
            forward: by_width("attn_causal")?,
            query_gradient: by_width("attn_causal_dq")?,
            key_gradient: by_width("attn_causal_dkv")?,
        })
    }
}

impl ByWidth {
    /// The kernel on tensor cores, if the width has one.
    fn fast(&self, dim: usize) -> Option<&KernelHandle> {
        match dim {
            64 => Some(&self.w64),
            96 => Some(&self.w96),
            128 => Some(&self.w128),
            _ => None,
        }
    }
}

/// As [`super::super::causal`], whose checks were made. Errors: a head of odd width or that is too wide.
pub fn causal(qkv: &Tensor, sequences: &[Range<usize>], heads: Heads) -> Result<(Tensor, Tensor)> {
    let gpu = Context::of_tensor(qkv)?;
    let kernels = gpu.kernels::<CausalKernels>()?;
    let call = CausalAttention::new(&gpu, sequences, heads)?;
    let rows = qkv.dim(0)?;
    let (out, out_at) = gpu.output::<bf16>((rows, heads.query * heads.dim))?;
    let (lse, lse_at) = gpu.output::<f32>((rows, heads.query))?;
    call.launch(
        &kernels.forward,
        CausalTiles::Queries,
        0,
        &[input::<bf16>(qkv)?.into()],
        &[out_at.into(), lse_at.into()],
    )?;
    Ok((out, lse))
}

/// As [`super::super::causal_backward`], whose checks were made.
pub fn causal_backward(
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    sequences: &[Range<usize>],
    heads: Heads,
) -> Result<Tensor> {
    let gpu = Context::of_tensor(qkv)?;
    let kernels = gpu.kernels::<CausalKernels>()?;
    let call = CausalAttention::new(&gpu, sequences, heads)?;
    let rows = qkv.dim(0)?;
    let (_delta, delta_at) = gpu.output::<f32>((rows, heads.query))?;
    let dout = Arg::from(input::<bf16>(dout)?);
    let rows = rows * heads.query;
    let lanes = if heads.dim.is_multiple_of(8) { (heads.dim / 8).next_power_of_two() } else { 32 };
    let grid = LaunchGrid::new(rows.div_ceil(DELTA_THREADS / lanes), DELTA_THREADS);
    let args = [input::<bf16>(out)?.into(), dout, heads.dim.into(), rows.into(), lanes.into(), delta_at.into()];
    // SAFETY: shapes as in the contract, by the caller's checks.
    unsafe { gpu.launch(&kernels.delta, grid, &args)? };
    let (dqkv, to) = gpu.output::<bf16>(qkv.dims2()?)?;
    let inputs = [input::<bf16>(qkv)?.into(), dout, input::<f32>(lse)?.into(), delta_at.into()];
    call.launch(&kernels.query_gradient, CausalTiles::Queries, 0, &inputs, &[to.into()])?;
    call.launch(&kernels.key_gradient, CausalTiles::Keys, 16 * CAUSAL_TILE_KEYS, &inputs, &[to.into()])?;
    Ok(dqkv)
}

/// Whether a kernel's tiles are of queries or of keys.
#[derive(Clone, Copy)]
enum CausalTiles {
    Queries,
    Keys,
}

struct CausalAttention<'a> {
    gpu: &'a Context,
    sequences: &'a [Range<usize>],
    heads: Heads,
    /// Query heads of a key-value head.
    group: usize,
    /// Whether the kernels on tensor cores take the group.
    fast: bool,
}

impl<'a> CausalAttention<'a> {
    fn new(gpu: &'a Context, sequences: &'a [Range<usize>], heads: Heads) -> Result<Self> {
        if !heads.dim.is_multiple_of(2) || heads.dim > MAX_HEAD_DIM {
            return Err(Error::internal(format!("attention of {heads:?}: widths are even, at most {MAX_HEAD_DIM}")));
        }
        let group = heads.query / heads.kv;
        let fast = matches!(heads.dim, 64 | 96 | 128) && group <= ATTENTION_TILE_ROWS;
        Ok(Self { gpu, sequences, heads, group, fast })
    }

    /// Launches `kernel(inputs, work, kv_heads, group, scale, outputs)` with `more` bytes of shared memory in addition to the tiles'.
    fn launch(
        &self,
        kernels: &ByWidth,
        tiles: CausalTiles,
        more: usize,
        inputs: &[Arg],
        outputs: &[Arg],
    ) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        let (work, items) = self.work(tiles)?;
        let scale = LOG2_E / (dim as f32).sqrt();
        let middle = [address(&work).into(), kv.into(), self.group.into(), scale.into()];
        let args = [inputs, &middle, outputs].concat();
        if let Some(kernel) = kernels.fast(dim).filter(|_| self.fast) {
            let row = if dim > 64 { 256 } else { 128 };
            let grid = LaunchGrid { shared: (384 * row + more) as u32, ..LaunchGrid::new(items * kv, THREADS) };
            // SAFETY: shapes as the contract, by the caller's checks, and tiles of sequences in these rows.
            unsafe { self.gpu.launch(kernel, grid, &args)? };
        } else {
            let heads = if matches!(tiles, CausalTiles::Keys) { kv } else { query };
            let args = [&args[..], &[dim.into()]].concat();
            // SAFETY: as above.
            unsafe { self.gpu.launch(&kernels.any, LaunchGrid::new(items * heads, THREADS), &args)? };
        }
        Ok(())
    }

    /// The tiles and their number; those with most work come first.
    fn work(&self, tiles: CausalTiles) -> Result<(Arc<CudaSlice<u32>>, usize)> {
        let step = match tiles {
            CausalTiles::Queries if self.fast => ATTENTION_TILE_ROWS / self.group,
            CausalTiles::Keys if self.fast => CAUSAL_TILE_KEYS,
            _ => CAUSAL_ANY_TILE,
        };
        let mut items: Vec<[u32; 4]> = Vec::new();
        for rows in self.sequences {
            let item = |first: usize| [rows.start, rows.len(), first, 0].map(|word| word as u32);
            items.extend((0..rows.len()).step_by(step).map(item));
        }
        items.sort_by_key(|&[_, length, first, _]| {
            Reverse(match tiles {
                CausalTiles::Queries => first,
                CausalTiles::Keys => length - first,
            })
        });
        Ok((self.gpu.upload(items.as_flattened())?, items.len()))
    }
}
