//! Signals that ask a process to stop: Ctrl-C, SIGTERM, SIGHUP (a terminal that closes), and SIGUSR1, which batch systems send
//! ahead of a time limit.
//!
//! Each is answered at once in words. Where work would be lost ([`Signals::defer`]) the first one only leaves a note: the step
//! or batch is finished, or left between micro-batches if it lasts longer than [`PATIENCE`] or a second signal comes, and what is
//! done is saved. Everywhere else there is nothing to lose, so the process ends; and so it does at a third signal.

use crate::error::{Context, Error, Result};
use signal_hook::consts::signal;
use signal_hook::{flag, low_level};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Exit code of a run that was asked to stop; the same command goes on (`EX_TEMPFAIL` of sysexits.h).
pub const STOPPED: u8 = 75;

/// How long a step goes on after the first signal before it is left between micro-batches: batch systems often give 30 s.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Signals within this time of the first one are one: wrappers forward what the terminal has sent already.
const BURST: Duration = Duration::from_secs(2);

/// How often new signals are looked for.
const LOOK: Duration = Duration::from_millis(10);

#[cfg(unix)]
const SIGNALS: [(i32, &str); 4] = [
    (signal::SIGINT, "SIGINT"),
    (signal::SIGTERM, "SIGTERM"),
    (signal::SIGUSR1, "SIGUSR1"),
    (signal::SIGHUP, "SIGHUP"),
];
#[cfg(not(unix))]
const SIGNALS: [(i32, &str); 2] = [(signal::SIGINT, "SIGINT"), (signal::SIGTERM, "SIGTERM")];

/// How a process that has nothing to save ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With code [`STOPPED`]: the same command goes on.
    GoesOn,
    /// By the signal itself, which shells tell as 128 and its number (130: Ctrl-C, 143: SIGTERM).
    BySignal,
}

/// What signals have asked for. The default hears none.
#[derive(Debug, Clone, Default)]
pub struct Signals(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Set by the handlers themselves, so that no step begins in between.
    asked: Arc<AtomicBool>,
    /// Number of the first signal, and how often one came.
    first: AtomicUsize,
    count: AtomicUsize,
    since: Mutex<Option<Instant>>,
    /// Has the work that would be lost been told of a signal? It then ends by itself.
    taken: AtomicBool,
    /// What is said when a signal comes where work would be lost.
    deferred: Mutex<Option<&'static str>>,
}

