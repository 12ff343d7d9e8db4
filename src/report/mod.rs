//! What a run says: lines or a progress bar for people, JSON lines for programs, `metrics.jsonl` for later.
//!
//! Everything here goes to stderr or into files; stdout belongs to a command's own output.

mod console;
pub mod human;
mod metrics;
mod table;

pub use console::{LogFormat, Reporter};
pub use metrics::{
    MetricsFile, PreferenceMetrics, StepMetrics, TIMING_FIELDS, peak_memory_bytes, reset_peak_memory, without_timing,
};
pub use table::Table;
