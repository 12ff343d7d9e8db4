//! What people (or programs, with `json`) see on stderr while a run goes on.

use super::human;
use super::line::{parts, stage_style};
use super::width::{self, fit, wrap};
use super::{StepMetrics, Table};
use crate::error::Error;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
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
const BARS_PER_SECOND: u8 = 10;
/// Behind the name of a bar once a signal has come.
const STOPPING: &str = " (stopping)";

/// Reports a run on stderr. It can be shared between threads; a stderr that cannot be written to is ignored.
pub struct Reporter {
    mode: Mode,
    color: bool,
    /// Columns of the terminal; none where stderr is none.
    columns: Option<usize>,
    /// All bars; none outside [`Mode::Bar`].
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Write + Send>,
    stage: Option<StageState>,
    /// Every bar that is shown, the stage's too.
    shown: Vec<ProgressBar>,
    /// Has a signal asked to stop?
    stopping: bool,
    /// Stages that are still to come, in order, each with its cost.
    plan: Vec<(String, f64)>,
}

struct StageState {
    name: String,
    first_step: usize,
    total_steps: usize,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
    /// Cost of all that comes behind this stage, in costs of one of its steps.
    behind: f64,
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

    /// As on a terminal, but nothing is drawn.
    #[cfg(test)]
    pub(super) fn hidden_bars() -> Self {
        let bars = Some(MultiProgress::with_draw_target(ProgressDrawTarget::hidden()));
        Self { bars, ..Self::silent() }
    }

    /// The bars that are shown.
    #[cfg(test)]
    pub(super) fn bars_shown(&self) -> Vec<ProgressBar> {
        self.state().shown.clone()
    }

