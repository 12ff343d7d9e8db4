//! Bars for what is no stage: evaluations, passes over data, loading.

use super::{Reporter, human};
use indicatif::ProgressBar;
use serde_json::json;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What takes less is not spoken of where there is no bar.
const QUIET: Duration = Duration::from_secs(10);
/// How often a [`Reporter::watch`] looks.
const POLL: Duration = Duration::from_millis(100);
/// What a [`Reporter::watch`] sees the end of within this time has no bar: it would only flicker.
const SOON: Duration = Duration::from_secs(1);

impl Reporter {
    /// A bar for something else than a stage's steps, `total` things long, until the guard is dropped; `name` says what
    /// is done, e.g. `evaluation seen`. May be shared between threads, and stand beside a stage's bar.
    pub fn progress(&self, name: impl Into<String>, total: usize) -> Progress<'_> {
        Progress::new(self, name.into(), total as u64, Unit::Count, Instant::now())
    }

    /// Does `work`, which counts bytes on the way where it cannot know of reports: `poll` tells how many are done, of how
    /// many. A bar stands from the first second on.
    pub fn watch<T>(&self, name: &str, poll: impl Fn() -> (u64, u64) + Sync, work: impl FnOnce() -> T) -> T {
        self.watched(name, Unit::Bytes, SOON, poll, work)
    }

    /// As [`Reporter::watch`], of things and not bytes.
    pub fn watch_count<T>(&self, name: &str, poll: impl Fn() -> (u64, u64) + Sync, work: impl FnOnce() -> T) -> T {
        self.watched(name, Unit::Count, SOON, poll, work)
    }

    fn watched<T>(
        &self,
        name: &str,
        unit: Unit,
        soon: Duration,
        poll: impl Fn() -> (u64, u64) + Sync,
        work: impl FnOnce() -> T,
    ) -> T {
        let started = Instant::now();
        let over = Mutex::new(false);
        let ended = Condvar::new();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let mut done = over.lock().unwrap_or_else(PoisonError::into_inner);
                let mut progress = None;
                while !*done {
                    if started.elapsed() >= soon {
                        let (at, of) = poll();
                        let new = || Progress::new(self, name.to_string(), of, unit, started);
                        progress.get_or_insert_with(new).set(at, of);
                    }
                    done = ended.wait_timeout(done, POLL).map_or_else(|e| e.into_inner().0, |(guard, _)| guard);
                }
            });
            let _end = OnDrop(|| {
                *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
                ended.notify_all();
            });
            work()
        })
    }
}

/// How a [`Progress`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Count,
    Bytes,
}

/// See [`Reporter::progress`]. Where there is no bar, it speaks after `QUIET` and then as seldom.
pub struct Progress<'a> {
    reporter: &'a Reporter,
    name: String,
    unit: Unit,
    total: AtomicU64,
    done: AtomicU64,
    /// Of these, what was done before it began.
    before: AtomicU64,
    bar: Option<ProgressBar>,
    started: Instant,
    /// When it last wrote a line, if it has.
    told: Mutex<Option<Instant>>,
}

impl<'a> Progress<'a> {
    fn new(reporter: &'a Reporter, name: String, total: u64, unit: Unit, started: Instant) -> Self {
        let bar = reporter.bar(total, &name, super::line::progress_style(unit == Unit::Bytes));
        let (total, done, before) = (AtomicU64::new(total), AtomicU64::new(0), AtomicU64::new(0));
        Self { reporter, name, unit, total, done, before, bar, started, told: Mutex::new(None) }
    }

    /// So many more are done.
    pub fn inc(&self, n: usize) {
        let done = self.done.fetch_add(n as u64, Ordering::Relaxed) + n as u64;
        self.show(done);
    }

    /// So many were done before: they took no time.
    pub fn skip(&self, n: usize) {
        self.before.fetch_add(n as u64, Ordering::Relaxed);
        self.inc(n);
    }

    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        if self.total.swap(total, Ordering::Relaxed) != total
            && let Some(bar) = &self.bar
        {
            bar.set_length(total);
        }
        self.show(done);
    }

    fn show(&self, done: u64) {
        let total = self.total.load(Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(self.left(done, total));
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.unwrap_or(self.started).elapsed() < QUIET || done >= total {
            return;
        }
        *told = Some(Instant::now());
        self.reporter.message(
            || json!({ "event": "progress", "what": self.name, "done": done, "total": total }),
            || {
                let shown = |n| if self.unit == Unit::Bytes { human::bytes(n) } else { human::thousands(n) };
                format!("{}: {} of {}  {}\n", self.name, shown(done), shown(total), self.left(done, total))
            },
        );
    }

    /// Time left at the mean speed so far.
    fn left(&self, done: u64, total: u64) -> String {
        let new = done.saturating_sub(self.before.load(Ordering::Relaxed));
        if new == 0 || total <= done {
            return String::new();
        }
        let left = self.started.elapsed().mul_f64((total - done) as f64 / new as f64);
        format!("{} left", human::duration(left))
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.reporter.remove(self.bar.as_ref());
    }
}

/// Runs at the end of its scope, a panic's too.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the bar's name and numbers are in the middle of the work.
    fn seen(reporter: &Reporter, unit: Unit, soon: Duration) -> Option<(String, Option<u64>)> {
        reporter.watched(
            "checksums",
            unit,
            soon,
            || (3, 10),
            || {
                std::thread::sleep(3 * POLL);
                reporter.bars_shown().first().map(|bar| (bar.prefix(), bar.length()))
            },
        )
    }

    #[test]
    fn work_has_a_bar_when_it_lasts_and_none_when_it_does_not() {
        let reporter = Reporter::hidden_bars();
        for unit in [Unit::Count, Unit::Bytes] {
            assert_eq!(seen(&reporter, unit, POLL), Some(("checksums".into(), Some(10))));
            assert_eq!(seen(&reporter, unit, SOON), None);
            assert!(reporter.bars_shown().is_empty(), "taken away");
        }
    }

    #[test]
    fn every_bar_tells_of_a_signal_and_so_do_those_that_come_after_it() {
        let reporter = Reporter::hidden_bars();
        let prefixes = || reporter.bars_shown().iter().map(ProgressBar::prefix).collect::<Vec<_>>();
        reporter.stage_start("dpo", 0, 5);
        let pass = reporter.progress("reference", 3);
        assert_eq!(prefixes(), ["dpo", "reference"]);
        reporter.stopping("asked to stop");
        reporter.stopping("again");
        assert_eq!(prefixes(), ["dpo (stopping)", "reference (stopping)"]);
        drop(pass);
        let _next = reporter.progress("evaluation seen", 3);
        assert_eq!(prefixes(), ["dpo (stopping)", "evaluation seen (stopping)"]);
        reporter.stage_stopped(2);
        assert_eq!(prefixes(), ["evaluation seen (stopping)"]);
    }
}
