//! Bytes that decodings under way at the same time may take together, over all threads of the process: eight pictures of 179
//! megapixels come one after the other, photographs side by side.

use crate::bail;
use crate::error::Result;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

/// Environment variable: MiB that decodings may take together.
pub const VARIABLE: &str = "ADFREEZE_DECODE_MIB";

const DEFAULT_MIB: u64 = 1024;

/// Bytes that are lent out; who finds too few waits. One that asks for more than there is comes alone.
#[derive(Debug)]
pub struct Budget {
    bytes: u64,
    lent: Mutex<u64>,
    returned: Condvar,
}

/// Bytes of a [`Budget`], given back when dropped.
#[derive(Debug)]
pub struct Held<'a> {
    of: &'a Budget,
    bytes: u64,
}

impl Budget {
    pub fn new(bytes: u64) -> Self {
        Self { bytes, lent: Mutex::new(0), returned: Condvar::new() }
    }

    /// The budget of this process: 1 GiB, or what [`VARIABLE`] says.
    ///
    /// # Errors
    /// If the variable is no number of MiB.
    pub fn of_process() -> Result<&'static Self> {
        static SHARED: OnceLock<Option<Budget>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| {
            let said = std::env::var(VARIABLE).ok();
            let mib = said.map_or(Some(DEFAULT_MIB), |s| s.trim().parse().ok().filter(|n| *n > 0));
            mib.map(|n: u64| Self::new(n.saturating_mul(1 << 20)))
        });
        match shared {
            Some(budget) => Ok(budget),
            None => {
                bail!("{VARIABLE} is no number of MiB"; "set it to the MiB that decoding pictures may take, e.g. {VARIABLE}=2048")
            }
        }
    }

    /// Waits until `bytes` are free, or nobody else holds any.
    pub fn take(&self, bytes: u64) -> Held<'_> {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        while *lent > 0 && lent.saturating_add(bytes) > self.bytes {
            lent = self.returned.wait(lent).unwrap_or_else(PoisonError::into_inner);
        }
        *lent = lent.saturating_add(bytes);
        Held { of: self, bytes }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut lent = self.of.lent.lock().unwrap_or_else(PoisonError::into_inner);
        *lent = lent.saturating_sub(self.bytes);
        self.of.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn never_more_than_the_budget_at_once_and_what_is_larger_comes_alone() {
        let (budget, now, most) = (Budget::new(100), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|s| {
            for bytes in [60, 60, 30, 30, 30, 1000, 60, 30] {
                let (budget, now, most) = (&budget, &now, &most);
                s.spawn(move || {
                    for _ in 0..50 {
                        let _held = budget.take(bytes);
                        let sum = now.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        assert!(sum <= 100 || sum == 1000, "{sum}");
                        most.fetch_max(sum, Ordering::SeqCst);
                        now.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 1000);
        assert_eq!(budget.lent.into_inner().unwrap(), 0);
    }
}
