use candle_core::quantized::{GgmlDType, QTensor};

use super::*;

/// All block formats.
pub const BLOCK_CODECS: [Codec; 8] =
    [Codec::Q4_0, Codec::Q4_1, Codec::Q5_0, Codec::Q5_1, Codec::Q8_0, Codec::Q4K, Codec::Q5K, Codec::Q6K];

/// A small generator, so that cases are the same on every machine.
fn next(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) as u32
}

/// Values in about -2..2.
pub fn random_floats(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count).map(|_| next(&mut state) as f32 / 2f32.powi(30) - 1.0).collect()
}

/// Where a block's f16 scales lie.
fn half_offsets(codec: Codec) -> &'static [usize] {
    match codec {
        Codec::Q4_0 | Codec::Q5_0 | Codec::Q8_0 => &[0],
        Codec::Q6K => &[208],
        _ => &[0, 2],
    }
}

/// Random blocks. Their scales are finite, of both signs, and sometimes zero, subnormal or large.
pub fn random_blocks(codec: Codec, n: usize, k: usize, seed: u64) -> Vec<u8> {
    let (values, size) = (codec.block(), codec.block_bytes());
    let mut state = seed;
    let mut bytes: Vec<u8> = (0..n * k / values * size).map(|_| next(&mut state) as u8).collect();
    for block in bytes.chunks_exact_mut(size) {
        for &at in half_offsets(codec) {
            let d = match next(&mut state) % 16 {
                0 => 0.0,
                1 => 3e-7,
                2 => 200.0,
                r => (r as f32 - 8.5) / 100.0,
            };
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
        }
    }
    bytes
}

fn source(codec: Codec, n: usize, k: usize, seed: u64) -> Source<'static> {
    let bytes = match codec {
        Codec::F32 => random_floats(n * k, seed).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Codec::F16 => random_floats(n * k, seed).iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Codec::BF16 => random_floats(n * k, seed).iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => random_blocks(codec, n, k, seed),
    };
    Source::Blocks { codec, n, k, bytes: bytes.into() }
}

fn codebook(n: usize, k: usize, block: usize) -> Source<'static> {
    let mut state = 9;
    Source::Codebook {
        n,
        k,
        block,
        codes: (0..(n * k).div_ceil(2)).map(|_| next(&mut state) as u8).collect::<Vec<_>>().into(),
        scales: random_floats((n * k).div_ceil(block), 4),
        codebook: std::array::from_fn(|i| i as f32 / 7.0 - 1.1),
    }
}

fn product(w: &QMatrix, x: &[f32]) -> Vec<f32> {
    let x = Tensor::from_slice(x, (x.len() / w.k(), w.k()), &Device::Cpu).expect("a tensor");
    matmul(w, &x, DType::F32).and_then(|y| Ok(y.flatten_all()?.to_vec1()?)).expect("a product")
}

fn panels(w: &QMatrix) -> &PanelMatrix {
    match &w.storage {
        MatrixStorage::Panels(panels) => panels,
        #[cfg(feature = "cuda")]
        MatrixStorage::Tiles(_) => unreachable!("packed for the CPU"),
    }
}

