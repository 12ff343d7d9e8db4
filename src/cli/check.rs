//! `adfreeze check`.

use super::device::DTypeArg;
use super::stdout::{Folded, Stdout};
use crate::error::Result;
use crate::pipeline::check::{self, Aim};
use crate::recipe;
use crate::report::Reporter;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe (TOML).
    recipe: PathBuf,
    /// Override a value, as in `train`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Tell of a training in this type of frozen weights and activations, whatever the recipe says, e.g. bf16, which a GPU's is by
    /// default; auto: f32.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    /// Tell of a training with this much free memory before the model is loaded, e.g. 80GiB, by which `activations = "auto"`
    /// chooses; default: what is free here.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    let recipe = recipe::load(&args.recipe, &args.sets)?;
    let aim = Aim { dtype: args.dtype.map(Into::into), memory: args.memory };
    check::check(&recipe, aim, reporter, &mut Folded::new(Stdout::lock()))
}

/// Bytes: a number and a unit, e.g. `80GiB`, `1.5 TB`.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 9] = [
        ("B", 1.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
        ("TiB", 1099511627776.0),
    ];
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    match (number.trim().parse::<f64>(), unit) {
        (Ok(n), Some((_, bytes))) if n > 0.0 && n.is_finite() => Ok((n * bytes) as u64),
        _ => Err("a number above 0 and a unit, e.g. 80GiB or 24GB".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_a_number_and_a_unit() {
        assert_eq!(
            ["80GiB", "1.5 TB", "7b", "24gb"].map(size),
            [80 << 30, 1_500_000_000_000, 7, 24_000_000_000].map(Ok)
        );
        for wrong in ["80", "GiB", "-1GB", "0GB", "infGB", "80 G", ""] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
