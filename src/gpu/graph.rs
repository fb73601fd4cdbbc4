//! CUDA graphs: the launches of a function are captured once and replayed with one call.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};

use super::arena::{Arena, ArenaTensors};
use super::{Context, driver_error};
use crate::{Error, Result};

/// Captured graphs by key, which share one arena and run one at a time.
///
/// A graph contains the addresses that its launches had. These stay valid because graphs hold the [`Context`], whose op
/// states (workspaces, counters, kernels) never move; the other addresses (weights, KV cache, slots, step metadata) are
/// the owner's to keep.
pub struct GraphCache<K> {
    context: Arc<Context>,
    captured: HashMap<K, CapturedGraph>,
    /// Memory of the graphs' outputs. Dropped after them.
    arena: Arena,
}

struct CapturedGraph {
    /// The tensor that a replay writes. Dropped before the graph, which may own it.
    output: Tensor,
    graph: CudaGraph,
    /// The outputs of the step's ops.
    tensors: ArenaTensors,
}

// SAFETY: two threads must not use one graph at once; these move with their owner, and `replay` needs `&mut`.
unsafe impl<K: Send> Send for GraphCache<K> {}

impl<K: Hash + Eq> GraphCache<K> {
    /// An empty cache. Outputs of up to `block_bytes` a decoder block lie in the arena; the graphs allocate the others.
    pub fn new(context: Arc<Context>, block_bytes: usize) -> Result<Self> {
        let arena = Arena::new(context.clone(), block_bytes)?;
        Ok(Self { context, captured: HashMap::new(), arena })
    }

    /// Replays the graph of `key` and returns its output, valid until the next replay; `None` if none was captured.
    pub fn replay(&mut self, key: &K) -> Result<Option<Tensor>> {
        let Some(captured) = self.captured.get(key) else { return Ok(None) };
        captured.graph.launch().map_err(driver_error("replaying a CUDA graph"))?;
        Ok(Some(captured.output.clone()))
    }

    /// Captures what `step` launches, as the graph of `key`. The step must have run before, so that everything it loads or
    /// allocates once is there.
    pub fn capture(&mut self, key: K, step: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let stream = self.context.stream();
        let _exclusive = Context::exclusive();
        stream.synchronize().map_err(driver_error("waiting before a capture"))?;
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(driver_error("starting to capture a CUDA graph"))?;
        let (output, tensors) = self.arena.run(step);
        // The capture must end even if the step failed, or the stream could not be used any more.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let output = output?;
        let graph = graph.map_err(driver_error("capturing a CUDA graph"))?;
        let graph = graph.ok_or_else(|| Error::internal("capturing a step gave no CUDA graph"))?;
        graph.upload().map_err(driver_error("uploading a CUDA graph"))?;
        self.captured.insert(key, CapturedGraph { output, graph, tensors });
        Ok(())
    }
}

impl<K> Drop for GraphCache<K> {
    fn drop(&mut self) {
        let _ = self.context.stream().synchronize();
        self.captured.values_mut().for_each(|captured| drop(std::mem::take(&mut captured.tensors)));
        self.captured.clear();
        // A graph that was never replayed has no memory yet, so that freeing an output which it owns fails. The memory goes
        // with the graph all the same, and the error would otherwise show at the next, unrelated call.
        let _ = self.context.driver().check_err();
    }
}
