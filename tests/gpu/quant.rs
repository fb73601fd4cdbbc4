//! Quantised matrices on a GPU: their exact values, and products, whose rows do not depend on the batch.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use quiver::ops::quant::{Codec, QMatrix, Source, gather_rows, matmul, matmul_transposed, nf4};
use safetensors::SafeTensors;

use crate::common::{self, assert_close, both, device, random, relative_error};

/// Relative error of a product whose activations and result are bf16, codebook values included, with room for chance.
const BOUND: f64 = 6e-3;

const CODECS: [Codec; 11] = [
    Codec::Q4_0,
    Codec::Q4_1,
    Codec::Q4K,
    Codec::Q5_0,
    Codec::Q5_1,
    Codec::Q5K,
    Codec::Q6K,
    Codec::Q8_0,
    Codec::F32,
    Codec::F16,
    Codec::BF16,
];

/// Random codes, and scales that keep values near 1.
pub fn source(codec: Codec, n: usize, k: usize, seed: u64) -> Source<'static> {
    let values = random(seed, n * k);
    let bytes: Vec<u8> = match codec {
        Codec::F32 => values.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
        Codec::F16 => values.iter().flat_map(|v| f16::from_f32(v.to_f32()).to_le_bytes()).collect(),
        Codec::BF16 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => {
            let size = codec.block_bytes();
            let count = n * k / codec.block();
            let noise = random(seed + 1, count * size);
            let mut bytes: Vec<u8> =
                noise.iter().map(|v| (v.to_bits() & 0xff) as u8 ^ (v.to_bits() >> 3) as u8).collect();
            for (block, noise) in bytes.chunks_exact_mut(size).zip(noise.chunks_exact(size)) {
                let half = |v: f32| f16::from_f32(v).to_le_bytes();
                let (d, m) = (0.02 + 0.01 * noise[0].to_f32(), 0.05 * noise[1].to_f32());
                match codec {
                    Codec::Q6K => block[208..].copy_from_slice(&half(d / 30.0)),
                    Codec::Q4_1 | Codec::Q5_1 => {
                        block[..2].copy_from_slice(&half(d));
                        block[2..4].copy_from_slice(&half(m));
                    }
                    Codec::Q4K | Codec::Q5K => {
                        block[..2].copy_from_slice(&half(d / 20.0));
                        block[2..4].copy_from_slice(&half(d / 20.0));
                    }
                    _ => block[..2].copy_from_slice(&half(d)),
                }
            }
            bytes
        }
    };
    Source::Blocks { codec, n, k, bytes: bytes.into() }
}

pub fn codebook(n: usize, k: usize, block: usize, seed: u64) -> Source<'static> {
    Source::Codebook {
        n,
        k,
        block,
        codes: random(seed, (n * k).div_ceil(2)).iter().map(|v| (v.to_bits() >> 2) as u8).collect::<Vec<_>>().into(),
        scales: random(seed + 1, (n * k).div_ceil(block)).iter().map(|v| 0.2 + v.to_f32().abs()).collect(),
        codebook: nf4::CODEBOOK,
    }
}

/// `[rows][n]` in f64 over the exact weights.
fn reference(w: &QMatrix, x: &[bf16], rows: usize) -> Vec<f64> {
    let (n, k) = (w.n(), w.k());
    let weights: Vec<Vec<f32>> = (0..n).map(|row| w.row(row as u32).expect("a row")).collect();
    let dot = |x: &[bf16], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w)).sum();
    (0..rows).flat_map(|t| weights.iter().map(|w| dot(&x[t * k..(t + 1) * k], w)).collect::<Vec<f64>>()).collect()
}

