//! Whether this machine computes what it should: every case of the registry, forward and backward, in f32 and bf16, on the
//! device, against f64 on the CPU.

use crate::error::Result;
use crate::ops::registry::verify::{Subject, Values};
use crate::ops::registry::{Case, all};
use crate::report::{Reporter, Table};
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::io::Write;

/// What the cases of one op show in one type.
#[derive(Default)]
struct Line {
    cases: usize,
    /// The largest share of its bound that an error takes, with that error and bound.
    worst: (f64, f64, f64),
    wrong: usize,
}

/// Runs every case twice on `device` and prints a table; true if all values are within their bounds and both runs gave the same
/// bits. What is wrong is reported case by case.
pub fn ops(device: &Device, reporter: &Reporter, out: &mut dyn Write) -> Result<bool> {
    let mut lines: BTreeMap<(&'static str, &str), Line> = BTreeMap::new();
    for case in all() {
        for (dtype, name) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
            let line = lines.entry((case.op, name)).or_default();
            line.cases += 1;
            if let Err(e) = one(&case, dtype, device, line) {
                line.wrong += 1;
                reporter.error(&e.context(format!("{} {} {name}", case.op, case.label)));
            }
        }
    }
    let mut table = Table::new("ops", ["op", "type", "cases", "worst error", "its bound", ""]);
    for ((op, dtype), l) in &lines {
        let (_, off, bound) = l.worst;
        let verdict = if l.wrong == 0 { "ok".to_string() } else { format!("{} wrong", l.wrong) };
        let cells = [op.to_string(), dtype.to_string(), l.cases.to_string()];
        table.row(cells.into_iter().chain([format!("{off:.1e}"), format!("{bound:.1e}"), verdict]));
    }
    write!(out, "{}", table.render())?;
    Ok(lines.values().all(|l| l.wrong == 0))
}

fn one(case: &Case, dtype: DType, device: &Device, line: &mut Line) -> Result<()> {
    let subject = Subject::new(case, dtype)?;
    let (x, dy) = subject.on(device)?;
    let found = Values::of(case, &x, &dy)?;
    for v in subject.judge(&found)? {
        let share = v.off / v.bound;
        if share > line.worst.0 || line.worst.2 == 0.0 {
            line.worst = (share, v.off, v.bound);
        }
        if !v.holds() {
            crate::bail!("the {} is off by {:.2e}, {:.2e} would do", v.what, v.off, v.bound;
                "the binary, the driver or the GPU is broken: try another driver, and compute-sanitizer on this command")
        }
    }
    if let Some(what) = found.differs(&Values::of(case, &x, &dy)?)? {
        crate::bail!("the {what} has other bits in a second run"; "two kernels race: report it with the GPU's name and driver")
    }
    Ok(())
}
