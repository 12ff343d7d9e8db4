//! How fast this machine is at what training consists of: [`kernels`], each beside its floor, [`step`], whole steps at a
//! real model's shape, and [`mod@freeze`], what freezing saves of them. How well each way to connect two backbones learns: [`zoo`].
//!
//! A floor is what the work needs at least: the bytes that must move at the bandwidth of a copy, or the FLOPs at the rate of a
//! large matrix product, whichever takes longer. Both are measured in the same process before anything else ([`machine`]).

pub mod flops;
pub mod freeze;
pub mod kernels;
pub mod machine;
pub mod noise;
pub mod parts;
pub mod preset;
mod samples;
pub mod step;
pub mod timer;
pub mod zoo;

use crate::error::Result;
use crate::model::init::Place;
use crate::ops::random::Key;
use crate::optim::{AdamW, Groups, Schedule};
use crate::spec::{self, Scheduler, Warmup};
use candle_core::DType;
use machine::Machine;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use timer::Clock;

/// Where figures go as they come: a JSON object a line, or lines for people.
pub struct Output<'a> {
    /// Every line is flushed, so that what was measured before an interruption is there.
    pub to: &'a mut dyn Write,
    /// JSON, for programs.
    pub json: bool,
}

impl Output<'_> {
    /// Writes a record: as it is, or as lines for people.
    pub fn record(&mut self, record: &impl Serialize, lines: impl FnOnce() -> String) -> Result<()> {
        let text = if self.json { serde_json::to_string(record)? } else { lines() };
        writeln!(self.to, "{text}")?;
        Ok(self.to.flush()?)
    }
}

/// What all measurements of a process share.
pub struct Bench<'a> {
    place: Place,
    clock: Clock,
    machine: Machine,
    out: Output<'a>,
}

impl<'a> Bench<'a> {
    /// Measures the machine and tells of it.
    pub fn new(place: Place, mut out: Output<'a>) -> Result<Self> {
        let clock = Clock::new(&place.device);
        let machine = Machine::measure(&place, &clock)?;
        out.record(&machine, || machine.lines())?;
        Ok(Self { place, clock, machine, out })
    }
}

/// What is measured of the machine, as [`Output`] tells it.
pub fn tell_machine(place: &Place, json: bool) -> Result<String> {
    let machine = Machine::measure(place, &Clock::new(&place.device))?;
    Ok(if json { serde_json::to_string(&machine)? } else { machine.lines() })
}

/// AdamW with clipping, at a learning rate that does not change, for parameters of these shapes.
fn constant_optimizer(shapes: &BTreeMap<String, Vec<usize>>, lr: f64, hyper: spec::AdamW) -> Result<AdamW> {
    let groups = Groups::resolve(&[], lr, 0.0, shapes)?;
    let schedule = Schedule::new(&Scheduler::Constant(Warmup { warmup_ratio: None, warmup_steps: Some(0) }), 1);
    Ok(AdamW::new(hyper, groups, schedule, 1.0, Key::new(1, "rounding")))
}

/// A type as a recipe writes it.
fn type_name(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// A number of a unit in thousands: `1.23 G`.
fn scaled(value: f64) -> String {
    let units = ["", "k", "M", "G", "T", "P"];
    let mut at = 0;
    let mut v = value;
    while v.abs() >= 999.5 && at + 1 < units.len() {
        (v, at) = (v / 1000.0, at + 1);
    }
    let decimals = if v.abs() >= 99.95 { 0 } else { 2 - usize::from(v.abs() >= 9.995) };
    format!("{v:.decimals$} {}", units[at]).trim_end().to_string()
}

/// A time: `1.23 ms`.
fn time(seconds: f64) -> String {
    let (value, unit) = if seconds < 1e-3 {
        (seconds * 1e6, "µs")
    } else if seconds < 1.0 {
        (seconds * 1e3, "ms")
    } else {
        (seconds, "s")
    };
    let decimals = if value >= 99.95 { 0 } else { 2 - usize::from(value >= 9.995) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::{scaled, time};

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0.0, 7.0, 999.0, 12_345.0, 4.3e12, 9.9e14].map(scaled),
            ["0.00", "7.00", "999", "12.3 k", "4.30 T", "990 T"]
        );
        assert_eq!([2.5e-6, 1.234e-3, 0.25, 61.3].map(time), ["2.50 µs", "1.23 ms", "250 ms", "61.3 s"]);
    }
}
