//! Numbers that would end in an allocation that aborts, a loop without end or a product that overflows: refused in one place, whatever
//! key they stand at.

use super::merge::{Step, show_path};
use crate::bail;
use crate::error::Result;
use toml::{Table, Value};

/// The largest number that a key takes, and why; the first entry whose keys the path ends with (list positions aside).
const LIMITS: [(&str, i64, &str); 9] = [
    // Any number is a seed.
    ("seed", i64::MAX, ""),
    ("micro", 1 << 16, "samples in memory at once, e.g. 8"),
    ("global", 1 << 20, "samples an optimizer step, e.g. 128"),
    ("max_steps", 1_000_000_000, "leave it out to run `epochs`; a stage can be stopped at any time"),
    ("image_size", 1 << 13, "pixels along an edge, e.g. 336"),
    ("grid_pinpoints", 1 << 14, "heights and widths in pixels, e.g. [[336, 672], [672, 336]]"),
    ("depth", 100, "how many layers, e.g. 2"),
    ("layers", 100, "how many layers, e.g. 12"),
    // Not that of a language model's rotary positions.
    ("pixel_shuffle.factor", 64, "2 makes a quarter of the tokens"),
];

/// Of every other key.
const ANY: (i64, &str) = (i32::MAX as i64, "is there a digit too many?");

/// Checks every whole number of a resolved recipe.
pub fn check(recipe: &Table) -> Result<()> {
    recipe.iter().try_for_each(|(key, value)| walk(value, &mut vec![Step::Key(key.clone())]))
}

fn walk(value: &Value, path: &mut Vec<Step>) -> Result<()> {
    let mut inside = |step: Step, value: &Value| {
        path.push(step);
        let checked = walk(value, path);
        path.pop();
        checked
    };
    match value {
        Value::Array(list) => list.iter().enumerate().try_for_each(|(i, v)| inside(Step::Index(i), v)),
        Value::Table(t) => t.iter().try_for_each(|(k, v)| inside(Step::Key(k.clone()), v)),
        Value::Integer(n) => within(*n, path),
        _ => Ok(()),
    }
}

fn within(n: i64, path: &[Step]) -> Result<()> {
    let keys: Vec<&str> = path
        .iter()
        .filter_map(|step| match step {
            Step::Key(key) => Some(key.as_str()),
            Step::Index(_) => None,
        })
        .collect();
    let ends = |name: &str| keys.ends_with(&name.split('.').collect::<Vec<_>>());
    let own = LIMITS.iter().find(|(name, ..)| ends(name)).map(|(_, most, why)| (*most, *why));
    let (most, why) = own.unwrap_or(ANY);
    if n > most {
        // The order of a step is a list of positions, 8 bytes each.
        let bytes = match keys.last() {
            Some(&"global") => format!(": the list of a step's samples alone takes {:.1} GB", n as f64 * 8e-9),
            _ => String::new(),
        };
        bail!("{} = {n}{bytes}", show_path(path); "at most {most}: {why}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<()> {
        super::check(&toml::from_str(text).unwrap())
    }

    #[test]
    fn a_number_that_makes_no_sense_is_named_with_its_key() {
        let refused = |text: &str| check(text).unwrap_err().report();
        assert!(refused("[stage.a]\nbatch = { global = 4611686018427387904 }").starts_with(
            "stage.a.batch.global = 4611686018427387904: the list of a step's samples alone takes 36893488147.4 GB"
        ));
        let rank = refused("[stage.a]\nadapters = [{ lora = { rank = 2147483648 } }]");
        assert_eq!(
            rank,
            "stage.a.adapters[0].lora.rank = 2147483648\n\nhint: at most 2147483647: is there a digit too many?"
        );
        for text in [
            "[stage.a]\nmax_steps = 4611686018427387904",
            "[eval.a]\nmicro = 65537",
            "[model.projector.mlp]\ndepth = 101",
            "[model.projector.pixel_shuffle]\nfactor = 65",
        ] {
            assert!(refused(text).contains("hint: at most"), "{text}");
        }
        assert!(
            refused("[[stage.a.data]]\ngrid_pinpoints = [[336, 672], [336, 20000]]")
                .contains("data[0].grid_pinpoints[1][1] = 20000")
        );
    }

    #[test]
    fn numbers_that_recipes_have_pass() {
        check("[stage.a]\nseed = 9223372036854775807\nmax_steps = 1000000\nbatch = { global = 65536, micro = 64 }\nlr = 1e300").unwrap();
        check("[model]\nmax_seq_len = 1048576").unwrap();
        check("[model.language.init.rope_scaling]\nrope_type = 'linear'\nfactor = 128").unwrap();
    }
}
