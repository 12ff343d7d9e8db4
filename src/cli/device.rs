//! `--device` and `--dtype`: where and in which type to compute.

use crate::bail;
use crate::error::Result;
use crate::recipe::schema;
use candle_core::Device;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to compute: auto or cpu.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of frozen weights and activations, whatever the recipe says; auto: bf16 on a GPU, f32 on the CPU.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum DTypeArg {
    Auto,
    F32,
    Bf16,
}

impl Args {
    /// What the argument says of the type, if it is given.
    pub fn dtype(&self) -> Option<schema::DType> {
        self.dtype.map(|d| match d {
            DTypeArg::Auto => schema::DType::Auto,
            DTypeArg::F32 => schema::DType::F32,
            DTypeArg::Bf16 => schema::DType::Bf16,
        })
    }

    /// The device.
    pub fn open(&self) -> Result<Device> {
        open(&self.device)
    }
}

/// The device that an argument names. This build knows the CPU.
fn open(device: &str) -> Result<Device> {
    match device {
        "auto" | "cpu" => Ok(Device::Cpu),
        other => bail!("--device {other}: this build computes on the CPU only"; "use --device cpu"),
    }
}