    fn to(mode: Mode, color: bool, out: Box<dyn Write + Send>) -> Self {
        let bars = (mode == Mode::Bar)
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(BARS_PER_SECOND)));
        let columns = match mode {
            Mode::Bar => width::of_stderr(),
            Mode::Lines => width::of_environment(),
            Mode::Json => None,
        };
        let state = State { out, stage: None, shown: Vec::new(), stopping: false, plan: Vec::new() };
        Self { mode, color, columns, bars, state: Mutex::new(state) }
    }

    /// The stages that are still to be run, in order, each with its cost in any one unit, such as tokens through the model:
    /// by it the time that the run has left is told beside the stage's.
    pub fn plan(&self, stages: Vec<(String, f64)>) {
        self.state().plan = stages;
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
        let bar = self.bar(total_steps as u64, stage, stage_style());
        if let Some(bar) = &bar {
            bar.set_position(first_step as u64);
        }
        let name = stage.to_string();
        let mut state = self.state();
        let behind = behind(&state.plan, stage, total_steps);
        state.stage = Some(StageState { name, first_step, total_steps, started: now, last_line: now, bar, behind });
    }

    /// A step is done.
    pub fn step(&self, metrics: &StepMetrics) {
        let columns = self.columns.unwrap_or(usize::MAX);
        let mut state = self.state();
        let State { out, stage, .. } = &mut *state;
        if self.mode == Mode::Json {
            let mut event = json!({ "event": "step" });
            if let (Some(event), Ok(Value::Object(fields))) = (event.as_object_mut(), serde_json::to_value(metrics)) {
                event.extend(fields);
            }
            let _ = writeln!(out, "{event}");
            return;
        }
        let Some(stage) = stage else { return };
        let left = |step| match (stage.left(step), stage.left_of_run(step)) {
            (stage, Some(run)) => format!("{} left, {} in all", human::duration(stage), human::duration(run)),
            (stage, None) => format!("{} left", human::duration(stage)),
        };
        if let Some(bar) = &stage.bar {
            bar.set_position(metrics.step as u64);
            bar.set_message(fit(&parts(metrics, left(metrics.step)), columns.saturating_sub(stage.bar_columns())));
        } else if stage.is_due(metrics.step) {
            let (step, total) = (metrics.step, stage.total_steps);
            let width = total.to_string().len();
            let head = format!("{}  step {step:>width$}/{total}  ", metrics.stage);
            let rest = fit(&parts(metrics, left(step)), columns.saturating_sub(head.chars().count()));
            let _ = writeln!(out, "{head}{rest}");
            stage.last_line = Instant::now();
        }
    }

    /// The stage that was started is over.
    pub fn stage_end(&self) {
        let Some(stage) = self.take_stage() else { return };
        let took = stage.started.elapsed();
        self.message(
            || json!({ "event": "stage_end", "stage": stage.name, "seconds": took.as_secs_f64() }),
            || format!("{}: done in {}\n", stage.name, human::duration(took)),
        );
    }

    /// The stage that was started stops after `step`, to go on later.
    pub fn stage_stopped(&self, step: usize) {
        let Some(stage) = self.take_stage() else { return };
        let (name, total) = (&stage.name, stage.total_steps);
        self.message(
            || json!({ "event": "stopped", "stage": name, "step": step, "total_steps": total }),
            || {
                let go_on = match step {
                    0 => "the same command begins the stage",
                    _ => "a checkpoint is written; the same command goes on from there",
                };
                format!("{name}: asked to stop, stopped after step {step} of {total}; {go_on}\n")
            },
        );
    }

    /// A signal has come, and this is its answer; every bar shows it as well.
    pub fn stopping(&self, text: &str) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.stopping, true) {
            state.shown.iter().for_each(|bar| bar.set_prefix(bar.prefix() + STOPPING));
        }
        drop(state);
        self.message(|| json!({ "event": "stopping", "message": text }), || format!("{text}\n"));
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
        self.take_stage();
        self.message(
            || json!({ "event": "error", "message": e.to_string(), "hint": e.hint_text() }),
            || format!("error: {}\n", e.report()),
        );
    }

    /// A table, with an empty line before and behind it.
    pub fn table(&self, table: &Table) {
        self.write(
            || json!({ "event": "table", "title": table.title, "columns": table.columns, "rows": table.rows }),
            || format!("\n{}\n", table.render_within(self.columns)),
        );
    }

    /// Writes one event, above the bars if there are any; on a terminal its lines are broken at spaces.
    pub(super) fn message(&self, event: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
        self.write(event, || match self.columns {
            Some(columns) => wrap(&text(), columns),
            None => text(),
        });
    }

    fn write(&self, event: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
        let text = if self.mode == Mode::Json { format!("{}\n", event()) } else { text() };
        let mut state = self.state();
        let out = &mut state.out;
        let mut write = || {
            let _ = out.write_all(text.as_bytes());
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    /// A bar below those that are there, on a terminal.
    pub(super) fn bar(&self, total: u64, name: &str, style: ProgressStyle) -> Option<ProgressBar> {
        let bars = self.bars.as_ref()?;
        let mut state = self.state();
        let stopping = if state.stopping { STOPPING } else { "" };
        let bar = ProgressBar::hidden().with_prefix(format!("{name}{stopping}")).with_style(style);
        bar.set_length(total);
        let bar = bars.add(bar);
        state.shown.push(bar.clone());
        Some(bar)
    }

    pub(super) fn remove(&self, bar: Option<&ProgressBar>) {
        if let (Some(bars), Some(bar)) = (&self.bars, bar) {
            bar.finish_and_clear();
            bars.remove(bar);
            self.state().shown.retain(|shown| !shown.is_finished());
        }
    }

    /// The stage that was started, its bar taken away.
    fn take_stage(&self) -> Option<StageState> {
        let stage = self.state().stage.take()?;
        self.remove(stage.bar.as_ref());
        Some(stage)
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

    /// Time left of the run, whose other stages are taken to cost what the plan says beside this one's steps; none where
    /// nothing comes behind.
    fn left_of_run(&self, step: usize) -> Option<Duration> {
        let done = step.saturating_sub(self.first_step).max(1) as f64;
        let left = self.total_steps.saturating_sub(step) as f64 + self.behind;
        (self.behind > 0.0).then(|| self.started.elapsed().mul_f64((left / done).min(1e9)))
    }

    /// What stands in front of the bar's message.
    fn bar_columns(&self) -> usize {
        let total = self.total_steps.to_string().len();
        let name = self.bar.as_ref().map_or(self.name.chars().count(), |bar| bar.prefix().chars().count());
        name + super::line::BAR + 2 * total + 5
    }
}

/// Cost of the stages behind `stage`, in costs of one of its steps.
fn behind(plan: &[(String, f64)], stage: &str, steps: usize) -> f64 {
    let Some(at) = plan.iter().position(|(name, _)| name == stage) else { return 0.0 };
    let rest: f64 = plan[at + 1..].iter().map(|(_, cost)| cost).sum();
    let step = plan[at].1 / steps.max(1) as f64;
    if step > 0.0 && rest.is_finite() { rest / step } else { 0.0 }
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
    fn the_time_left_of_a_run_counts_the_stages_behind() {
        let plan = [("align", 100.0), ("sft", 300.0), ("dpo", 100.0)].map(|(n, c)| (n.to_string(), c));
        assert_eq!(behind(&plan, "align", 50), 200.0, "400 behind, 2 a step");
        assert_eq!(behind(&plan, "sft", 100), 100.0 / 3.0);
        assert_eq!((behind(&plan, "dpo", 100), behind(&plan, "other", 9), behind(&[], "sft", 1)), (0.0, 0.0, 0.0));
        let text = said(Mode::Lines, false, |r| {
            r.plan(plan.to_vec());
            r.stage_start("align", 0, 50);
            r.step(&step(1));
            r.stage_end();
        });
        assert!(text.lines().nth(1).is_some_and(|l| l.contains(" left, ") && l.contains(" in all")), "{text}");
    }

    #[test]
    fn a_short_progress_is_silent_where_there_is_no_bar_and_a_watch_hands_on_its_work() {
        let text = said(Mode::Lines, false, |r| {
            let p = r.progress("evaluation seen", 3);
            (0..3).for_each(|_| p.inc(1));
            assert_eq!(r.watch("loading", || (1, 2), || 7), 7);
        });
        assert_eq!(text, "");
    }
}
