//! Decode steps as CUDA graphs: recorded once for each bucket of rows, without adapters, with them, and with DoRA's gains, and
//! replayed with whatever the step's metadata say.

use std::collections::HashMap;

use candle_core::cuda_backend::cudarc::driver::{CudaGraph, sys};
use candle_core::{CudaDevice, Tensor};

use super::step_buffers::Bucket;
use crate::gpu::arena::{Arena, Kept};
use crate::{Error, Result};

/// Rows that graphs are recorded for: a step takes the smallest that fits it.
pub const ROWS: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// The recorded steps.
pub struct Graphs {
    device: CudaDevice,
    recorded: HashMap<Bucket, Recorded>,
    /// Their memory. Dropped after them.
    arena: Arena,
}

struct Recorded {
    /// What a replay writes. Dropped before the graph, which may own it.
    logits: Tensor,
    graph: CudaGraph,
    _kept: Kept,
}

// SAFETY: graphs must not be used by two threads at once; these move with their owner, which needs `&mut` or is alone.
unsafe impl Send for Graphs {}

impl Graphs {
    /// None yet; what steps make in a decoder block fits into `block_bytes`, or is allocated by the graphs.
    pub fn new(device: CudaDevice, block_bytes: usize) -> Result<Self> {
        let arena = Arena::new(&device, block_bytes)?;
        Ok(Self { device, recorded: HashMap::new(), arena })
    }

    /// Replays a bucket's step and returns its logits `[bucket.rows, vocab]`, good until the next replay.
    pub fn replay(&mut self, bucket: Bucket) -> Result<Option<Tensor>> {
        let Some(recorded) = self.recorded.get(&bucket) else { return Ok(None) };
        recorded.graph.launch().map_err(|e| failed("replaying", e))?;
        Ok(Some(recorded.logits.clone()))
    }

    /// Records what `step` launches. It must have run before, so that everything it loads or allocates once is there.
    pub fn record(&mut self, bucket: Bucket, step: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.synchronize().map_err(|e| failed("waiting before recording", e))?;
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(|e| failed("starting to record", e))?;
        let logits = self.arena.run(step);
        // Recording ends whatever the step said, or the stream could not be used any more.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let (logits, kept) = logits?;
        let graph = graph.map_err(|e| failed("recording", e))?;
        let graph = graph.ok_or_else(|| Error::internal("recording a step gave no graph"))?;
        graph.upload().map_err(|e| failed("uploading", e))?;
        self.recorded.insert(bucket, Recorded { logits, graph, _kept: kept });
        Ok(())
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        let stream = self.device.cuda_stream();
        // Whatever goes wrong from here on concerns memory of graphs that is given back with them: a graph that never ran
        // has no memory yet, and freeing its output fails. Such an error would otherwise show at the next, unrelated call.
        let _ = stream.synchronize();
        for (_, Recorded { logits, graph, .. }) in self.recorded.drain() {
            drop(logits);
            drop(graph);
        }
        let _ = stream.context().check_err();
    }
}

fn failed(what: &str, error: impl std::fmt::Debug) -> Error {
    Error::internal(format!("{what} a decode step as a CUDA graph: {error:?}"))
}