impl Signals {
    /// Listens from now on; `tell` is how a signal is answered.
    ///
    /// # Errors
    /// If the system refuses handlers or a thread.
    pub fn listen(end: End, tell: impl Fn(&str) + Send + Sync + 'static) -> Result<Self> {
        let signals = Self::default();
        let mut fresh = Vec::new();
        for (number, name) in SIGNALS.into_iter().filter(|(number, _)| !to_be_ignored(*number)) {
            let new: Arc<AtomicBool> = Arc::default();
            flag::register(number, signals.0.asked.clone())
                .and_then(|_| flag::register(number, new.clone()))
                .with_context(|| format!("cannot listen to {name}"))?;
            fresh.push((number, name, new));
        }
        // A file over the limit (`ulimit -f`) is then an error of the write, which says what to do, and not an end.
        #[cfg(unix)]
        flag::register(signal::SIGXFSZ, Arc::default()).context("cannot listen to SIGXFSZ")?;
        let (heard, tell) = (signals.clone(), Arc::new(tell));
        let watch = move || {
            loop {
                std::thread::sleep(LOOK);
                for (number, name, new) in &fresh {
                    if new.swap(false, Ordering::SeqCst) {
                        heard.hear(*number, name, end, &tell);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".into()).spawn(watch);
        let hint = "the system refuses more threads: raise its limit (ulimit -u)";
        thread.map_err(|e| Error::new(format!("cannot start a thread that listens to signals: {e}")).hint(hint))?;
        Ok(signals)
    }

    /// Answers one signal.
    fn hear<F: Fn(&str) + Send + Sync + 'static>(&self, number: i32, name: &str, end: End, tell: &Arc<F>) {
        let count = self.0.count.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.first.compare_exchange(0, number.unsigned_abs() as usize, Ordering::SeqCst, Ordering::SeqCst).ok();
        let since = *lock(&self.0.since).get_or_insert_with(Instant::now);
        let words = *lock(&self.0.deferred);
        // The work may have noticed the signal, and be over, before this thread has.
        let nothing_to_lose = words.is_none() && !self.0.taken.load(Ordering::SeqCst);
        let at_once = nothing_to_lose || (count > 2 && since.elapsed() > BURST);
        match (words, count) {
            _ if at_once && end == End::BySignal => {}
            _ if at_once => say(tell, format!("{name}: stopped; the same command goes on from what is saved")),
            (Some(words), 1) => say(tell, format!("{name}: asked to stop: {words}")),
            (None, 1) => say(tell, format!("{name}: asked to stop")),
            (Some(_), 2) => say(tell, format!("{name} again: leaving it between micro-batches; what is done is saved")),
            _ => {}
        }
        if !at_once {
            return;
        }
        match end {
            End::GoesOn => low_level::exit(STOPPED.into()),
            End::BySignal => {
                // Does not return, unless this is the first process of a container, which no signal ends.
                let _ = low_level::emulate_default_handler(number);
                low_level::exit(128 + number)
            }
        }
    }

    /// Until the guard is dropped, a first signal does not end the process; it is answered with `words`: what is finished first.
    pub fn defer(&self, words: &'static str) -> Deferred<'_> {
        let before = lock(&self.0.deferred).replace(words);
        Deferred { signals: self, before }
    }

    /// Has a signal asked to stop? Whoever hears of it saves what it has, and ends.
    pub fn asked(&self) -> bool {
        let asked = self.0.asked.load(Ordering::SeqCst);
        if asked {
            self.0.taken.store(true, Ordering::SeqCst);
        }
        asked
    }

    /// Is what was begun to be left before it is whole?
    pub fn leave(&self) -> bool {
        self.asked()
            && (self.0.count.load(Ordering::SeqCst) > 1
                || lock(&self.0.since).is_some_and(|since| since.elapsed() > PATIENCE))
    }

    /// The exit code that shells tell of a process which the first signal has ended.
    pub fn code(&self) -> u8 {
        // The thread that looks which one it was may not have done so yet.
        for _ in 0..50 {
            if self.0.first.load(Ordering::SeqCst) > 0 {
                break;
            }
            std::thread::sleep(LOOK);
        }
        let number = self.0.first.load(Ordering::SeqCst);
        128 + u8::try_from(number).ok().filter(|n| (1..64).contains(n)).unwrap_or(2)
    }
}

/// Is this SIGHUP, and was the process started to go on when its terminal closes, as `nohup` does? Linux alone tells.
fn to_be_ignored(number: i32) -> bool {
    #[cfg(unix)]
    if number == signal::SIGHUP {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        return ignores(&status, number);
    }
    let _ = number;
    false
}

/// Does a process with this `/proc/PID/status` ignore the signal?
fn ignores(status: &str, number: i32) -> bool {
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| (mask >> (number - 1)) & 1 == 1)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says it, but does not wait for a reader that has stopped reading.
fn say<F: Fn(&str) + Send + Sync + 'static>(tell: &Arc<F>, text: String) {
    let ((done, wait), tell) = (mpsc::channel(), tell.clone());
    let speak = move || {
        tell(&text);
        // Nobody may be waiting any more.
        let _ = done.send(());
    };
    if std::thread::Builder::new().spawn(speak).is_ok() {
        let _ = wait.recv_timeout(Duration::from_millis(300));
    }
}

/// See [`Signals::defer`].
pub struct Deferred<'a> {
    signals: &'a Signals,
    before: Option<&'static str>,
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        *lock(&self.signals.0.deferred) = self.before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn what_nohup_ignores_is_read_from_the_mask() {
        let status = |mask: &str| format!("Name:\tadfreeze\nSigBlk:\tffffffffffffffff\nSigIgn:\t{mask}\nSigCgt:\t0\n");
        assert!(ignores(&status("0000000000000001"), signal::SIGHUP));
        assert!(ignores(&status("0000000000001001"), signal::SIGHUP));
        assert!(!ignores(&status("0000000000001002"), signal::SIGHUP));
        assert!(!ignores("", signal::SIGHUP));
    }
}
