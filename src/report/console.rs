//! What people (or programs, with `json`) see on stderr while a run goes on.

use super::human;
use super::{StepMetrics, Table};
use crate::error::Error;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// `--log`: how a run reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// A progress bar on a terminal, plain lines elsewhere.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bar,
    Lines,
    Json,
}

/// Plain lines: about this many a stage …
const LINES_PER_STAGE: usize = 20;
/// … and never a longer silence than this.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);

/// Reports a run on stderr. It can be shared between threads; a stderr that cannot be written to is ignored.
pub struct Reporter {
    mode: Mode,
    color: bool,
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    stage: Option<StageState>,
}

struct StageState {
    name: String,
    first_step: usize,
    total_steps: usize,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Reporter {
    /// To stderr. No colours where `NO_COLOR` is set; no bar where stderr is not a terminal or `TERM` is `dumb`.
    pub fn new(format: LogFormat) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let mode = match format {
            LogFormat::Json => Mode::Json,
            LogFormat::Auto if terminal => Mode::Bar,
            LogFormat::Auto => Mode::Lines,
        };
        let color = terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Self::to(mode, color, Box::new(std::io::stderr()))
    }

    /// Tells nobody.
    pub fn silent() -> Self {
        Self::to(Mode::Lines, false, Box::new(std::io::sink()))
    }

    fn to(mode: Mode, color: bool, out: Box<dyn Write + Send>) -> Self {
        Self { mode, color, state: Mutex::new(State { out, stage: None }) }
    }

    /// A stage begins, or goes on after `first_step` steps (0 for a fresh one) of `total_steps`.
    pub fn stage_start(&self, stage: &str, first_step: usize, total_steps: usize) {
        let now = Instant::now();
        self.message(
            || json!({ "event": "stage_start", "stage": stage, "first_step": first_step, "total_steps": total_steps }),
            || match first_step {
                0 => format!("{stage}: {} steps\n", human::thousands(total_steps as u64)),
                _ => format!("{stage}: goes on after step {first_step} of {total_steps}\n"),
            },
        );
        let bar = (self.mode == Mode::Bar).then(|| {
            let target = ProgressDrawTarget::stderr_with_hz(10);
            let bar = ProgressBar::with_draw_target(Some(total_steps as u64), target).with_prefix(stage.to_string());
            bar.set_style(bar_style());
            bar.set_position(first_step as u64);
            bar.reset_eta();
            bar
        });
        let name = stage.to_string();
        self.state().stage = Some(StageState { name, first_step, total_steps, started: now, last_line: now, bar });
    }

    /// A step is done.
    pub fn step(&self, metrics: &StepMetrics) {
        let mut state = self.state();
        let State { out, stage } = &mut *state;
        if self.mode == Mode::Json {
            let mut event = json!({ "event": "step" });
            if let (Some(event), Ok(Value::Object(fields))) = (event.as_object_mut(), serde_json::to_value(metrics)) {
                event.extend(fields);
            }
            let _ = writeln!(out, "{event}");
            return;
        }
        let Some(stage) = stage else { return };
        if let Some(bar) = &stage.bar {
            bar.set_position(metrics.step as u64);
            bar.set_message(summary(metrics));
        } else if stage.is_due(metrics.step) {
            stage.last_line = Instant::now();
            let (width, left) = (stage.total_steps.to_string().len(), human::duration(stage.left(metrics.step)));
            let (step, total) = (metrics.step, stage.total_steps);
            let _ = writeln!(out, "{}  step {step:>width$}/{total}  {}  {left} left", metrics.stage, summary(metrics));
        }
    }

    /// The stage that was started is over.
    pub fn stage_end(&self) {
        let Some(stage) = self.state().stage.take() else { return };
        if let Some(bar) = &stage.bar {
            bar.finish_and_clear();
        }
        let took = stage.started.elapsed();
        self.message(
            || json!({ "event": "stage_end", "stage": stage.name, "seconds": took.as_secs_f64() }),
            || format!("{}: done in {}\n", stage.name, human::duration(took)),
        );
    }

    /// The stage that was started stops after `step`, to go on later.
    pub fn stage_stopped(&self, step: usize) {
        let Some(stage) = self.state().stage.take() else { return };
        if let Some(bar) = &stage.bar {
            bar.finish_and_clear();
        }
        let (name, total) = (&stage.name, stage.total_steps);
        self.message(
            || json!({ "event": "stopped", "stage": name, "step": step, "total_steps": total }),
            || {
                let go_on = "a checkpoint is written; the same command goes on from there";
                format!("{name}: asked to stop, stopped after step {step} of {total}; {go_on}\n")
            },
        );
    }

    /// Something worth knowing.
    pub fn info(&self, text: &str) {
        self.message(|| json!({ "event": "info", "message": text }), || format!("{text}\n"));
    }

    /// Something that may be wrong.
    pub fn warn(&self, text: &str) {
        let label = if self.color { "\u{1b}[33mwarning:\u{1b}[0m" } else { "warning:" };
        self.message(|| json!({ "event": "warn", "message": text }), || format!("{label} {text}\n"));
    }

    /// Why the command fails: cause, blank line, hint.
    pub fn error(&self, e: &Error) {
        if let Some(bar) = self.state().stage.take().and_then(|s| s.bar) {
            bar.finish_and_clear();
        }
        self.message(
            || json!({ "event": "error", "message": e.to_string(), "hint": e.hint_text() }),
            || format!("error: {}\n", e.report()),
        );
    }

