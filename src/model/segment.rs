//! The trunk as an explicit chain of segments: forward keeps what backward will need from the frontier on, backward
//! walks down to the frontier and stops there.

use super::linear::LowRank;
use super::params::{Grads, Module};
use super::visual::Visual;
use super::watch;
use crate::error::Result;
use crate::ops::random::Key;
use crate::ops::{attention, bytes};
use candle_core::{DType, Tensor};

/// What a segment keeps of its forward pass for backward; the gradients are the same to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kept {
    /// All that backward reads.
    All,
    /// All but the outputs of norms and activations, which backward makes again element by element.
    #[default]
    Minimal,
    /// The input alone: the segment runs again in backward.
    Input,
    /// Nothing, for no backward follows: below the frontier, and in passes without gradient.
    Nothing,
}

/// What all segments of a pass share beside the stream of activations.
#[derive(Debug, Clone)]
pub struct Side {
    /// The sequences that are packed into the rows.
    pub sequences: attention::Sequences,
    /// Cosines and sines of each row's position, `[N, hd/2]`; language model only.
    pub rope: Option<(Tensor, Tensor)>,
    /// Key of this pass's dropout masks; none outside training.
    pub dropout: Option<Key>,
    /// Leave out all adapters (the base model of a DPO reference).
    pub adapters_off: bool,
    /// Visual tokens that layers may read; language model only.
    pub visual: Option<Visual>,
}

impl Side {
    /// Side of sequences that stand one after the other, of the given lengths.
    pub fn packed(lengths: &[usize]) -> Self {
        let mut sequences = Vec::with_capacity(lengths.len());
        let mut at = 0;
        for n in lengths {
            sequences.push(attention::Segment::new(at..at + n, at..at + n));
            at += n;
        }
        Self { sequences: sequences.into(), rope: None, dropout: None, adapters_off: false, visual: None }
    }

    /// Is this update left out of the pass?
    pub fn skips(&self, _delta: &LowRank) -> bool {
        self.adapters_off
    }
}

/// One block of a backbone with its own backward.
pub trait Segment: Module {
    /// What backward needs.
    type Saved;

    /// The segment's name, e.g. `language.layers.3`.
    fn name(&self) -> &str;

    /// What this segment keeps, if it is not what the pass says.
    fn policy(&self) -> Option<Kept>;

    /// `x` `[N, D]` → `[N, D]`. What it returns for backward holds all that `kept` says, or more.
    fn forward(&self, x: &Tensor, side: &Side, kept: Kept) -> Result<(Tensor, Self::Saved)>;

    /// Bytes of what a forward pass returned for backward.
    fn bytes(saved: &Self::Saved) -> usize;

    /// Bytes a row of x that a recorded pass keeps of this segment, its input among them: [`Tape::bytes`] told beforehand.
    fn bytes_per_row(&self, kept: Kept) -> Result<usize>;

    /// Adds the gradients of what trains to `grads`; returns dX if `need_dx`. `dy` is the caller's own and may be overwritten.
    fn backward(
        &self,
        x: &Tensor,
        saved: Self::Saved,
        dy: Tensor,
        side: &Side,
        grads: &mut Grads,
        need_dx: bool,
    ) -> Result<Option<Tensor>>;
}

/// What a forward pass left for backward: from the frontier on, each segment's input and, if kept, its activations.
pub struct Tape<S: Segment> {
    frontier: usize,
    records: Vec<(Tensor, Option<S::Saved>)>,
}

impl<S: Segment> Tape<S> {
    /// Bytes that it keeps.
    pub fn bytes(&self) -> usize {
        self.records.iter().map(|(x, saved)| bytes(x) + saved.as_ref().map_or(0, S::bytes)).sum()
    }
}

/// Runs `segments` on `x`. Below `frontier` nothing is kept; at `segments.len()` nothing at all.
pub fn forward<S: Segment>(
    segments: &[S],
    mut x: Tensor,
    side: &Side,
    frontier: usize,
    kept: Kept,
) -> Result<(Tensor, Tape<S>)> {
    let mut records = Vec::new();
    for (i, s) in segments.iter().enumerate() {
        let kept = if i < frontier { Kept::Nothing } else { s.policy().unwrap_or(kept) };
        let (y, saved) = s.forward(&x, side, kept)?;
        watch::see(s.name(), &y)?;
        if i >= frontier {
            records.push((x, (kept != Kept::Input).then_some(saved)));
        }
        x = y;
    }
    Ok((x, Tape { frontier, records }))
}

/// Walks down to the frontier; returns the gradient of the chain's input if `need_dx`.
pub fn backward<S: Segment>(
    segments: &[S],
    tape: Tape<S>,
    mut dy: Tensor,
    side: &Side,
    grads: &mut Grads,
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let Tape { frontier, mut records } = tape;
    for (i, s) in segments.iter().enumerate().skip(frontier).rev() {
        let Some((x, saved)) = records.pop() else { break };
        let saved = match saved {
            Some(s) => s,
            None => s.forward(&x, side, Kept::All)?.1,
        };
        match s.backward(&x, saved, dy, side, grads, need_dx || i > frontier)? {
            Some(dx) => dy = dx,
            None => return Ok(None),
        }
    }
    Ok(need_dx.then_some(dy))
}

/// Bytes a row that recorded `segments` keep, each by its own policy or else by `kept`.
pub fn bytes_per_row<S: Segment>(segments: &[S], kept: Kept) -> Result<usize> {
    segments.iter().try_fold(0, |sum, s| Ok(sum + s.bytes_per_row(s.policy().unwrap_or(kept))?))
}

/// The output of a norm or an activation as it was kept, or made again if it is `needed`.
pub fn kept_or(kept: Option<Tensor>, needed: bool, again: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
    match kept {
        None if needed => again().map(Some),
        kept => Ok(kept),
    }
}

/// Numbers a row of the outputs that are kept of these widths, where backward `needs` them.
pub fn outputs_per_row(needs: [bool; 3], widths: [usize; 3]) -> usize {
    needs.iter().zip(widths).filter(|(needed, _)| **needed).map(|(_, width)| width).sum()
}

/// Bytes of a number in sums and statistics beside activations of `dtype`.
pub fn sum_bytes(dtype: DType) -> usize {
    dtype.size_in_bytes().max(DType::F32.size_in_bytes())
}

/// Index of the first segment that a backward pass must reach: the first that trains, 0 if something below needs the
/// gradient, `len` if nothing does.
pub fn frontier<S: Segment>(segments: &[S], below: bool) -> usize {
    if below { 0 } else { segments.iter().position(Module::trains).unwrap_or(segments.len()) }
}
