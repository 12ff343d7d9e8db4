//! `--device`.

use crate::bail;
use crate::error::Result;

/// Where to compute. This build knows the CPU.
pub fn check(device: &str) -> Result<()> {
    match device {
        "auto" | "cpu" => Ok(()),
        other => bail!("--device {other}: this build computes on the CPU only"; "use --device cpu"),
    }
}
