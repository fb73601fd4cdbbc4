//! Training's attention: see `kernels/attention_causal.cu` for the kernels' contracts.

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Tensor};
use half::bf16;

use super::{Heads, MOST_DIM, PREFILL_ROWS, THREADS};
use crate::gpu::kernels::{Arg, Grid, launch};
use crate::gpu::uploads::upload;
use crate::gpu::{address, input, output};
use crate::{Error, Result};

/// Keys of a block that computes their gradients, and positions of a block of the kernels for any width.
const TILE: usize = 64;
/// Threads of a block of the dot products.
const DELTA_THREADS: usize = 256;

/// As [`super::super::causal`], whose checks were made. Errors: a head that is too wide or of odd width.
pub fn causal(qkv: &Tensor, sequences: &[Range<usize>], heads: Heads) -> Result<(Tensor, Tensor)> {
    let call = Call::new(qkv, sequences, heads)?;
    let rows = qkv.dim(0)?;
    let (out, out_at) = output::<bf16>(call.device, (rows, heads.query * heads.dim))?;
    let (lse, lse_at) = output::<f32>(call.device, (rows, heads.query))?;
    call.launch("attn_causal", Tiles::Queries, 0, &[input::<bf16>(qkv)?.into()], &[out_at.into(), lse_at.into()])?;
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
    let call = Call::new(qkv, sequences, heads)?;
    let rows = qkv.dim(0)?;
    let (_delta, delta_at) = output::<f32>(call.device, (rows, heads.query))?;
    let dout = Arg::from(input::<bf16>(dout)?);
    let rows = rows * heads.query;
    let lanes = if heads.dim.is_multiple_of(8) { (heads.dim / 8).next_power_of_two() } else { 32 };
    let grid = Grid::new(rows.div_ceil(DELTA_THREADS / lanes), DELTA_THREADS as u32);
    let args = [input::<bf16>(out)?.into(), dout, heads.dim.into(), rows.into(), lanes.into(), delta_at.into()];
    // SAFETY: shapes as the contract, by the caller's checks.
    unsafe { launch(call.device, "attn_delta", grid, &args)? };
    let (dqkv, to) = output::<bf16>(call.device, qkv.dims2()?)?;
    let inputs = [input::<bf16>(qkv)?.into(), dout, input::<f32>(lse)?.into(), delta_at.into()];
    call.launch("attn_causal_dq", Tiles::Queries, 0, &inputs, &[to.into()])?;
    call.launch("attn_causal_dkv", Tiles::Keys, 16 * TILE, &inputs, &[to.into()])?;
    Ok(dqkv)
}

/// What a kernel's tiles are of.
#[derive(Clone, Copy)]
enum Tiles {
    Queries,
    Keys,
}

struct Call<'a> {
    device: &'a CudaDevice,
    sequences: &'a [Range<usize>],
    heads: Heads,
    /// Query heads of a key-value head.
    group: usize,
    /// Whether the width has kernels on tensor cores.
    fast: bool,
}

impl<'a> Call<'a> {
    fn new(qkv: &'a Tensor, sequences: &'a [Range<usize>], heads: Heads) -> Result<Self> {
        if !heads.dim.is_multiple_of(2) || heads.dim > MOST_DIM {
            return Err(Error::internal(format!("attention of {heads:?}: widths are even, at most {MOST_DIM}")));
        }
        let group = heads.query / heads.kv;
        let fast = matches!(heads.dim, 64 | 96 | 128) && group <= PREFILL_ROWS;
        Ok(Self { device: qkv.device().as_cuda_device()?, sequences, heads, group, fast })
    }

    /// `name(inputs, work, kv_heads, group, scale, outputs)`, with `more` bytes of shared memory.
    fn launch(&self, name: &str, tiles: Tiles, more: usize, inputs: &[Arg], outputs: &[Arg]) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        let (work, items) = self.work(tiles)?;
        let scale = LOG2_E / (dim as f32).sqrt();
        let middle = [address(&work).into(), kv.into(), self.group.into(), scale.into()];
        let args = [inputs, &middle, outputs].concat();
        if self.fast {
            let row = if dim > 64 { 256 } else { 128 };
            let grid = Grid { shared: (384 * row + more) as u32, ..Grid::new(items * kv, THREADS) };
            // SAFETY: shapes as the contract, by the caller's checks, and tiles of sequences in these rows.
            unsafe { launch(self.device, &format!("{name}_{dim}"), grid, &args)? };
        } else {
            let heads = if matches!(tiles, Tiles::Keys) { kv } else { query };
            let args = [&args[..], &[dim.into()]].concat();
            // SAFETY: as above.
            unsafe { launch(self.device, &format!("{name}_any"), Grid::new(items * heads, THREADS), &args)? };
        }
        Ok(())
    }

    /// The tiles, those first that have most to do, and their number.
    fn work(&self, tiles: Tiles) -> Result<(Arc<CudaSlice<u32>>, usize)> {
        let step = match tiles {
            Tiles::Queries if self.fast => PREFILL_ROWS / self.group,
            _ => TILE,
        };
        let mut items: Vec<[u32; 4]> = Vec::new();
        for rows in self.sequences {
            let item = |first: usize| [rows.start, rows.len(), first, 0].map(|word| word as u32);
            items.extend((0..rows.len()).step_by(step).map(item));
        }
        items.sort_by_key(|&[_, length, first, _]| {
            Reverse(match tiles {
                Tiles::Queries => first,
                Tiles::Keys => length - first,
            })
        });
        Ok((upload(self.device, items.as_flattened())?, items.len()))
    }
}
