//! Whether this machine computes what it should, in f32 and bf16, on the device: every case of the registry, forward and
//! backward, against f64 on the CPU, and a tiny training of three stages against its f64 curve.

pub mod curve;
pub mod training;

use crate::error::{Error, Result};
use crate::model::init::Place;
use crate::ops::registry::verify::{Subject, Values};
use crate::ops::registry::{Case, all};
use crate::optim::verify::{FORMS, Form, ROOM, train};
use crate::report::{Reporter, Table};
use crate::spec::MomentType;
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::io::Write;
use training::{Reference, Training};

/// The types that are tested.
const TYPES: [(DType, &str); 2] = [(DType::F32, "f32"), (DType::BF16, "bf16")];

/// What to do about a wrong value.
const BROKEN: &str =
    "the binary, the driver or the GPU is broken: try another driver, and compute-sanitizer on this command";
/// What to do about other bits.
const RACE: &str = "two kernels race: report it with the GPU's name and driver";

/// What the cases of one op show in one type.
#[derive(Default)]
struct Line {
    cases: usize,
    /// The largest share of its bound that an error takes, with that error and bound.
    worst: (f64, f64, f64),
    wrong: usize,
}

/// Runs every case, and the optimizer in every form, twice on `device` and prints a table; true if all values are within their
/// bounds and both runs gave the same bits. What is wrong is reported case by case.
pub fn ops(device: &Device, reporter: &Reporter, out: &mut dyn Write) -> Result<bool> {
    let mut lines: BTreeMap<(&'static str, &str), Line> = BTreeMap::new();
    for case in all() {
        for (dtype, name) in TYPES {
            let line = lines.entry((case.op, name)).or_default();
            line.cases += 1;
            if let Err(e) = one(&case, dtype, device, line) {
                line.wrong += 1;
                reporter.error(&e.context(format!("{} {} {name}", case.op, case.label)));
            }
        }
    }
    for form in FORMS {
        let line = lines.entry(("adamw", if form.half { "bf16" } else { "f32" })).or_default();
        line.cases += 1;
        if let Err(e) = optimizer(form, device, line) {
            line.wrong += 1;
            reporter.error(&e.context(format!("adamw {form:?}")));
        }
    }
    let mut table = Table::new("ops", ["op", "type", "cases", "worst error", "its bound", ""]);
    for ((op, dtype), l) in &lines {
        let (_, off, bound) = l.worst;
        let verdict = if l.wrong == 0 { "ok".to_string() } else { format!("{} wrong", l.wrong) };
        let cells = [op.to_string(), dtype.to_string(), l.cases.to_string()];
        table.row(cells.into_iter().chain([format!("{off:.1e}"), format!("{bound:.1e}"), verdict]));
    }
    write!(out, "{}", table.for_stdout())?;
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
            let told = format!("the {} is off by {:.2e}, {:.2e} would do", v.what, v.off, v.bound);
            return Err(Error::new(told).hint(BROKEN));
        }
    }
    if let Some(what) = found.differs(&Values::of(case, &x, &dy)?)? {
        return Err(Error::new(format!("the {what} has other bits in a second run")).hint(RACE));
    }
    Ok(())
}

/// Elements of the optimizer's largest parameter: more than one block of threads takes, and no whole number of anything.
const ELEMENTS: usize = 70_004;

/// A few steps of the optimizer, beside the CPU's: the same bits on f32 moments; the error is the share of elements that are
/// others.
fn optimizer(form: Form, device: &Device, line: &mut Line) -> Result<()> {
    let want = train(form, ELEMENTS, &Device::Cpu)?;
    let found = train(form, ELEMENTS, device)?;
    let exact = form.moments == MomentType::F32;
    let (off, bound) = (found.share_off(&want)?, if exact { 0.0 } else { ROOM });
    if off >= line.worst.1 {
        line.worst = (off, off, bound);
    }
    let wrong = if exact { found.differs(&want)? } else { found.norms_differ(&want) };
    if let Some(what) = wrong {
        return Err(Error::new(format!("the {what} has other bits than on the CPU")).hint(BROKEN));
    }
    if off > bound {
        return Err(Error::new(format!("{:.1} % of the elements are others than on the CPU", 100.0 * off)).hint(BROKEN));
    }
    match train(form, ELEMENTS, device)?.differs(&found)? {
        Some(what) => Err(Error::new(format!("the {what} has other bits in a second run")).hint(RACE)),
        None => Ok(()),
    }
}

/// Trains three tiny stages on `device` and prints a table; true if every step is as near to the f64 curve as it should be, and
/// each stage ends in the same bits when it goes on from a checkpoint. What is wrong is reported by stage and step.
pub fn training(device: &Device, reporter: &Reporter, out: &mut dyn Write) -> Result<bool> {
    let reference = Reference::embedded()?;
    let heads = ["stage", "type", "steps", "first loss", "last loss", "worst deviation", "its bound", ""];
    let mut table = Table::new("training", heads);
    let mut good = true;
    for (dtype, name) in TYPES {
        let place = Place { device: device.clone(), dtype };
        if let Err(e) = stages(&reference, place, name, &mut table) {
            good = false;
            reporter.error(&e.context(format!("training in {name}")));
        }
    }
    write!(out, "{}", table.for_stdout())?;
    Ok(good)
}

/// All stages in one type, a row each; the error is the first thing that is wrong.
fn stages(reference: &Reference, place: Place, dtype: &str, table: &mut Table) -> Result<()> {
    let training = Training::run(place)?;
    let curves = training.curves()?;
    let mut first_wrong = None;
    for stage in training.stages() {
        let (off, bound, wrong) = reference.judge(dtype, stage, &curves)?;
        let loss = curves.get(stage).map_or(&[][..], |c| &c.loss);
        let shown = |l: Option<&f64>| l.map_or("-".to_string(), |l| format!("{l:.4}"));
        let cells = [stage.clone(), dtype.to_string(), loss.len().to_string(), shown(loss.first()), shown(loss.last())];
        let verdict = if wrong.is_none() { "ok" } else { "wrong" };
        table.row(cells.into_iter().chain([format!("{off:.1e}"), format!("{bound:.1e}"), verdict.to_string()]));
        first_wrong = first_wrong.or(wrong.map(|w| format!("{stage}: {w}")));
    }
    if let Some(wrong) = first_wrong {
        return Err(Error::new(wrong).hint(BROKEN));
    }
    match training.again()? {
        Some(what) => Err(Error::new(format!("{what}: other bits after going on from a checkpoint")).hint(RACE)),
        None => Ok(()),
    }
}
