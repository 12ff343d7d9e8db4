//! Signals that ask a run to stop: Ctrl-C, SIGTERM, and SIGUSR1, which batch systems send ahead of a time limit.
//!
//! While steps are made, the first signal only leaves a note: the step is finished and a checkpoint written. Everywhere
//! else there is nothing to lose, so the process ends at once; and so it does at a second signal.

use crate::error::{Context, Result};
use signal_hook::consts::signal;
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of a run that was asked to stop; the same command goes on (`EX_TEMPFAIL` of sysexits.h).
pub const STOPPED: u8 = 75;

#[cfg(unix)]
const SIGNALS: [i32; 3] = [signal::SIGINT, signal::SIGTERM, signal::SIGUSR1];
#[cfg(not(unix))]
const SIGNALS: [i32; 2] = [signal::SIGINT, signal::SIGTERM];

/// What signals have asked for. The default hears none.
#[derive(Debug, Clone, Default)]
pub struct Signals {
    asked: Arc<AtomicBool>,
    /// Does the next signal end the process?
    at_once: Arc<AtomicBool>,
}

impl Signals {
    /// Listens from now on.
    pub fn listen() -> Result<Self> {
        let signals = Self { asked: Arc::default(), at_once: Arc::new(AtomicBool::new(true)) };
        for s in SIGNALS {
            // In this order: the note that a first signal leaves is for the second one.
            flag::register_conditional_shutdown(s, STOPPED.into(), signals.at_once.clone())
                .and_then(|_| flag::register(s, signals.asked.clone()))
                .and_then(|_| flag::register(s, signals.at_once.clone()))
                .with_context(|| format!("cannot listen to signal {s}"))?;
        }
        // A file over the limit (`ulimit -f`) is then an error of the write, which says what to do, and not an end.
        #[cfg(unix)]
        flag::register(signal::SIGXFSZ, Arc::default()).context("cannot listen to SIGXFSZ")?;
        Ok(signals)
    }

    /// Until the guard is dropped, a first signal does not end the process.
    pub fn defer(&self) -> Deferred<'_> {
        let listening = self.at_once.swap(false, Ordering::SeqCst);
        Deferred { at_once: &self.at_once, listening }
    }

    /// Has a signal asked to stop?
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

/// See [`Signals::defer`].
pub struct Deferred<'a> {
    at_once: &'a AtomicBool,
    listening: bool,
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        self.at_once.store(self.listening, Ordering::SeqCst);
    }
}
