//! Panel times activations: the integer kernels, chosen at run time.
//!
//! All of them compute, for each row of the panel and each row of activations, group by group in order,
//! `acc = fma(Σ code·q, d, acc)` and for formats with minima `acc = fma(m, Σ q, acc)`, then `acc·scale`. The integer sums are
//! exact, so every kernel gives the same bits, for any number of activation rows.

pub mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use super::activations::Activations;
use super::affine::{Layout, PANEL};

/// Gives the 16 products of one activation row.
pub type Store<'a> = &'a mut dyn FnMut(usize, &[f32; PANEL]);

/// Multiplies one panel with some rows of `a`, by the best kernel that this processor has.
pub fn multiply(layout: &Layout, panel: &[u8], a: &Activations, rows: Range<usize>, store: Store) {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512_vnni() {
            return x86::multiply_avx512(layout, panel, a, rows, store);
        }
        if x86::has_avx2() {
            return x86::multiply_avx2(layout, panel, a, rows, store);
        }
    }
    portable::multiply(layout, panel, a, rows, store);
}

/// Name of the kernel that `multiply` chooses, for `doctor`.
pub fn name() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512_vnni() {
            return "AVX-512 VNNI";
        }
        if x86::has_avx2() {
            return "AVX2";
        }
    }
    // Plain Rust over 16 lanes; on aarch64 the compiler makes NEON of it, which every such processor has.
    if cfg!(target_arch = "aarch64") { "NEON" } else { "portable" }
}

#[cfg(test)]
mod tests {
    use super::super::affine::Affine;
    use super::*;

    /// Rows of bits: comparing them compares NaN too.
    fn bits(run: impl FnOnce(Store)) -> Vec<(usize, [u32; PANEL])> {
        let mut rows = Vec::new();
        run(&mut |row, sums| rows.push((row, sums.map(f32::to_bits))));
        rows.sort_unstable();
        rows
    }

    #[test]
    fn kernels_agree_bit_for_bit() {
        for codec in super::super::tests::BLOCK_CODECS {
            for (k, m) in [(256, 1), (512, 7), (768, 13), (1536, 9)] {
                let bytes = super::super::tests::random_blocks(codec, 16, k, 5);
                let panel = Affine::pack(codec, 16, k, &bytes).expect("random blocks are valid");
                let layout = Layout::of(codec).expect("a block codec");
                let a = Activations::quantise(&super::super::tests::random_floats(m * k, 3), k);
                let data = panel.data();
                let want = bits(|store| portable::multiply(&layout, data, &a, 0..m, store));
                assert_eq!(bits(|store| multiply(&layout, data, &a, 0..m, store)), want, "{codec:?} k {k} m {m}");
                #[cfg(target_arch = "x86_64")]
                if x86::has_avx2() {
                    assert_eq!(
                        bits(|store| x86::multiply_avx2(&layout, data, &a, 0..m, store)),
                        want,
                        "{codec:?} AVX2"
                    );
                }
            }
        }
    }
}
