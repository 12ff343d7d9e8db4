//! Bounds around `tokenizers`: patterns that backtrack without end, panics, normalizers that make a text grow.

use crate::bail;
use crate::error::{Error, Result};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{Encoding, Tokenizer};

/// Steps back that one search of a pattern may take; each takes some nanoseconds.
const STEPS_BACK: std::ffi::c_ulong = 20_000_000;
/// Longest text that a normalizer may put in front, in bytes.
const PUT_IN_FRONT: usize = 1 << 12;

/// `f`, or `None` if it panics; nothing is printed then.
pub(super) fn catch<T>(f: impl FnOnce() -> T) -> Option<T> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f)).ok();
    QUIET.set(before);
    result
}

/// Encodes a text.
///
/// # Errors
/// If the tokenizer cannot, or one of its patterns does not come to an end.
pub fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Encoding> {
    static LIMIT: Once = Once::new();
    // SAFETY: it sets a number that later searches read; no search of this process has begun before the first encoding.
    LIMIT.call_once(|| _ = unsafe { onig_sys::onig_set_retry_limit_in_search(STEPS_BACK) });
    let cannot = |e: &dyn std::fmt::Display| Error::new(format!("the tokenizer cannot encode the text: {e}"));
    match catch(|| tokenizer.encode(text, special)) {
        Some(result) => result.map_err(|e| cannot(&e)),
        None => Err(cannot(&"one of its patterns tries too many ways to match it")
            .hint("correct the regular expressions in tokenizer.json, or fetch the file again")),
    }
}

/// How long a normalizer can make a text, at most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// Bytes for each byte.
    factor: f64,
    /// Bytes beside that.
    front: usize,
}

impl Growth {
    /// That of a tokenizer.
    ///
    /// # Errors
    /// If it puts a text of many kilobytes in front of every other.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let mut all = Self { factor: 1.0, front: 0 };
        let Some(normalizer) = tokenizer.get_normalizer() else { return Ok(all) };
        all.add(normalizer);
        if all.front > PUT_IN_FRONT {
            bail!("the normalizer puts {} bytes in front of every text", all.front;
                "correct `prepend` in the normalizer of tokenizer.json, or fetch the file again")
        }
        Ok(all)
    }

    fn add(&mut self, normalizer: &NormalizerWrapper) {
        match normalizer {
            NormalizerWrapper::Sequence(all) => all.as_ref().iter().for_each(|n| self.add(n)),
            NormalizerWrapper::Prepend(p) => self.front = self.front.saturating_add(p.prepend.len()),
            NormalizerWrapper::Replace(r) => self.times(r.content.len() as f64 / shortest(r)),
            // One character becomes eighteen at most, and two bytes three; of a precompiled map nothing is known but that.
            _ => {}
        }
    }

    fn times(&mut self, factor: f64) {
        let factor = factor.max(1.0);
        self.factor *= factor;
        self.front = (self.front as f64 * factor) as usize;
    }

    /// Holds a text to `most` bytes after the normalizer.
    ///
    /// # Errors
    /// If it may become longer.
    pub fn check(&self, text: &str, most: usize) -> Result<()> {
        let grown = text.len() as f64 * self.factor + self.front as f64;
        if grown > most as f64 && self.factor > 1.0 {
            bail!("the tokenizer's normalizer can make {grown:.0} bytes of a text of {}", text.len();
                "correct the `Replace` rules in the normalizer of tokenizer.json, or fetch the file again")
        }
        Ok(())
    }
}

/// Bytes that a rule replaces at least; a regular expression may match a single one.
fn shortest(rule: &tokenizers::normalizers::Replace) -> f64 {
    let pattern = serde_json::to_value(rule).ok();
    let text = pattern.as_ref().and_then(|v| v["pattern"]["String"].as_str());
    text.map_or(1.0, |t| t.len().max(1) as f64)
}
