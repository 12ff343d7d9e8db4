//! What a run says: lines or a progress bar for people, JSON lines for programs, `metrics.jsonl` for later.
//!
//! Everything here goes to stderr or into files; stdout belongs to a command's own output.

mod console;
pub mod human;
mod line;
mod metrics;
mod progress;
mod table;
pub mod width;

pub use console::{LogFormat, Reporter};
pub use metrics::{
    MetricsFile, PreferenceMetrics, StepMetrics, TIMING_FIELDS, metrics_sha256, peak_memory_bytes, reset_peak_memory,
    without_timing,
};
pub use progress::Progress;
pub use table::Table;
