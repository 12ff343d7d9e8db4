//! `adfreeze score`: one JSON line a sample, in the order of the file.

use super::{device, model};
use crate::checkpoint::atomic;
use crate::data::{Dataset, Item, load_pixels};
use crate::error::{Context, Result};
use crate::model::vlm::Mode;
use crate::pipeline::pictures::Pictures;
use crate::pipeline::positions;
use crate::pipeline::signals::{End, Signals};
use crate::pipeline::steps::also;
use crate::recipe::schema::Data;
use crate::report::Reporter;
use crate::train::collate::collate;
use crate::train::step::finite_logps;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

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
    let (total, progress) = (set.items.len(), reporter.progress("samples", set.items.len()));
    let (mut done, mut failed) = (0, None);
    atomic::write_out(&args.out, |out| {
        let _deferred = signals.defer("finishing the samples at hand; the lines so far are kept");
        for items in set.items.chunks(args.micro) {
            if signals.asked() {
                break;
            }
            match lines(&m, items) {
                Ok(lines) => out.write_all(&lines)?,
                // The lines before it are worth to be kept.
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
            out.flush()?;
            done += items.len();
            progress.inc(items.len());
        }
        failed.take_if(|_| done == 0).map_or(Ok(()), Err)
    })?;
    drop(progress);
    let kept = format!("{done} of {total} samples are in {}", args.out.display());
    match failed {
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

/// The lines of some samples.
fn lines(m: &model::Loaded, items: &[Item]) -> Result<Vec<u8>> {
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
        serde_json::to_writer(&mut out, &line).with_context(|| &s.id)?;
        out.push(b'\n');
    }
    Ok(out)
}
