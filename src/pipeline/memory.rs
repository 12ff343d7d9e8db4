//! How much of a forward pass a stage keeps for backward: what the recipe says, or (`auto`) the most that fits in the memory
//! that is free as the stage begins. The choice changes no bit of what is computed.

use super::state::State;
use crate::bail;
use crate::data::{Dataset, Plan};
use crate::error::Result;
use crate::model::params::Module;
use crate::model::segment::Kept;
use crate::model::vlm::{Load, Vlm};
use crate::ops::host;
use crate::optim::AdamW;
use crate::report::{human, peak_memory_bytes, reset_peak_memory};
use crate::spec::{Activations, Stage};
use candle_core::Device;
use std::collections::{BTreeMap, BTreeSet};

/// Samples of a stage that its largest micro-batch is looked for among, if an epoch has no more: a stage may have steps without
/// number.
const LOOKED_AT: usize = 1_000_000;

/// The steps' micro-batches that can be the largest: for each number of pictures the one with the most tokens. `soft` tokens stand
/// in front of every sequence, and of every picture in one.
pub fn loads(data: &Dataset, plan: &Plan, steps: std::ops::Range<usize>, micro: usize, soft: [usize; 2]) -> Vec<Load> {
    let [text, picture] = soft;
    let mut most: BTreeMap<usize, usize> = BTreeMap::new();
    let looked_at = LOOKED_AT.max(data.items.len()).div_ceil(plan.global()).max(1);
    for step in steps.take(looked_at) {
        for part in plan.step(step).chunks(micro.max(1)) {
            let pictures: BTreeSet<_> = part.iter().flat_map(|i| data.items[*i].images()).collect();
            let tokens: usize = part
                .iter()
                .flat_map(|i| data.items[*i].samples())
                .map(|s| s.ids.len() + text + picture * s.images.len())
                .sum();
            let pieces = pictures.iter().map(|i| i.pieces()).sum();
            let sum = most.entry(pieces).or_insert(0);
            *sum = tokens.max(*sum);
        }
    }
    most.into_iter().map(|(pictures, tokens)| Load { pictures, tokens }).collect()
}

/// Bytes of a gradient's element.
const GRADIENT: u64 = 4;

/// [`choose`] for an entered stage whose micro-batches are `loads`, by `free` bytes of memory, or by those that are free now on the
/// model's device.
pub fn of_stage(
    stage: &Stage,
    state: &mut State,
    loads: &[Load],
    optimizer: &AdamW,
    free: Option<u64>,
) -> Result<(Kept, Option<String>)> {
    let gradients = state.vlm.trainable().values().map(|t| GRADIENT * t.elem_count() as u64).sum::<u64>();
    let device = state.vlm.language.device();
    let training = gradients + optimizer.bytes_to_come(device);
    let chosen = choose(stage.activations, &state.vlm, loads, training, || {
        free.map_or_else(|| free_memory(device), |free| Ok(Some(free)))
    })?;
    // Where the run is to be here, not on the machine that `check` is asked about.
    if let (None, Some(free)) = (free, free_memory(device)?) {
        let largest = loads.iter().map(|l| step_bytes(&state.vlm, *l, chosen.0)).collect::<Result<Vec<_>>>()?;
        hopeless(largest.into_iter().max().unwrap_or(0) + training, free)?;
    }
    Ok(chosen)
}

/// Refuses a step that needs several times the free memory, before an allocation of it ends the process without a word; the estimate
/// may be wrong by less.
fn hopeless(need: u64, free: u64) -> Result<()> {
    const TIMES: u64 = 4;
    if need / TIMES > free {
        bail!("a step needs about {} of memory, and {} are free", human::bytes(need), human::bytes(free);
            "set batch.micro, so that a pass takes fewer samples at once; or train less: a smaller rank, fewer layers, \
             optimizer = {{ adamw = {{ moments = \"8bit\" }} }}");
    }
    Ok(())
}

/// What a stage keeps, and for `auto` the line that says so. `training` counts the bytes of gradients and of moments that a step
/// will allocate.
pub fn choose(
    activations: Activations,
    vlm: &Vlm,
    loads: &[Load],
    training: u64,
    free: impl FnOnce() -> Result<Option<u64>>,
) -> Result<(Kept, Option<String>)> {
    Ok(match activations {
        Activations::None => (Kept::All, None),
        Activations::Minimal => (Kept::Minimal, None),
        Activations::Recompute => (Kept::Input, None),
        Activations::Auto => {
            let free = free()?;
            let mut needs = [(Kept::All, "none", 0), (Kept::Minimal, "minimal", 0), (Kept::Input, "recompute", 0)];
            for (kept, _, need) in &mut needs {
                for load in loads {
                    *need = step_bytes(vlm, *load, *kept)?.max(*need);
                }
                *need += training;
            }
            let Some(free) = free else {
                return Ok((
                    Kept::Minimal,
                    Some("activations: minimal (how much memory is free cannot be told)".into()),
                ));
            };
            // A tenth stays free: the estimate leaves out what is small, and other processes grow.
            let fits = |(_, _, need): &&(Kept, &str, u64)| *need <= free - free / 10;
            let (kept, name, need) = *needs.iter().find(fits).unwrap_or(&needs[2]);
            let line = format!("activations: {name} ({} of {} free)", human::bytes(need), human::bytes(free));
            (kept, Some(line))
        }
    })
}

/// An estimate of a step's memory for this micro-batch: what the layers keep, and, twice, what the largest of them takes while it
/// runs: its activations and their gradients.
fn step_bytes(vlm: &Vlm, load: Load, kept: Kept) -> Result<u64> {
    Ok((vlm.kept_bytes(load, kept)? + 2 * vlm.largest_layer(load)?) as u64)
}

/// Free memory of a device in bytes: on a GPU what the driver and the pool have left; on the CPU what the system calls
/// available, or what is left up to the lowest limit of this process's cgroups. None where the system does not tell.
pub fn free_memory(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(d) => Ok(Some(crate::ops::cuda::free_memory(d)?)),
        Device::Cpu => Ok(host::free_memory()),
        _ => Ok(None),
    }
}

/// The most memory in bytes that was in use since [`reset_peak`], or since the process began: of a GPU's pool; on the CPU resident
/// of the process. None where the system does not tell.
pub fn peak(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(d) => Ok(Some(crate::ops::cuda::meter::peak_memory(d)?)),
        _ => Ok(peak_memory_bytes()),
    }
}

/// Lets [`peak`] count from what is in use now, where the system does so.
pub fn reset_peak(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(d) => crate::ops::cuda::meter::reset_peak(d),
        _ => {
            reset_peak_memory();
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
