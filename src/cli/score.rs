//! `adfreeze score`: one JSON line a sample, in the order of the file.

use super::{device, model};
use crate::checkpoint::atomic;
use crate::data::{Dataset, Item, load_pixels};
use crate::error::{Context, Result};
use crate::model::vlm::Mode;
use crate::recipe::schema::Data;
use crate::report::Reporter;
use crate::train::collate::collate;
use crate::train::step::finite_logps;
use std::path::PathBuf;

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
    /// One JSON object a line: id, loss, label_tokens, logps.
    #[arg(long)]
    out: PathBuf,
    /// Samples a forward pass.
    #[arg(long, default_value_t = 8)]
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

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    let m = args.model.load(&args.compute, reporter)?;
    let data = Data { path: args.data.clone(), images: args.images.clone(), ..args.pictures.of(&m, reporter)? };
    let set = Dataset::conversations(&[data], &m.assembly.encoder, m.template)?;
    m.assembly.encoder.notices().iter().for_each(|w| reporter.warn(w));
    atomic::write_out(&args.out, |out| {
        for items in set.items.chunks(args.micro.max(1)) {
            let pixels = load_pixels(items, m.assembly.images.as_ref())?;
            let samples: Vec<_> = items.iter().flat_map(Item::samples).collect();
            let batch = collate(&samples, &pixels)?;
            let (lp, _) = m.vlm.forward(&batch, Mode::default())?;
            let all = lp.logps()?;
            finite_logps(&all, &samples)?;
            let mut at = 0;
            for s in samples {
                let logps = &all[at..at + s.targets()];
                at += logps.len();
                let loss = -logps.iter().sum::<f64>() / logps.len() as f64;
                let line = Line { id: &s.id, loss, label_tokens: logps.len(), logps };
                serde_json::to_writer(&mut *out, &line).with_context(|| &s.id)?;
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    })?;
    reporter.info(&format!("{} samples in {}", set.items.len(), args.out.display()));
    Ok(())
}
