//! `adfreeze score`: one JSON line a sample, in the order of the file.

use super::{device, model};
use crate::checkpoint::atomic;
use crate::data::{Dataset, Item, load_pixels};
use crate::error::{Context, Error, Result};
use crate::model::vlm::Mode;
use crate::pipeline::pictures::Pictures;
use crate::pipeline::positions;
use crate::pipeline::signals::{End, Signals};
use crate::pipeline::steps::also;
use crate::report::Reporter;
use crate::spec::Data;
use crate::train::collate::collate;
use crate::train::step::finite_logps;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

mod partial;
use partial::Partial;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Conversations (JSON or JSONL).
    #[arg(long)]
    data: PathBuf,
    /// Folder of the pictures; default: the folder of the data file.
    #[arg(long)]
    images: Option<PathBuf>,
    /// One JSON object a line: id, loss, label_tokens, logps. Scores that are there already are replaced, any other file is not.
    /// Until all are done they are in FILE.partial, from which the same command goes on.
    #[arg(long)]
    out: PathBuf,
    /// Samples a forward pass.
    #[arg(long, default_value_t = 8, value_parser = super::count(1..=65_536))]
    micro: usize,
    #[command(flatten)]
    pictures: model::Pictures,
    #[command(flatten)]
    compute: device::Args,
}

/// One line of the result.
#[derive(serde::Serialize)]
struct Line<'a> {
    id: &'a str,
    /// Mean negative log-probability of a label token.
    loss: f64,
    label_tokens: usize,
    /// Log-probability of each label token, in order.
    logps: &'a [f64],
}

impl Args {
    /// Is a run asked, and not a model?
    pub fn of_run(&self) -> bool {
        self.model.of_run()
    }
}

/// Is this a line that an earlier run has written?
fn is_line(text: &str) -> bool {
    let keys = ["id", "loss", "label_tokens", "logps"];
    let line = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text);
    line.is_ok_and(|l| l.len() == keys.len() && keys.iter().all(|k| l.contains_key(*k)))
}

