//! The metadata of steps in device memory.

use candle_core::{DType, Tensor};
use quiver::engine::cuda::StepBuffers;
use quiver::lora::slots::SlotPool;
use quiver::ops::batch::{Batch, Capacity};
use quiver::ops::quant::{Codec, QMatrix, gather_rows};

use crate::common::device;
use crate::quant::source;

/// Steps that the host prepares while an earlier one still runs have their own metadata: prompts of several steps without logits
/// are not read back in between.
#[test]
fn steps_ahead_of_the_gpu_keep_their_metadata() {
    let device = device();
    let rows = 512;
    let embedding = QMatrix::pack(&[source(Codec::BF16, 4096, 64, 1)], &device).unwrap();
    let capacity = Capacity { rows, spans: 1, block_table_len: rows / 16 };
    let mut buffers = StepBuffers::new(device.as_cuda_device().unwrap(), capacity).unwrap();
    let blocks: Vec<u32> = (0..rows as u32 / 16).collect();
    let tokens = |step: u32| (0..rows as u32).map(|i| (i * 7 + step * 1013) % 4096).collect::<Vec<_>>();

    let matrix = Tensor::ones((8192, 8192), DType::BF16, &device).unwrap();
    device.synchronize().unwrap();
    // Some 50 ms of work, behind which the copies of all steps wait.
    let work: Vec<_> = (0..40).map(|_| matrix.matmul(&matrix).unwrap()).collect();
    let gathered: Vec<_> = (0..4)
        .map(|step| {
            let mut batch = Batch::default();
            batch.push(&tokens(step), 0, &blocks, 16, &[]);
            let step = buffers.upload(&batch, &SlotPool::default(), None).unwrap();
            gather_rows(&embedding, &batch.tokens, Some(&step)).unwrap()
        })
        .collect();
    drop(work);
    for (step, gathered) in gathered.iter().enumerate() {
        let want = gather_rows(&embedding, &tokens(step as u32), None).unwrap();
        assert_eq!(gathered.to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap(), "step {step}");
    }
}
