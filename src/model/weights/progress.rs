//! How many bytes of weights have been loaded, for whoever shows it: a room below the one that reports only counts.

use std::sync::atomic::{AtomicU64, Ordering};

static LOADED: AtomicU64 = AtomicU64::new(0);
static FOUND: AtomicU64 = AtomicU64::new(0);

/// So many bytes of tensors are in a file that was opened.
pub(super) fn found(bytes: usize) {
    FOUND.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// So many of them have been loaded.
pub(super) fn loaded(bytes: usize) {
    LOADED.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// Bytes of tensors loaded, and found in the files opened, since the process began. Some are never loaded: layers above the one
/// that is read.
pub fn so_far() -> (u64, u64) {
    (LOADED.load(Ordering::Relaxed), FOUND.load(Ordering::Relaxed))
}