    /// A table, with an empty line before and behind it.
    pub fn table(&self, table: &Table) {
        self.message(
            || json!({ "event": "table", "title": table.title, "columns": table.columns, "rows": table.rows }),
            || format!("\n{}\n", table.render()),
        );
    }

    /// Writes one event, above the bar if there is one.
    fn message(&self, event: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
        let text = if self.mode == Mode::Json { format!("{}\n", event()) } else { text() };
        let mut state = self.state();
        let State { out, stage } = &mut *state;
        let mut write = || {
            let _ = out.write_all(text.as_bytes());
        };
        match stage.as_ref().and_then(|s| s.bar.as_ref()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StageState {
    /// Plain lines: the first and the last step, evenly between them, and after a long silence.
    fn is_due(&self, step: usize) -> bool {
        let every = (self.total_steps / LINES_PER_STAGE).max(1);
        step == self.first_step + 1
            || step == self.total_steps
            || step.is_multiple_of(every)
            || self.last_line.elapsed() >= LONGEST_SILENCE
    }

    /// Time left at the mean speed since the start.
    fn left(&self, step: usize) -> Duration {
        let done = step.saturating_sub(self.first_step).max(1) as f64;
        let left = self.total_steps.saturating_sub(step) as f64;
        self.started.elapsed().mul_f64(left / done)
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// "loss 0.4821  lr 1.0e-3  grad 0.92  12,340 tokens/s".
fn summary(m: &StepMetrics) -> String {
    let mut text = format!("loss {:.4}", m.loss);
    let rates = || m.lr.values().chain(m.lr_lowest.values()).copied();
    let (low, high) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
    text += &match low < high {
        true => format!("  lr {low:.1e} to {high:.1e}"),
        false => format!("  lr {high:.1e}"),
    };
    text += &format!("  grad {:.3}", m.grad_norm_total);
    if let Some(p) = &m.preference {
        text += &format!("  margin {:.3}  accuracy {:.2}", p.margin, p.accuracy);
    }
    text + &format!("  {} tokens/s", human::thousands(m.tokens_per_s.max(0.0) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::PreferenceMetrics;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn said(mode: Mode, color: bool, tell: impl FnOnce(&Reporter)) -> String {
        let buffer = Buffer::default();
        tell(&Reporter::to(mode, color, Box::new(buffer.clone())));
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn step(step: usize) -> StepMetrics {
        StepMetrics {
            stage: "sft".into(),
            step,
            loss: 0.48213,
            lr: [("lora".into(), 2e-3), ("projector".into(), 1e-3)].into(),
            grad_norm_total: 0.9241,
            tokens_per_s: 12_340.5,
            ..Default::default()
        }
    }

    #[test]
    fn lines_are_few_and_readable() {
        let text = said(Mode::Lines, false, |r| {
            r.stage_start("sft", 0, 1000);
            (1..=1000).for_each(|s| r.step(&step(s)));
            r.stage_end();
        });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2 + LINES_PER_STAGE + 1, "{text}");
        assert_eq!(lines[0], "sft: 1,000 steps");
        let second = "sft  step   50/1000  loss 0.4821  lr 1.0e-3 to 2.0e-3  grad 0.924  12,340 tokens/s  ";
        assert!(lines[2].starts_with(second) && lines[2].ends_with(" left"), "{}", lines[2]);
        assert!(lines[lines.len() - 2].starts_with("sft  step 1000/1000"));
        assert!(lines[lines.len() - 1].starts_with("sft: done in 0."));
    }

    #[test]
    fn a_resumed_stage_says_so_and_preferences_are_shown() {
        let mut m = step(901);
        m.lr = [("lora".into(), 5e-7)].into();
        m.preference = Some(PreferenceMetrics { margin: 0.1234, accuracy: 0.75, ..Default::default() });
        let text = said(Mode::Lines, false, |r| {
            r.stage_start("dpo", 900, 1000);
            r.step(&m);
        });
        assert!(text.starts_with("dpo: goes on after step 900 of 1000\n"), "{text}");
        assert!(text.contains("lr 5.0e-7  grad 0.924  margin 0.123  accuracy 0.75"), "{text}");
    }

    #[test]
    fn json_is_one_object_a_line() {
        let mut table = Table::new("t", ["a"]);
        table.row(["1"]);
        let text = said(Mode::Json, true, |r| {
            r.stage_start("sft", 0, 2);
            r.step(&step(1));
            r.warn("careful");
            r.info("so\nit is");
            r.table(&table);
            r.stage_end();
            r.stage_start("sft", 0, 2);
            r.stage_stopped(1);
            r.error(&Error::new("broken").hint("mend it"));
        });
        let events: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let names: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["stage_start", "step", "warn", "info", "table", "stage_end", "stage_start", "stopped", "error"]
        );
        assert_eq!(events[1]["lr"]["lora"], 2e-3);
        assert_eq!(events[3]["message"], "so\nit is");
        assert_eq!(events[4]["rows"][0][0], "1");
        assert_eq!((&events[8]["message"], &events[8]["hint"]), (&json!("broken"), &json!("mend it")));
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn warnings_are_coloured_only_where_colours_are_wanted() {
        assert_eq!(said(Mode::Lines, false, |r| r.warn("careful")), "warning: careful\n");
        assert_eq!(said(Mode::Bar, true, |r| r.warn("careful")), "\u{1b}[33mwarning:\u{1b}[0m careful\n");
    }

    #[test]
    fn the_bar_style_is_valid() {
        assert!(ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left").is_ok());
    }
}
