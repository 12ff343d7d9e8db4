//! What a recipe allows but rarely means, told by `check` and before step 1 of a run: pairs that teach nothing, rates that never
//! rise, figures that would not say what they seem to.

use crate::bail;
use crate::data::{Dataset, Item, TextEncoder};
use crate::error::Result;
use crate::optim::AdamW;
use crate::spec::{Eval, Metric, Pictures};
use std::collections::BTreeSet;

/// Samples that a message names.
const NAMED: usize = 5;

/// Peaks below this move no weight of ordinary size: an update is about as large as the rate, and f32 rounds it away.
const LOST_LR: f64 = 1e-12;

/// Of a stage. An error if all of its pairs have two answers of the same tokens.
pub fn of_stage(data: &Dataset, encoder: &TextEncoder, optimizer: &AdamW) -> Result<Vec<String>> {
    let mut out = rates(optimizer);
    out.extend(ties(data, encoder, "from which nothing can be learnt")?);
    Ok(out)
}

/// Of an evaluation. An error if no figure of it could tell anything.
pub fn of_evaluation(eval: &Eval, data: &Dataset, encoder: &TextEncoder) -> Result<Vec<String>> {
    let files: BTreeSet<_> = data.images().into_iter().map(|i| &i.path).collect();
    if files.is_empty() && !eval.pictures.is_empty() {
        bail!("`pictures` asks for figures without the right pictures, but no sample shows one"; "drop `pictures`")
    }
    if files.len() == 1 && eval.pictures.contains(&Pictures::Shuffled) {
        bail!("pictures = [\"shuffled\"] needs two pictures, and all samples show {}", files.iter().map(|f| f.display().to_string()).collect::<String>();
            "drop `shuffled`, or hold out samples with other pictures")
    }
    let mut out = Vec::new();
    if eval.metric == Metric::Preference {
        out.extend(ties(data, encoder, "which count half")?);
    }
    let cut = data.items.iter().filter(|i| i.samples().any(|s| encoder.is_cut(s))).count();
    if cut > 0 {
        let (n, max) = (data.items.len(), encoder.max_seq_len());
        out.push(format!(
            "{cut} of {n} samples fill max_seq_len = {max}, where longer ones are cut (model.truncate): what lies behind is not measured"
        ));
    }
    Ok(out)
}

/// Pairs whose answers are the same tokens, by name and cause.
fn ties(data: &Dataset, encoder: &TextEncoder, so: &str) -> Result<Option<String>> {
    let ties: Vec<&Item> = data.items.iter().filter(|i| i.is_tie()).collect();
    let (cut, same): (Vec<&Item>, Vec<&Item>) =
        ties.iter().copied().partition(|i| i.samples().any(|s| encoder.is_cut(s)));
    let why = |items: &[&Item], cause: &str| {
        let names: Vec<&str> = items.iter().take(NAMED).map(|i| i.id()).collect();
        let more = if items.len() > NAMED { format!(" and {} more", items.len() - NAMED) } else { String::new() };
        (!items.is_empty()).then(|| format!("{}{more} ({cause})", names.join(", ")))
    };
    let causes = [
        why(&same, "the texts are equal, or differ in what the tokenizer drops"),
        why(&cut, &format!("cut at max_seq_len = {} before they differ", encoder.max_seq_len())),
    ];
    let causes = causes.into_iter().flatten().collect::<Vec<_>>().join("; ");
    let (n, all) = (ties.len(), data.items.len());
    if n == 0 {
        return Ok(None);
    }
    if n == all {
        bail!("in all {all} pairs the chosen and the rejected answer are the same tokens: {causes}";
            "{}", if same.is_empty() { "raise model.max_seq_len" } else { "give each pair two answers that differ" })
    }
    Ok(Some(format!("{n} of {all} pairs have two answers of the same tokens, {so}: {causes}")))
}

/// Warm-ups that reach no peak, peaks that move nothing, and weight decay that does more than shrink.
fn rates(optimizer: &AdamW) -> Vec<String> {
    let mut out = Vec::new();
    for (i, (group, schedule)) in optimizer.schedules().enumerate() {
        let (name, warmup, total) = (&group.name, schedule.warmup(), schedule.total());
        let [low, high] = group.peaks().map(|p| p * schedule.highest());
        if warmup >= total {
            out.push(format!(
                "group `{name}` warms up for {warmup} steps, no fewer than the stage has ({total}): its learning rate rises to {high:.1e} of {:e} in the last step",
                group.peaks()[1]
            ));
        }
        if low < LOST_LR {
            let why = if group.factors[0] < group.factors[1] { " by layer_decay" } else { "" };
            out.push(format!(
                "group `{name}` has learning rates down to {low:.1e}{why}; below {LOST_LR:e} f32 weights of usual size stay as they are"
            ));
        }
        let members = optimizer.groups().members().values().filter(|m| m.group == i);
        let decay = members.map(|m| m.factor * m.weight_decay).fold(0.0, f64::max);
        let shrink = decay * group.lr * schedule.highest();
        if shrink >= 1.0 {
            out.push(format!(
                "group `{name}` has a weight decay times learning rate of {shrink}: from 1 on, a step turns the sign of weights instead of shrinking them"
            ));
        }
    }
    out
}