fn product(w: &QMatrix, x: &[bf16], rows: usize, dtype: DType) -> Vec<f32> {
    let x = Tensor::from_slice(&x[..rows * w.k()], (rows, w.k()), &device()).expect("a tensor");
    let y = matmul(w, &x, dtype).expect("a product");
    y.to_dtype(DType::F32).and_then(|y| y.flatten_all()?.to_vec1()).expect("values")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn values_are_exactly_the_cpus() {
    for (i, codec) in CODECS.into_iter().enumerate() {
        for (n, k) in [(1, 256), (15, 512), (16, 256), (17, 768), (100, 1280)] {
            let source = source(codec, n, k, i as u64);
            let cpu = QMatrix::pack(std::slice::from_ref(&source), &Device::Cpu).expect("packs");
            let gpu = QMatrix::pack(std::slice::from_ref(&source), &device()).expect("packs");
            let ids: Vec<u32> = (0..n as u32).rev().collect();
            let rows = |w: &QMatrix| -> Vec<f32> {
                gather_rows(w, &ids, None).and_then(|t| Ok(t.flatten_all()?.to_vec1()?)).expect("rows")
            };
            // Dense matrices are bf16 on a GPU, and here their values are too. A zero's sign may differ.
            assert_eq!(rows(&cpu), rows(&gpu), "{codec:?} [{n}, {k}]");
        }
    }
    for (n, k, block) in [(3, 64, 64), (17, 128, 64), (5, 192, 64), (16, 256, 128)] {
        let source = codebook(n, k, block, 3);
        let cpu = QMatrix::pack(std::slice::from_ref(&source), &Device::Cpu).expect("packs");
        let gpu = QMatrix::pack(std::slice::from_ref(&source), &device()).expect("packs");
        for row in 0..n as u32 {
            assert_eq!(bits(&cpu.row(row).unwrap()), bits(&gpu.row(row).unwrap()), "[{n}, {k}] blocks of {block}");
        }
    }
}

#[test]
fn products_match_float64_and_rows_stand_alone() {
    let shapes =
        [(16, 256), (100, 512), (960, 576), (1030, 1536), (6144, 256), (9000, 256), (17000, 256), (26000, 256)];
    for (i, codec) in CODECS.into_iter().enumerate() {
        for (n, k) in shapes {
            if k % codec.block() != 0 || (n > 7000 && i % 3 != 0) {
                continue;
            }
            check(
                &QMatrix::pack(&[source(codec, n, k, 7 + i as u64)], &device()).expect("packs"),
                &format!("{codec:?}"),
            );
        }
    }
    for (n, k, block) in [(64, 64, 64), (100, 4096, 64), (1000, 320, 64), (9000, 128, 64), (96, 96, 64), (20, 96, 32)] {
        check(&QMatrix::pack(&[codebook(n, k, block, 5)], &device()).expect("packs"), "codebook");
    }
    // q, k and v of different types in one matrix.
    let stack = [source(Codec::Q4K, 128, 512, 1), source(Codec::Q4K, 32, 512, 2), source(Codec::Q6K, 32, 512, 3)];
    check(&QMatrix::pack(&stack, &device()).expect("packs"), "stacked");
}

/// Every variant of the product kernels, for narrow matrices in every format and for others in three formats. Few enough products for
/// `compute-sanitizer`.
#[test]
fn smallest_products() {
    let blocks = CODECS.into_iter().filter(|c| 512 % c.block() == 0).map(|codec| source(codec, 100, 512, 1));
    let wide = [source(Codec::Q4_1, 4300, 256, 2), source(Codec::Q6K, 4300, 256, 3), codebook(4300, 256, 64, 4)];
    for source in blocks.chain([codebook(100, 512, 64, 5)]).chain(wide) {
        let w = QMatrix::pack(&[source], &device()).expect("packs");
        let x = random(11, 70 * w.k());
        let all = product(&w, &x, 70, DType::F32);
        for m in [3, 7, 12, 17, 40] {
            assert_eq!(bits(&product(&w, &x, m, DType::F32)), bits(&all[..m * w.n()]), "{m} rows");
            product(&w, &x, m, DType::BF16);
        }
    }
}

/// Compares products of all batch sizes with f64, and their rows with one another bit for bit.
fn check(w: &QMatrix, what: &str) {
    let (n, k) = (w.n(), w.k());
    let x = random(11, 257 * k);
    let most = if n > 7000 { 70 } else { 257 };
    let want = reference(w, &x, most);
    // The largest fused product on Hopper; larger ones go through cuBLAS with dequantised weights.
    let packed = most.min(192);
    let all = product(w, &x, packed, DType::BF16);
    for m in [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 191, 257].into_iter().filter(|m| *m <= most) {
        let y = product(w, &x, m, DType::BF16);
        let error = relative_error(&y, &want[..m * n]);
        assert!(error < BOUND, "{what} [{n}, {k}] for {m} rows: {error}");
        if m <= packed {
            assert_eq!(bits(&y), bits(&all[..m * n]), "{what} [{n}, {k}]: {m} rows alone and among {packed}");
        }
        let y = product(w, &x, m, DType::F32);
        let error = relative_error(&y, &want[..m * n]);
        assert!(error < BOUND, "{what} [{n}, {k}] for {m} rows in f32: {error}");
    }
    // Other rows have no influence, even if they are NaN.
    let mut other = x[..packed * k].to_vec();
    for (row, values) in other.chunks_exact_mut(k).enumerate() {
        if row % 3 == 1 {
            values.fill(bf16::NAN);
        }
    }
    let y = product(w, &other, packed, DType::BF16);
    for row in (0..packed).filter(|row| row % 3 != 1) {
        let range = row * n..(row + 1) * n;
        assert_eq!(bits(&y[range.clone()]), bits(&all[range]), "{what} [{n}, {k}]: row {row} beside NaN");
    }
    for _ in 0..20 {
        assert_eq!(bits(&product(w, &x, packed, DType::BF16)), bits(&all), "{what} [{n}, {k}]: again");
    }
}

/// A layer that bitsandbytes quantised, with double quantisation: the GPU's bf16 values are equal to those of bitsandbytes bit for bit.
/// They are read through a product with the unit matrix, which is exact and has too many rows for the fused kernels.
#[test]
fn nf4_decodes_as_bitsandbytes_does() {
    let file = SafeTensors::deserialize(include_bytes!("../fixtures/nf4/bnb_nf4_dq.safetensors")).expect("the fixture");
    let part = |suffix: &str| file.tensor(&format!("odd_rows_bf16{suffix}")).expect("a tensor").data().to_vec();
    let floats = |bytes: Vec<u8>| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let state = part(".weight.quant_state.bitsandbytes__nf4");
    let state: serde_json::Value = serde_json::from_slice(&state).expect("JSON");
    let dim = |i: usize| state["shape"][i].as_u64().expect("a size") as usize;
    let (n, k) = (dim(0), dim(1));
    let offset = state["nested_offset"].as_f64().expect("an offset") as f32;
    let nested = floats(part(".weight.nested_absmax"));
    let scales = nf4::decode_scales(&part(".weight.absmax"), nf4::dynamic_map(), &nested, offset);
    let codes = part(".weight").into();
    let source = Source::Codebook { n, k, block: nf4::BLOCK, codes, scales, codebook: nf4::CODEBOOK };
    let w = QMatrix::pack(&[source], &device()).expect("packs");
    assert!(k > 192);
    let unit: Vec<bf16> = (0..k * k).map(|i| if i % (k + 1) == 0 { bf16::ONE } else { bf16::ZERO }).collect();
    let y = product(&w, &unit, k, DType::BF16);
    let want: Vec<f32> =
        part(".expected").chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    for row in 0..n {
        let got: Vec<f32> = (0..k).map(|i| y[i * n + row]).collect();
        assert_eq!(got, want[row * k..(row + 1) * k], "row {row}");
    }
}

#[test]
fn transposed_products_equal_the_cpu() {
    let sources = [
        source(Codec::Q4_0, 100, 512, 1),
        source(Codec::Q4K, 960, 768, 2),
        source(Codec::Q6K, 17, 256, 3),
        source(Codec::BF16, 64, 96, 4),
        codebook(130, 320, 64, 5),
        codebook(5, 64, 64, 6),
    ];
    for source in sources {
        let [cpu, gpu] = [Device::Cpu, device()].map(|d| QMatrix::pack(std::slice::from_ref(&source), &d).unwrap());
        for m in [1, 7, 65, 300] {
            let dy = both(&random(7, m * gpu.n()), (m, gpu.n()));
            let want = matmul_transposed(&cpu, &dy[0], DType::F32).unwrap();
            for dtype in [DType::BF16, DType::F32] {
                let got = matmul_transposed(&gpu, &dy[1], dtype).unwrap();
                assert_eq!(got.dtype(), dtype);
                assert_close(&got, &want, 6e-3, &format!("{m} rows of [{}, {}], {dtype:?}", gpu.n(), gpu.k()));
                assert!(common::bits(&got) == common::bits(&matmul_transposed(&gpu, &dy[1], dtype).unwrap()));
            }
        }
    }
}
