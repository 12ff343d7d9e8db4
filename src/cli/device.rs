//! `--device` and `--dtype`: where and in which type to compute.

use crate::bail;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::ops::cuda;
use crate::spec;
use candle_core::Device;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to compute: auto, cpu, cuda or cuda:N; auto is the first GPU if this build and machine have one.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of frozen weights and activations, whatever the recipe says; auto: bf16 on a GPU, f32 on the CPU.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
}

/// A type as an argument says it.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum DTypeArg {
    /// bf16 on a GPU, f32 on the CPU.
    Auto,
    F32,
    Bf16,
}

impl From<DTypeArg> for spec::DType {
    fn from(d: DTypeArg) -> Self {
        match d {
            DTypeArg::Auto => Self::Auto,
            DTypeArg::F32 => Self::F32,
            DTypeArg::Bf16 => Self::Bf16,
        }
    }
}

impl Args {
    /// What the argument says of the type, if it is given.
    pub fn dtype(&self) -> Option<spec::DType> {
        self.dtype.map(Into::into)
    }

    /// The device.
    pub fn open(&self) -> Result<Device> {
        open(&self.device)
    }
}

/// The device that an argument names.
pub fn open(device: &str) -> Result<Device> {
    match device {
        "auto" => automatic(),
        "cpu" => Ok(Device::Cpu),
        "cuda" => gpu(0),
        other => match other.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
            Some(n) => gpu(n),
            None => bail!("--device {other}: there is no such device"; "use auto, cpu, cuda or cuda:N"),
        },
    }
}

/// The first GPU if there is one, else the CPU; a GPU that cannot be used is worth a warning.
#[cfg(feature = "cuda")]
fn automatic() -> Result<Device> {
    if !cuda::driver_present() {
        return Ok(Device::Cpu);
    }
    match gpu(0) {
        Ok(device) => Ok(device),
        Err(e) => {
            tracing::warn!("computing on the CPU, for the GPU cannot be used: {e}");
            Ok(Device::Cpu)
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn automatic() -> Result<Device> {
    Ok(Device::Cpu)
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize) -> Result<Device> {
    cuda::open(ordinal)
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: usize) -> Result<Device> {
    bail!("--device cuda:{ordinal}: this build computes on the CPU only";
        "build it with a CUDA toolkit: cargo build --release --features cuda")
}
