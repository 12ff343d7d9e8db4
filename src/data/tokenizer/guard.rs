//! Bounds around `tokenizers`: patterns that backtrack without end, panics, normalizers that make a text grow.

use crate::bail;
use crate::error::{Error, Result};
use serde_json::Value;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use tokenizers::{AddedToken, Encoding, Tokenizer};

/// Steps back that one search of a pattern may take; each takes some nanoseconds.
const STEPS_BACK: std::ffi::c_ulong = 20_000_000;
/// Longest text that a normalizer may put in front, in bytes.
const PUT_IN_FRONT: usize = 1 << 12;
/// How many times as long a normalizer may make a text.
const LONGER: f64 = 4096.0;

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

/// Adds tokens, which the normalizer sees.
///
/// # Errors
/// As [`encode`].
pub(super) fn add(tokenizer: &mut Tokenizer, tokens: Vec<AddedToken>) -> Result<()> {
    let added = catch(|| tokenizer.add_tokens(tokens));
    match added {
        Some(result) => result.map(|_| ()).map_err(|e| Error::new(format!("the tokenizer takes up no token: {e}"))),
        None => bail!("the tokenizer takes up no token: a pattern of its normalizer tries too many ways to match it";
            "correct the regular expressions in tokenizer.json, or fetch the file again"),
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
    /// That of `tokenizer.json`'s `normalizer`.
    ///
    /// # Errors
    /// If it makes many kilobytes of every text.
    pub fn of(normalizer: &Value) -> Result<Self> {
        let mut all = Self { factor: 1.0, front: 0 };
        all.add(normalizer);
        let hint = "correct the normalizer in tokenizer.json, or fetch the file again";
        if all.front > PUT_IN_FRONT {
            bail!("the normalizer puts {} bytes in front of every text", all.front; "{hint}")
        }
        if all.factor > LONGER {
            bail!("the normalizer can make a text {:.0} times as long", all.factor; "{hint}")
        }
        Ok(all)
    }

    fn add(&mut self, normalizer: &Value) {
        let text = |v: &Value| v.as_str().map(str::len);
        match normalizer["type"].as_str() {
            Some("Sequence") => normalizer["normalizers"].as_array().into_iter().flatten().for_each(|n| self.add(n)),
            Some("Prepend") => self.front = self.front.saturating_add(text(&normalizer["prepend"]).unwrap_or(0)),
            // A regular expression may match a single byte.
            Some("Replace") => {
                let replaced = text(&normalizer["pattern"]["String"]).unwrap_or(1).max(1);
                self.times(text(&normalizer["content"]).unwrap_or(0) as f64 / replaced as f64);
            }
            // One character becomes eighteen at most.
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
