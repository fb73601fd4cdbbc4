//! Cross-entropy on a GPU against the CPU half.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use quiver::ops::loss::{LossTarget, cross_entropy};
use quiver::ops::quant::{Codec, QMatrix};

use crate::common::{assert_close, bits, both, device, random, values};
use crate::quant::source;

#[test]
fn losses_equal_the_cpu() {
    // More targets than fit a chunk; a vocabulary that is not a multiple of four.
    for (vocab, hidden, t) in [(1001, 64, 1700), (512, 256, 40), (70, 32, 1), (33, 36, 5)] {
        let source = source(Codec::BF16, vocab, hidden, 1);
        let [cpu, gpu] = [Device::Cpu, device()].map(|d| QMatrix::pack(std::slice::from_ref(&source), &d).unwrap());
        let x = both(&random(2, t * hidden), (t, hidden));
        let target = |row: usize| LossTarget {
            row: row as u32,
            id: (row * 7919 % vocab) as u32,
            scale: 0.25 + (row % 5) as f32,
        };
        let targets: Vec<LossTarget> = (0..t).filter(|row| row % 7 != 3).map(target).collect();
        let want = cross_entropy(&cpu, &x[0], &targets, true).unwrap();
        let got = cross_entropy(&gpu, &x[1], &targets, true).unwrap();
        let farthest = got.nll.iter().zip(&want.nll).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert_eq!(got.nll.len(), targets.len());
        assert!(farthest < 1e-4, "[{vocab}, {hidden}]: {farthest}");
        // Of two ids with about equal logits, either may come first.
        let other = got.correct.iter().zip(&want.correct).filter(|(a, b)| a != b).count();
        assert!(other * 200 <= targets.len(), "[{vocab}, {hidden}]: {other} of {}", targets.len());
        let (dx, want_dx) = (got.dx.unwrap(), want.dx.unwrap());
        assert_close(&dx, &want_dx, 6e-3, &format!("[{vocab}, {hidden}]"));
        for row in (0..t).filter(|row| row % 7 == 3) {
            assert!(values(&dx.narrow(0, row, 1).unwrap()).iter().all(|v| *v == 0.0), "row {row}");
        }
        let again = cross_entropy(&gpu, &x[1], &targets, true).unwrap();
        assert!(again.nll == got.nll && bits(&again.dx.unwrap()) == bits(&dx));
        let plain = cross_entropy(&gpu, &x[1], &targets, false).unwrap();
        assert!(plain.dx.is_none() && plain.nll == got.nll && plain.correct == got.correct);
        let none = cross_entropy(&gpu, &x[1], &[], true).unwrap();
        assert!(none.nll.is_empty() && values(&none.dx.unwrap()).iter().all(|v| *v == 0.0));
    }
}

/// With the unit matrix as the head, each row's own number is its likeliest id.
#[test]
fn likeliest_ids_are_correct() {
    let n = 64;
    let unit: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let bytes: Vec<u8> = unit.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let source = quiver::ops::quant::Source::Blocks { codec: Codec::BF16, n, k: n, bytes: bytes.into() };
    let head = QMatrix::pack(&[source], &device()).unwrap();
    let x = Tensor::from_vec(unit, (n, n), &device()).unwrap().to_dtype(DType::BF16).unwrap();
    let target = |row: usize| LossTarget { row: row as u32, id: (row - row % 2) as u32, scale: 1.0 };
    let loss = cross_entropy(&head, &x, &(0..n).map(target).collect::<Vec<_>>(), false).unwrap();
    assert_eq!(loss.correct, (0..n).map(|row| row % 2 == 0).collect::<Vec<_>>());
}
