//! Time: on a GPU by events in candle's stream, on the CPU by the clock.

use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::ops::cuda::meter::Event;
use candle_core::Device;
use serde::Serialize;
use std::time::Instant;

/// Times work on one device.
pub struct Clock {
    device: Device,
}

/// A moment in a device's work.
pub enum Mark {
    /// On the CPU, which computes as it is asked.
    Host(Instant),
    /// On a GPU, which comes by later.
    #[cfg(feature = "cuda")]
    Gpu(Event),
}

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Seconds that the runs should take together.
    pub seconds: f64,
    /// Runs at least, however long they take.
    pub least: usize,
    /// Runs at most.
    pub most: usize,
}

/// What runs of the same work took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    /// Seconds of the run in the middle.
    #[serde(rename = "median_s")]
    pub median: f64,
    /// Seconds of the fastest run.
    #[serde(rename = "min_s")]
    pub min: f64,
    /// Timed runs.
    pub runs: usize,
}

impl Clock {
    /// A clock for what `device` computes.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }

    /// The moment behind all that was asked for so far.
    pub fn mark(&self) -> Result<Mark> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return Ok(Mark::Gpu(Event::record(device)?));
        }
        Ok(Mark::Host(Instant::now()))
    }

    /// Waits until the device has done all that was asked for.
    pub fn wait(&self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    /// Runs `work` again and again, without a wait in between, and tells what a run takes. Two runs before the first timed
    /// one bring in kernels and memory.
    pub fn measure(&self, effort: Effort, work: &mut dyn FnMut() -> Result<()>) -> Result<Times> {
        work()?;
        self.wait()?;
        let begin = self.mark()?;
        work()?;
        let once = seconds(&begin, &self.mark()?)?;
        let runs = ((effort.seconds / once.max(1e-9)) as usize).clamp(effort.least, effort.most);
        let mut marks = Vec::with_capacity(runs + 1);
        marks.push(self.mark()?);
        for _ in 0..runs {
            work()?;
            marks.push(self.mark()?);
        }
        Times::between(&marks)
    }
}

impl Times {
    /// Of the runs between neighbouring marks, of which there are at least two; waits for the last one.
    pub fn between(marks: &[Mark]) -> Result<Self> {
        let mut all = Vec::with_capacity(marks.len());
        for pair in marks.windows(2) {
            all.push(seconds(&pair[0], &pair[1])?);
        }
        all.sort_by(f64::total_cmp);
        let at = |i: usize| all.get(i).copied().unwrap_or(f64::NAN);
        // Of an even number the mean of the two in the middle.
        let median = (at(all.len() / 2) + at(all.len().saturating_sub(1) / 2)) / 2.0;
        Ok(Self { median, min: at(0), runs: all.len() })
    }
}

/// Seconds from one moment to a later one; waits for both.
fn seconds(from: &Mark, to: &Mark) -> Result<f64> {
    match (from, to) {
        (Mark::Host(from), Mark::Host(to)) => Ok(to.duration_since(*from).as_secs_f64()),
        #[cfg(feature = "cuda")]
        (Mark::Gpu(from), Mark::Gpu(to)) => from.seconds_until(to),
        #[cfg(feature = "cuda")]
        _ => crate::bail!("two moments of different devices have no time between them"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_median_and_the_fastest_run_are_told() {
        let start = Instant::now();
        let at = |ms: u64| Mark::Host(start + Duration::from_millis(ms));
        let times = |ms: &[u64]| Times::between(&ms.iter().map(|ms| at(*ms)).collect::<Vec<_>>()).unwrap();
        let t = times(&[0, 7, 10, 110]);
        assert_eq!((t.median, t.min, t.runs), (0.007, 0.003, 3));
        let t = times(&[0, 7, 10]);
        assert_eq!((t.median, t.min, t.runs), (0.005, 0.003, 2));
    }

    #[test]
    fn the_effort_bounds_the_runs() {
        let clock = Clock::new(&Device::Cpu);
        let mut n = 0;
        let times = clock.measure(Effort { seconds: 1e9, least: 3, most: 5 }, &mut || {
            n += 1;
            Ok(())
        });
        assert_eq!((times.unwrap().runs, n), (5, 7));
        let times = clock.measure(Effort { seconds: 0.0, least: 3, most: 5 }, &mut || Ok(()));
        assert_eq!(times.unwrap().runs, 3);
    }
}
