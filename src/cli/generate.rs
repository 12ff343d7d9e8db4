//! `adfreeze generate`: the answer goes to stdout as it comes.

use super::{device, model};
use crate::bail;
use crate::data::{Item, Picture, Sample, load_pixels};
use crate::error::{Result, near};
use crate::pipeline::signals::{End, Signals};
use crate::report::Reporter;
use crate::train::collate::collate;
use crate::train::generate::{Sampling, fits, generate};
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// A picture; may be given several times.
    #[arg(long)]
    image: Vec<PathBuf>,
    /// The question; `<image>` says where the pictures stand (default: in front).
    #[arg(long)]
    prompt: String,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample from the smallest set of tokens with this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    #[arg(long, default_value_t = 42)]
    seed: u64,
    #[arg(long, default_value_t = 256, value_parser = super::count(1..=1_000_000))]
    max_new_tokens: usize,
    #[command(flatten)]
    pictures: model::Pictures,
    #[command(flatten)]
    compute: device::Args,
}

impl Args {
    /// Is a run asked, and not a model?
    pub fn of_run(&self) -> bool {
        self.model.of_run()
    }
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    if !(0.0..=1.0).contains(&args.top_p)
        || args.top_p == 0.0
        || !(args.temperature >= 0.0 && args.temperature.is_finite())
    {
        bail!("--temperature {} --top-p {}", args.temperature, args.top_p; "a temperature of 0 or more, and 0 < top-p ≤ 1")
    }
    // Ends by the signal itself, in a container's first process too; what is written so far stands.
    Signals::listen(End::BySignal, |_| ())?;
    if let Some(gone) = args.image.iter().find(|p| !p.exists()) {
        bail!("there is no image {}", gone.display(); "{}", near::path_hint(gone, "give the path of a PNG or JPEG to --image"))
    }
    let m = args.model.load(&args.compute, reporter)?;
    let encoder = &m.assembly.encoder;
    let look = args.pictures.of(&m, reporter)?;
    let pictures: Vec<Picture> = args.image.iter().map(|p| Picture::new(p.clone(), &look)).collect();
    let (ids, images) = encoder.prompt(&args.prompt, &pictures, m.template)?;
    let how = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        max_new_tokens: args.max_new_tokens,
        max_positions: args.model.max_seq_len(),
    };
    fits(&m.vlm, ids.len(), &how)?;
    m.assembly.generation.not_built.iter().for_each(|what| {
        reporter.warn(&format!(
            "generation_config.json says {what}, which is not built: transformers' text may be another"
        ));
    });
    let labels = vec![crate::data::IGNORE; ids.len()];
    let item = Item::Sample(Sample { id: "--image".into(), ids, labels, images, category: None, absent: Vec::new() });
    let pixels = load_pixels([&item], m.assembly.images.as_ref())?;
    let samples: Vec<&Sample> = item.samples().collect();
    let batch = collate(&samples, &pixels)?;
    // A token may be part of a character: print what the text has grown by.
    let (mut out, mut shown) = (super::stdout::Stdout::lock(), String::new());
    let mut so_far = Vec::new();
    let mut result = Ok(());
    generate(&m.vlm, &batch, encoder.eos_ids(), how, |t| {
        so_far.push(t);
        let mut print = || -> Result<()> {
            let text = encoder.decode(&so_far)?;
            if !text.ends_with('\u{fffd}') && text.starts_with(&shown) {
                write!(out, "{}", &text[shown.len()..])?;
                out.flush()?;
                shown = text;
            }
            Ok(())
        };
        if result.is_ok() {
            result = print();
        }
    })?;
    result?;
    let text = encoder.decode(&so_far)?;
    writeln!(out, "{}", text.strip_prefix(&shown).unwrap_or(""))?;
    let (positions, taken) = how.positions(&m.vlm, batch.ids.len());
    let (own, cut) = (m.vlm.language.config.max_position_embeddings, taken + so_far.len() > positions);
    if so_far.len() < args.max_new_tokens && cut {
        reporter.warn(&match how.max_positions {
            Some(limit) => format!("the answer ends here because of --max-seq-len {limit}"),
            None => format!("the answer ends here because the language model has {positions} positions"),
        });
    }
    if taken + so_far.len() > own && positions > own {
        reporter.warn(&format!(
            "the answer goes beyond the {own} positions that the language model was made for (max_position_embeddings)"
        ));
    }
    Ok(())
}
