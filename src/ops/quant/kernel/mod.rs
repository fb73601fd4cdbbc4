//! Products of one panel of 16 rows with one tile of activations, for each instruction set.
//!
//! Every kernel does the same float operations in the same order, so all give the same bits, for any number of activation rows:
//!
//! - integer: `acc = fma(min, Σ q, fma(scale, Σ code · q, acc))`, group by group along `k`. The integer sums are exact. Q6_K adds the
//!   scaled sums of both halves of a group, then the mins.
//! - float: `acc = fma(w, x, acc)`, input by input.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::Codec;
use super::activations::{ActivationTile, ROWS};
use super::affine::{PANEL, PanelLayout};
use super::float::FloatPanel;

/// `[activation row][panel row]`. A kernel writes the first [`ActivationTile::rows`] rows.
pub type Products = [[f32; PANEL]; ROWS];

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON with the dot products of ARMv8.2. Float matrices take the portable kernel, which the compiler vectorises.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Plain loops over 16 lanes, which the compiler vectorises for the target's baseline.
    Portable,
}

impl Isa {
    /// The instruction sets of this machine, the fastest first.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let has = |features: &[bool]| features.iter().all(|&f| f);
            if has(&[
                is_x86_feature_detected!("avx512f"),
                is_x86_feature_detected!("avx512bw"),
                is_x86_feature_detected!("avx512vl"),
                is_x86_feature_detected!("avx512vnni"),
            ]) {
                all.push(Isa::Avx512Vnni);
            }
            let avx2 =
                [is_x86_feature_detected!("avx2"), is_x86_feature_detected!("fma"), is_x86_feature_detected!("f16c")];
            if has(&avx2) {
                all.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            all.push(Isa::Neon);
        }
        all.push(Isa::Portable);
        all
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Isa {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Isa::available()[0])
    }

    /// Its name for display.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "NEON",
            Isa::Portable => "portable",
        }
    }
}

/// A block format as a type, so that the kernels are compiled for each.
trait BlockFormat {
    const LAYOUT: PanelLayout;
}

macro_rules! formats {
    ($($codec:ident)*) => {
        /// A type for each block format.
        mod format {
            $(pub struct $codec;
            impl super::BlockFormat for $codec {
                const LAYOUT: super::PanelLayout = super::PanelLayout::of(super::Codec::$codec).expect("a block codec");
            })*
        }

        /// The products of a panel of integer codes, without the activations' scales. The machine must have `isa`.
        pub fn affine(isa: Isa, codec: Codec, codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
            match codec {
                $(Codec::$codec => affine_as::<format::$codec>(isa, codes, scales, x, out),)*
                Codec::F32 | Codec::F16 | Codec::BF16 => unreachable!("dense formats have no codes"),
            }
        }
    };
}
formats!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4K Q5K Q6K);

fn affine_as<F: BlockFormat>(isa: Isa, codes: &[u8], scales: &[u8], x: &ActivationTile, out: &mut Products) {
    let groups = codes.len() / F::LAYOUT.group_bytes();
    let record = F::LAYOUT.record();
    assert!(
        groups.is_multiple_of(record.groups) && scales.len() == groups / record.groups * record.bytes,
        "scales do not fit the codes"
    );
    assert!((1..=ROWS).contains(&x.rows) && x.planes.len() == groups * x.rows * 64, "activations do not fit the codes");
    assert!(x.sums.len() == groups * x.rows && x.half_sums.len() == 2 * x.sums.len());
    match isa {
        // SAFETY: the machine has the instructions of `isa`; sizes were checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { avx512::affine::<F>(codes, scales, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::affine::<F>(codes, scales, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::affine::<F>(codes, scales, x, out) },
        Isa::Portable => portable::affine::<F>(codes, scales, x, out),
    }
}

/// The products of a panel of floats. The machine must have `isa`.
pub fn float(isa: Isa, panel: FloatPanel, x: &ActivationTile, out: &mut Products) {
    assert!((1..=ROWS).contains(&x.rows) && x.values.len() == panel.steps() * 8 * x.rows, "the tile has another k");
    match isa {
        // SAFETY: the machine has the instructions of `isa`; sizes were checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { avx512::float(panel, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::float(panel, x, out) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => portable::float(panel, x, out),
        Isa::Portable => portable::float(panel, x, out),
    }
}
