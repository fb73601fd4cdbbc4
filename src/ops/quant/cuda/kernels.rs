//! The kernels over packed matrices: one of each kind for each format.

use candle_core::DType;

use super::TileFormat;
use crate::gpu::kernels::{ByDtype, KernelHandle, KernelSet, Kernels};
use crate::{Error, Result};

/// Kernels by format; products also by their variant and the type of their output.
pub struct QuantKernels {
    formats: [FormatKernels; TileFormat::ALL.len()],
    pub group_sums: KernelHandle,
    pub arrange_4: KernelHandle,
    pub arrange_8: KernelHandle,
}

struct FormatKernels {
    dequantise: KernelHandle,
    gather: KernelHandle,
    small: [ByDtype; SmallProduct::ALL.len()],
    wide: [ByDtype; WideProduct::ALL.len()],
}

/// Variants of `quant_small.cu`.
#[derive(Clone, Copy)]
pub enum SmallProduct {
    /// Up to 8 rows, which are read from shared memory.
    Near,
    /// Up to 8 rows.
    Rows8,
    /// Up to 16 rows.
    Rows16,
}

/// Variants of `quant_wide.cu`, by the rows that a thread block takes, and for narrow matrices with two teams of warps, each of
/// which has slices of k of its own.
#[derive(Clone, Copy)]
pub enum WideProduct {
    Rows16,
    Rows32,
    Rows32Narrow,
    Rows64,
    Rows64Narrow,
}

impl SmallProduct {
    const ALL: [Self; 3] = [Self::Near, Self::Rows8, Self::Rows16];

    fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Rows8 => "8",
            Self::Rows16 => "16",
        }
    }
}

impl WideProduct {
    const ALL: [Self; 5] = [Self::Rows16, Self::Rows32, Self::Rows32Narrow, Self::Rows64, Self::Rows64Narrow];

    /// The variant for a product of `m` rows. Narrow matrices have none of 16: there `quant_small.cu` takes as many.
    pub fn for_rows(m: usize, narrow: bool) -> Self {
        match (m, narrow) {
            (..=16, false) => Self::Rows16,
            (..=32, false) => Self::Rows32,
            (..=32, true) => Self::Rows32Narrow,
            (_, false) => Self::Rows64,
            (_, true) => Self::Rows64Narrow,
        }
    }

    /// Rows of activations that a thread block takes.
    pub fn tokens(self) -> usize {
        match self {
            Self::Rows16 => 16,
            Self::Rows32 | Self::Rows32Narrow => 32,
            Self::Rows64 | Self::Rows64Narrow => 64,
        }
    }

    /// Teams of warps of a thread block.
    pub fn teams(self) -> usize {
        if matches!(self, Self::Rows32Narrow | Self::Rows64Narrow) { 2 } else { 1 }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rows16 => "16w",
            Self::Rows32 => "32w",
            Self::Rows32Narrow => "32n",
            Self::Rows64 => "64w",
            Self::Rows64Narrow => "64n",
        }
    }
}

impl QuantKernels {
    /// Writes all values of a matrix as bf16.
    pub fn dequantise(&self, format: TileFormat) -> &KernelHandle {
        &self.formats[format as usize].dequantise
    }

    /// Writes some rows of a matrix as f32.
    pub fn gather(&self, format: TileFormat) -> &KernelHandle {
        &self.formats[format as usize].gather
    }

    /// A product of few rows.
    pub fn small(&self, format: TileFormat, variant: SmallProduct, output: DType) -> &KernelHandle {
        self.formats[format as usize].small[variant as usize].get(output)
    }

    /// A product of more rows, on Hopper.
    pub fn wide(&self, format: TileFormat, variant: WideProduct, output: DType) -> &KernelHandle {
        self.formats[format as usize].wide[variant as usize].get(output)
    }
}

impl KernelSet for QuantKernels {
    fn resolve(kernels: &Kernels) -> Result<Self> {
        let format = |format: TileFormat| -> Result<FormatKernels> {
            let name = format.name();
            let product = |variant: &str| -> Result<ByDtype> {
                let get = |output: &str| kernels.get(&format!("gemm_{name}_{variant}_{output}"));
                Ok(ByDtype { bf16: get("bf16")?, f32: get("f32")? })
            };
            Ok(FormatKernels {
                dequantise: kernels.get(&format!("dequantise_{name}"))?,
                gather: kernels.get(&format!("gather_{name}"))?,
                small: try_map(SmallProduct::ALL, |variant| product(variant.name()))?,
                wide: try_map(WideProduct::ALL, |variant| product(variant.name()))?,
            })
        };
        Ok(Self {
            formats: try_map(TileFormat::ALL, format)?,
            group_sums: kernels.get("group_sums")?,
            arrange_4: kernels.get("arrange_4")?,
            arrange_8: kernels.get("arrange_8")?,
        })
    }
}

/// `each` of an array's values, or the first error.
fn try_map<T, U, const N: usize>(values: [T; N], each: impl FnMut(T) -> Result<U>) -> Result<[U; N]> {
    let mapped: Vec<U> = values.into_iter().map(each).collect::<Result<_>>()?;
    mapped.try_into().map_err(|_| Error::internal("an array of another length"))
}
