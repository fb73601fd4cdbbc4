//! GPUs: opens a device, and keeps the state that the CUDA halves of the ops share in one `Context` for each device.
//!
//! A build without the feature `cuda` has only [`open`], which then refuses every GPU.

#[cfg(feature = "cuda")]
pub(crate) mod arena;
#[cfg(feature = "cuda")]
pub(crate) mod blas;
// Without CUDA, most have no use.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) mod constants;
#[cfg(feature = "cuda")]
mod context;
#[cfg(feature = "cuda")]
pub(crate) mod graph;
#[cfg(feature = "cuda")]
pub(crate) mod kernels;
#[cfg(feature = "cuda")]
pub(crate) mod pinned;
#[cfg(feature = "cuda")]
mod uploads;

use std::fmt;
use std::str::FromStr;

use candle_core::Device;

#[cfg(not(feature = "cuda"))]
use crate::Error;
use crate::Result;

#[cfg(feature = "cuda")]
pub(crate) use context::{Context, address, driver_error, input, tensor_address};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU, where this build and this machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
                _ => Err(format!("{text:?} is not a device: use auto, cpu, cuda or cuda:N")),
            },
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Properties of a device that are fixed when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Gives a sequence the same bits however its rows are put into steps. All rows then take one path on a GPU, whatever
    /// the size of their step: products use the packed weights, attention uses the prefill kernel, and steps run launch by
    /// launch. The CPU always has one path and ignores this.
    pub deterministic: bool,
}

/// Opens a device. On a GPU each call makes a device with a stream and a `Context` of its own; their tensors do not mix.
/// Errors: a GPU was asked for, and this build has no CUDA or the machine has no such GPU.
pub fn open(choice: DeviceChoice, options: OpenOptions) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(open_cuda(0, options).unwrap_or(Device::Cpu)),
        DeviceChoice::Cuda(ordinal) => open_cuda(ordinal, options),
    }
}

/// Free bytes of a GPU; `None` for the CPU.
pub fn free_memory(device: &Device) -> Result<Option<usize>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Some(Context::of(device)?.memory()?.free)),
        _ => Ok(None),
    }
}

/// Name and memory of the first GPU, or why there is none, for `doctor`.
pub fn describe() -> String {
    #[cfg(feature = "cuda")]
    {
        let device = open(DeviceChoice::Cuda(0), OpenOptions::default());
        let described = device.and_then(|device| Context::of(device.as_cuda_device()?)?.describe());
        described.unwrap_or_else(|e| e.message)
    }
    #[cfg(not(feature = "cuda"))]
    "not used by this build (--features cuda)".into()
}

/// Marks the start of a decoder block: while a graph is captured, buffers of the block before the previous one may be
/// reused. Does nothing on the CPU. Errors: the GPU was not opened by [`open`].
#[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
pub fn next_block(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        Context::of(device)?.next_block();
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize, options: OpenOptions) -> Result<Device> {
    Context::open(ordinal, options).map(Device::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize, _: OpenOptions) -> Result<Device> {
    Err(Error::invalid("this build has no CUDA: build it with --features cuda, or use --device cpu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, want) in [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda(0))]
        {
            assert_eq!(text.parse(), Ok(want));
        }
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!(DeviceChoice::Cuda(3).to_string(), "cuda:3");
        for wrong in ["gpu", "cuda:", "cuda:-1", "cuda:x", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    /// No machine has 65 GPUs: with or without CUDA, the error says what to do.
    #[test]
    fn a_gpu_that_is_not_there_is_a_clear_error_and_auto_takes_the_cpu() {
        let error = open(DeviceChoice::Cuda(64), OpenOptions::default()).expect_err("no such GPU");
        assert!(error.message.contains("--device cpu"), "{error}");
        assert!(open(DeviceChoice::Cpu, OpenOptions::default()).expect("a CPU").is_cpu());
        if !cfg!(feature = "cuda") {
            assert!(open(DeviceChoice::Auto, OpenOptions::default()).expect("a CPU").is_cpu());
        }
    }
}