fn exact(w: &QMatrix, row: usize) -> Vec<f32> {
    w.row(row as u32).expect("a row")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Checks a product against f64 over the exact weights. It must be nearly exact for the quantised activations that the kernels
/// multiply. For the given activations it must be within the error of their quantisation.
fn check_product(w: &QMatrix, x: &[f32], y: &[f32], what: &str) {
    let (n, k) = (w.n(), w.k());
    let rows: Vec<(bool, Vec<f32>)> =
        (0..n).map(|r| (matches!(panels(w).locate_row(r).0, PanelPart::Affine(_)), exact(w, r))).collect();
    for (x, y) in x.chunks_exact(k).zip(y.chunks_exact(n)) {
        let rounded: Vec<f64> = match rows.iter().any(|(integer, _)| *integer) {
            false => Vec::new(),
            true => {
                let tile = &activations::tiles(x, k, ActivationForms { integer: true, float: false })[0];
                (0..k).map(|i| f64::from(tile.q(0, i)) * f64::from(tile.scales[0])).collect()
            }
        };
        let step = f64::from(x.iter().fold(0f32, |a, b| a.max(b.abs()))) / 32639.0;
        for ((integer, row), got) in rows.iter().zip(y) {
            let got = f64::from(*got);
            let dot = |x: &mut dyn Iterator<Item = f64>| -> (f64, f64) {
                row.iter().zip(x).fold((0.0, 0.0), |(sum, size), (w, x)| {
                    let term = f64::from(*w) * x;
                    (sum + term, size + term.abs())
                })
            };
            let (given, size) = dot(&mut x.iter().map(|x| f64::from(*x)));
            let exact = if *integer { dot(&mut rounded.iter().copied()).0 } else { given };
            // Cancellation with zero points and mins costs the 8-bit formats the most.
            assert!((got - exact).abs() <= size * 4e-6 + 1e-30, "{what}: {got} for {exact} of size {size}");
            // Rounding errors add up like a random walk, and six standard deviations do not happen by chance.
            let norm = row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
            let loose = 6.0 * step * norm * (1.0f64 / 12.0).sqrt() + size * 4e-6 + 1e-30;
            assert!((got - given).abs() <= loose, "{what}: {got} for {given}, allowed {loose}");
        }
    }
}

#[test]
fn rows_equal_those_that_candle_decodes() {
    let types = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    for (codec, dtype) in BLOCK_CODECS.into_iter().zip(types) {
        for n in [1, 15, 16, 17, 100] {
            let k = 512;
            let bytes = random_blocks(codec, n, k, 7 + n as u64);
            let storage = candle_core::quantized::QStorage::from_data(bytes.clone().into(), &Device::Cpu, dtype);
            let reference = QTensor::new(storage.expect("storage"), (n, k)).expect("a tensor");
            let reference: Vec<Vec<f32>> =
                reference.dequantize(&Device::Cpu).and_then(|t| t.to_vec2()).expect("candle decodes");
            let w = QMatrix::pack(&[Source::Blocks { codec, n, k, bytes: bytes.into() }], &Device::Cpu).expect("packs");
            for (row, want) in reference.iter().enumerate() {
                assert_eq!(bits(&exact(&w, row)), bits(want), "{codec:?} row {row} of {n}");
            }
        }
    }
}

#[test]
fn dense_and_codebook_rows_are_exact() {
    let x = random_floats(33 * 65, 2);
    let w = QMatrix::dense(33, 65, x.clone()).expect("packs");
    assert_eq!((0..33).flat_map(|r| exact(&w, r)).collect::<Vec<_>>(), x);
    for (n, k, block) in [(17, 128, 64), (5, 96, 64), (3, 33, 16), (16, 320, 32)] {
        let source = codebook(n, k, block);
        let w = QMatrix::pack(std::slice::from_ref(&source), &Device::Cpu).expect("packs");
        let Source::Codebook { codes, scales, codebook, .. } = source else { unreachable!("made above") };
        for row in 0..n {
            let want: Vec<f32> = (row * k..(row + 1) * k)
                .map(|i| {
                    let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
                    codebook[usize::from(code)] * scales[i / block]
                })
                .collect();
            assert_eq!(exact(&w, row), want, "[{n}, {k}] blocks of {block}, row {row}");
        }
    }
}

#[test]
fn products_match_float64() {
    for codec in BLOCK_CODECS.into_iter().chain([Codec::F32, Codec::F16, Codec::BF16]) {
        let ks: &[usize] = match codec {
            Codec::Q4K | Codec::Q5K | Codec::Q6K => &[256, 1536],
            _ => &[32, 96, 320, 576],
        };
        for (i, &k) in ks.iter().enumerate() {
            for (n, m) in [(1, 1), (15, 3), (16, 8), (17, 13), (100, 70)] {
                let w = QMatrix::pack(&[source(codec, n, k, (i + n) as u64)], &Device::Cpu).expect("packs");
                let x = random_floats(m * k, 11 + m as u64);
                check_product(&w, &x, &product(&w, &x), &format!("{codec:?} [{n}, {k}] x {m}"));
            }
        }
    }
    for (n, k, block) in [(17, 128, 64), (30, 96, 64)] {
        let w = QMatrix::pack(&[codebook(n, k, block)], &Device::Cpu).expect("packs");
        let x = random_floats(9 * k, 1);
        check_product(&w, &x, &product(&w, &x), "codebook");
    }
}

#[test]
fn a_row_is_the_same_alone_and_in_any_batch() {
    let k = 256;
    let stack =
        [source(Codec::Q4_1, 40, k, 1), source(Codec::Q6K, 17, k, 2), source(Codec::F16, 9, k, 3), codebook(20, k, 64)];
    let w = QMatrix::pack(&stack, &Device::Cpu).expect("packs");
    assert_eq!(w.n(), 86);
    let x = random_floats(300 * k, 5);
    let all = product(&w, &x);
    check_product(&w, &x[..k * 20], &all[..86 * 20], "stacked parts");
    for (first, rows) in [(0, 1), (7, 1), (299, 1), (3, 6), (100, 129)] {
        let some = product(&w, &x[first * k..(first + rows) * k]);
        assert_eq!(bits(&some), bits(&all[first * 86..(first + rows) * 86]), "rows {first}..{}", first + rows);
    }
}

/// Checks `dy · W` against f64 over the exact weights, and rows against the same rows alone.
fn check_transposed(w: &QMatrix, m: usize, what: &str) {
    let (n, k) = (w.n(), w.k());
    let product = |dy: &[f32]| -> Vec<f32> {
        let dy = Tensor::from_slice(dy, (dy.len() / n, n), &Device::Cpu).expect("a tensor");
        matmul_transposed(w, &dy, DType::F32).and_then(|y| Ok(y.flatten_all()?.to_vec1()?)).expect("a product")
    };
    let rows: Vec<Vec<f32>> = (0..n).map(|r| exact(w, r)).collect();
    let dy = random_floats(m * n, 3 + m as u64);
    let dx = product(&dy);
    for (i, (dy, dx)) in dy.chunks_exact(n).zip(dx.chunks_exact(k)).enumerate() {
        for (column, &got) in dx.iter().enumerate() {
            let terms = rows.iter().zip(dy).map(|(row, dy)| f64::from(row[column]) * f64::from(*dy));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            assert!((f64::from(got) - sum).abs() <= size * 1e-6 + 1e-30, "{what}: {got} for {sum} of size {size}");
        }
        if i % 7 == 0 {
            assert_eq!(bits(&product(dy)), bits(dx), "{what}: row {i} alone");
        }
    }
}

#[test]
fn transposed_products_match_float64_and_rows_stand_alone() {
    for codec in BLOCK_CODECS {
        for (n, k, m) in [(1, 256, 1), (17, 256, 9), (100, 768, 3), (130, 256, 70)] {
            let w = QMatrix::pack(&[source(codec, n, k, n as u64)], &Device::Cpu).expect("packs");
            check_transposed(&w, m, &format!("{codec:?} [{n}, {k}] x {m}"));
        }
    }
    for codec in [Codec::F32, Codec::F16, Codec::BF16, Codec::Q4_1] {
        for (n, k, m) in [(16, 32, 5), (97, 96, 131), (33, 160, 2)] {
            let w = QMatrix::pack(&[source(codec, n, k, n as u64)], &Device::Cpu).expect("packs");
            check_transposed(&w, m, &format!("{codec:?} [{n}, {k}] x {m}"));
        }
    }
    let odd = QMatrix::dense(21, 65, random_floats(21 * 65, 1)).expect("packs");
    check_transposed(&odd, 6, "65 columns");
    for (n, k, block) in [(17, 128, 64), (30, 96, 64), (3, 33, 16), (100, 320, 32)] {
        let w = QMatrix::pack(&[codebook(n, k, block)], &Device::Cpu).expect("packs");
        check_transposed(&w, 9, &format!("codebook [{n}, {k}] in blocks of {block}"));
    }
    let nf4 = nf4::Nf4::quantize(&random_floats(40 * 192, 6)).into_source(40, 192);
    let stack = [source(Codec::Q4_1, 40, 192, 1), source(Codec::F16, 9, 192, 3), nf4, source(Codec::Q8_0, 120, 192, 2)];
    check_transposed(&QMatrix::pack(&stack, &Device::Cpu).expect("packs"), 20, "stacked parts");
}

#[test]
fn transposed_products_refuse_other_shapes() {
    let w = QMatrix::dense(4, 2, vec![0.0; 8]).expect("packs");
    let dy = |n| Tensor::zeros((3, n), DType::F32, &Device::Cpu).expect("a tensor");
    assert!(matmul_transposed(&w, &dy(4), DType::F32).is_ok());
    assert!(matmul_transposed(&w, &dy(2), DType::F32).is_err());
    assert!(matmul_transposed(&w, &dy(4), DType::BF16).is_err());
}

#[test]
fn every_kernel_gives_the_same_bits() {
    for k in [256, 768, 1536] {
        let mut stack: Vec<Source> = BLOCK_CODECS.into_iter().map(|c| source(c, 33, k, k as u64)).collect();
        stack.extend([Codec::F32, Codec::F16, Codec::BF16].map(|c| source(c, 19, k, 8)));
        stack.push(codebook(17, k, 64));
        let w = QMatrix::pack(&stack, &Device::Cpu).expect("packs");
        for m in (1..=8).chain([13]) {
            let x = random_floats(m * k, m as u64);
            let want = panels(&w).multiply(Isa::Portable, &x);
            for isa in Isa::available() {
                assert_eq!(bits(&panels(&w).multiply(isa, &x)), bits(&want), "{} k {k} m {m}", isa.name());
            }
        }
    }
}

#[test]
fn the_largest_sums_fit() {
    let k = 256;
    for codec in BLOCK_CODECS {
        for code in [0x00, 0xff] {
            let mut bytes = vec![code; 16 * k / codec.block() * codec.block_bytes()];
            for block in bytes.chunks_exact_mut(codec.block_bytes()) {
                for &at in half_offsets(codec) {
                    block[at..at + 2].copy_from_slice(&half::f16::ONE.to_le_bytes());
                }
            }
            let w =
                QMatrix::pack(&[Source::Blocks { codec, n: 16, k, bytes: bytes.into() }], &Device::Cpu).expect("packs");
            // All values at the end of the integers' range; then all but one with the smallest low byte.
            for q in [32639.0f32, 32384.0] {
                let mut x = [[q; 256], [-q; 256]].concat();
                (x[0], x[k]) = (32639.0, 32639.0);
                let want = panels(&w).multiply(Isa::Portable, &x);
                check_product(&w, &x, &want, &format!("{codec:?} {code} {q}"));
                for isa in Isa::available() {
                    assert_eq!(bits(&panels(&w).multiply(isa, &x)), bits(&want), "{codec:?} {code} {q} {}", isa.name());
                }
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_affect_their_row_only() {
    let k = 64;
    let stack = [source(Codec::Q4_1, 20, k, 1), source(Codec::F32, 20, k, 2)];
    let w = QMatrix::pack(&stack, &Device::Cpu).expect("packs");
    let clean = random_floats(9 * k, 5);
    let mut x = clean.clone();
    (x[3 * k + 5], x[6 * k]) = (f32::NAN, f32::INFINITY);
    let (y, want) = (product(&w, &x), product(&w, &clean));
    for row in 0..9 {
        let range = row * 40..(row + 1) * 40;
        if row == 3 || row == 6 {
            assert!(y[range].iter().all(|v| !v.is_finite()), "row {row}");
        } else {
            assert_eq!(bits(&y[range.clone()]), bits(&want[range]), "row {row}");
        }
    }
}

#[test]
fn default_model_formats_stay_near_their_file_size() {
    let size = |codec, bytes: usize| {
        let w = QMatrix::pack(&[source(codec, 1536, 576, 1)], &Device::Cpu).expect("packs");
        assert_eq!(w.bytes(), 1536 * 576 / 32 * bytes);
    };
    size(Codec::Q4_1, 20);
    size(Codec::Q5_0, 22);
    size(Codec::Q8_0, 34);
}

#[test]
fn refuses_data_that_do_not_fit_the_shape() {
    let pack = |codec, n, k, len: usize| {
        QMatrix::pack(&[Source::Blocks { codec, n, k, bytes: vec![0; len].into() }], &Device::Cpu)
    };
    for (codec, n, k, len) in
        [(Codec::Q4_1, 2, 33, 40), (Codec::Q4_1, 2, 32, 39), (Codec::Q4K, 1, 32, 18), (Codec::F16, 2, 2, 9)]
    {
        assert!(pack(codec, n, k, len).is_err(), "{codec:?} [{n}, {k}] in {len} bytes");
    }
    assert!(QMatrix::pack(&[], &Device::Cpu).is_err());
    assert!(QMatrix::pack(&[source(Codec::F32, 2, 32, 1), source(Codec::F32, 2, 64, 1)], &Device::Cpu).is_err());
    let w = QMatrix::dense(4, 2, vec![0.0; 8]).expect("packs");
    assert!(gather_rows(&w, &[1, 4], None).is_err());
}