pub fn run(args: &Args, reporter: &'static Reporter) -> Result<ExitCode> {
    let signals = Signals::listen(End::BySignal, |text| reporter.stopping(text))?;
    atomic::free_for(&args.out, "scores", is_line).context("--out")?;
    let m = args.model.load(&args.compute, reporter)?;
    let data = Data { path: args.data.clone(), images: args.images.clone(), ..args.pictures.of(&m, reporter)? };
    let set = Dataset::conversations(&[data], &m.assembly.encoder, m.template)?;
    m.assembly.encoder.notices().iter().for_each(|w| reporter.warn(w));
    let beyond = positions::beyond(&args.data.display().to_string(), &m.vlm, &set.items);
    beyond.iter().for_each(|w| reporter.warn(&format!("{w}: their scores mean little")));
    let (mut pictures, owner) = (Pictures::default(), args.data.display().to_string());
    pictures.add_all(&owner, &set);
    pictures.prove(&BTreeSet::from([owner]), m.assembly.images.as_ref(), reporter)?;
    let scoring = Scoring { m: &m, items: &set.items, micro: args.micro, signals: &signals, reporter };
    let place = &m.assembly.place;
    let setting =
        format!("{} {} {:?} {:?}", env!("ADFREEZE_VERSION"), args.micro, place.device.location(), place.dtype);
    let total = set.items.len();
    let (done, failed, partial) = match Partial::open(&args.out, setting).context("--out")? {
        Some(mut partial) => {
            let from = scoring.go_on(&mut partial)?;
            let (done, failed) = scoring.go(from, |items, lines| partial.add(items, &lines))?;
            (done, failed, Some(partial))
        }
        None => {
            let mut ended = (0, None);
            atomic::write_out(&args.out, |out| {
                ended = scoring.go(0, |_, lines| {
                    lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
                    Ok(out.flush()?)
                })?;
                Ok(())
            })?;
            (ended.0, ended.1, None)
        }
    };
    let path = args.out.display().to_string();
    let (kept, goes_on) = match partial {
        Some(partial) if done == total => {
            partial.finish(&args.out)?;
            (path, "")
        }
        Some(partial) if done == 0 => {
            partial.discard()?;
            (path, "")
        }
        Some(mut partial) => {
            partial.sync()?;
            (partial.path().display().to_string(), "; the same command goes on from there")
        }
        None => (path, ""),
    };
    let kept = format!("{done} of {total} samples are in {kept}{goes_on}");
    match failed {
        Some(e) if done == 0 => Err(e),
        Some(e) => Err(also(e, kept)),
        None if done < total => {
            reporter.info(&format!("asked to stop: {kept}"));
            Ok(ExitCode::from(signals.code()))
        }
        None => {
            reporter.info(&format!("{total} samples in {}", args.out.display()));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What is scored, and who is told.
struct Scoring<'a> {
    m: &'a model::Loaded,
    items: &'a [Item],
    micro: usize,
    signals: &'a Signals,
    reporter: &'a Reporter,
}

impl Scoring<'_> {
    /// How many samples an earlier process has done: their lines are in `partial`, which holds no others then. The last of them
    /// are computed again, which tells whether they are of these weights.
    fn go_on(&self, partial: &mut Partial) -> Result<usize> {
        let mut kept = partial.kept(self.items)?;
        // Samples of one pass are kept together: their padding is a matter of all of them.
        if kept.len() < self.items.len() {
            kept.truncate(kept.len() / self.micro * self.micro);
        }
        let path = partial.path().display().to_string();
        let last = kept.len().saturating_sub(1) / self.micro * self.micro;
        if !kept.is_empty() && lines(self.m, &self.items[last..kept.len()])? != kept[last..] {
            self.reporter.warn(&format!("{path} holds scores of another model: it is begun again"));
            kept.clear();
        }
        partial.restart(&self.items[..kept.len()], &kept)?;
        if !kept.is_empty() {
            let (n, total) = (kept.len(), self.items.len());
            self.reporter.info(&format!("{path} holds {n} of {total} samples: it goes on from there"));
        }
        Ok(kept.len())
    }

    /// Scores the samples behind the first `from`, hands their lines to `put`, and returns how many are done in all; and what
    /// went wrong with the next ones, where the lines before it are worth to be kept.
    fn go(
        &self,
        from: usize,
        mut put: impl FnMut(&[Item], Vec<String>) -> Result<()>,
    ) -> Result<(usize, Option<Error>)> {
        let progress = self.reporter.progress("samples", self.items.len());
        progress.skip(from);
        let _deferred = self.signals.defer("finishing the samples at hand; the lines so far are kept");
        let mut done = from;
        for items in self.items[from..].chunks(self.micro) {
            if self.signals.asked() {
                break;
            }
            match lines(self.m, items) {
                Ok(lines) => put(items, lines)?,
                Err(e) => return Ok((done, Some(e))),
            }
            done += items.len();
            progress.inc(items.len());
        }
        Ok((done, None))
    }
}

/// The lines of some samples.
fn lines(m: &model::Loaded, items: &[Item]) -> Result<Vec<String>> {
    let pixels = load_pixels(items, m.assembly.images.as_ref())?;
    let samples: Vec<_> = items.iter().flat_map(Item::samples).collect();
    let batch = collate(&samples, &pixels)?;
    let (lp, _) = m.vlm.forward(&batch, Mode::default())?;
    let all = lp.logps()?;
    finite_logps(&all, &samples)?;
    let (mut at, mut out) = (0, Vec::new());
    for s in samples {
        let logps = &all[at..at + s.targets()];
        at += logps.len();
        let loss = -logps.iter().sum::<f64>() / logps.len() as f64;
        let line = Line { id: &s.id, loss, label_tokens: logps.len(), logps };
        out.push(serde_json::to_string(&line).with_context(|| &s.id)?);
    }
    Ok(out)
}
