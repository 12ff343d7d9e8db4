//! A linear layer with any number of low-rank updates on top: one type for frozen, LoRA (Hu et al. 2021), DoRA (Liu et al.
//! 2024), stacked adapters and full fine-tuning. Backward computes what trains, plus dX if asked for, and nothing else. Layers
//! that share their input (q, k and v; gate and up) run together, so that updates of one kind pass over it once.
//!
//! An update with a magnitude (DoRA) acts on what stands before it, as several active adapters of PEFT's do: with its own product
//! L = s·x·Aᵀ·Bᵀ, y becomes b + g∘(y − b + L), g its gain (`model::dora`). Under dropout y becomes y + (g − 1)∘(x̃·Wᵀ) + g∘L, both
//! of x̃ = drop(x). Either way that is y + L + (g − 1)∘z, where z is what the gain multiplies.

mod scaled;

use super::dora::Magnitude;
use super::init::Place;
use super::params::{Grads, Param, module};
use super::segment::Side;
use crate::bail;
use crate::error::Result;
use crate::ops::matmul::{Mat, add_, linear, matmul, matmul_add, sum_rows};
use crate::ops::random::{Key, dropout};
use crate::ops::{bytes, lora};
use candle_core::Tensor;
use scaled::{Dropped, Scaled, scale, unscale};

/// `y = x·Wᵀ + b + Σ s·(drop(x)·Aᵀ)·Bᵀ`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    pub deltas: Vec<LowRank>,
}

/// One low-rank update of a linear layer.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// The adapter that it belongs to.
    pub adapter: String,
    /// `[rank, in]`.
    pub a: Param,
    /// `[out, rank]`.
    pub b: Param,
    /// The rows' lengths, if the update is DoRA's.
    pub magnitude: Option<Magnitude>,
    /// alpha/rank, or alpha/√rank.
    pub scale: f64,
    /// Probability of zeroing an input of A while training.
    pub dropout: f64,
}

impl LowRank {
    fn trains(&self) -> bool {
        self.a.trainable || self.b.trainable || self.magnitude.as_ref().is_some_and(|m| m.param.trainable)
    }

    /// Can the two go through one launch?
    fn alike(&self, other: &Self) -> bool {
        let kind =
            |d: &Self| (d.a.value.dims().first().copied(), d.scale, d.dropout, d.trains(), d.magnitude.is_some());
        kind(self) == kind(other)
    }

    /// What zeroes inputs of A in this pass, the same in forward and backward.
    fn mask(&self, side: &Side) -> lora::Mask {
        let key = side.dropout.filter(|_| self.dropout > 0.0 && self.trains());
        key.map(|key| (key.child(&self.a.name), self.dropout))
    }
}

/// What backward needs beside x of layers that ran together.
pub struct Saved(Vec<Ran>);

/// What a group's forward pass left.
struct Ran {
    group: Group,
    /// `drop(x)·Aᵀ` of the group's updates, one below the other.
    h: Tensor,
    /// Each member's, if their updates have magnitudes.
    scaled: Vec<Scaled>,
}

/// What [`backward_to_input`] leaves.
pub struct Rest {
    /// u of each group in which an A trains, laid out as h in [`Saved`].
    us: Vec<(Group, Tensor)>,
    /// dY as each layer's own product sees it.
    dy: Vec<Tensor>,
    dropped: Vec<Dropped>,
}

impl Saved {
    /// Bytes that it holds for the rows that passed; a gain, a few numbers for each output of a layer, is left out.
    pub fn bytes(&self) -> usize {
        let z = |r: &Ran| r.scaled.iter().filter_map(|s| s.z.as_ref()).map(bytes).sum::<usize>();
        self.0.iter().map(|r| bytes(&r.h) + z(r)).sum()
    }
}

/// The gradient of an input that one or several layers share: the first product is written, the others are added.
#[derive(Debug)]
pub enum InputGrad {
    /// Nobody asks for it.
    Unwanted,
    /// Asked for, nothing there yet.
    Empty,
    /// What has come together so far, `[N, in]`.
    Sum(Tensor),
}

impl InputGrad {
    /// No gradient yet, or none at all.
    pub fn new(wanted: bool) -> Self {
        if wanted { Self::Empty } else { Self::Unwanted }
    }

    /// Adds `A·B`.
    fn add_product(&mut self, a: Mat, b: Mat) -> Result<()> {
        match self {
            Self::Unwanted => {}
            Self::Empty => *self = Self::Sum(matmul(a, b)?),
            Self::Sum(sum) => matmul_add(sum, 1.0, a, b)?,
        }
        Ok(())
    }

    /// Adds `drop(A·B)` to what is there.
    fn add_dropped(&mut self, (key, p): (Key, f64), a: Mat, b: Mat) -> Result<()> {
        let Self::Sum(sum) = self else { return Ok(()) };
        add_(sum, 1.0, &dropout(key, &matmul(a, b)?, p)?)
    }

    /// The sum of what every layer has added.
    pub fn sum(&self) -> Result<&Tensor> {
        match self {
            Self::Sum(t) => Ok(t),
            _ => bail!("the gradient of an input was read before a layer gave one"),
        }
    }

    /// The sum, if it was asked for.
    pub fn take(self) -> Option<Tensor> {
        if let Self::Sum(t) = self { Some(t) } else { None }
    }
}

impl Linear {
    /// Does backward need the layer's input?
    pub fn needs_input(&self) -> bool {
        self.weight.trainable || self.deltas.iter().any(LowRank::trains)
    }

    /// `x` `[N, in]` → `[N, out]`.
    pub fn forward(&self, x: &Tensor, side: &Side) -> Result<(Tensor, Saved)> {
        let ([y], saved) = forward_all([self], x, side)?;
        Ok((y, saved))
    }

    /// [`backward_all`] of this layer alone.
    pub fn backward(
        &self,
        saved: &Saved,
        x: Option<&Tensor>,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
        dx: &mut InputGrad,
    ) -> Result<()> {
        backward_all(&[self], saved, x, &[dy], side, grads, dx)
    }

    /// Bytes a token that [`Saved`] takes for this layer.
    pub fn saved_bytes(&self) -> Result<usize> {
        let mut numbers = 0;
        for d in &self.deltas {
            let magnitude = d.magnitude.as_ref().filter(|m| m.param.trainable);
            numbers += d.a.value.dim(0)? + magnitude.map_or(Ok(0), |m| m.param.value.dim(0))?;
        }
        Ok(numbers * self.place().dtype.size_in_bytes())
    }

    /// Where and in which type it computes.
    pub fn place(&self) -> Place {
        let w = self.weight.compute();
        Place { device: w.device().clone(), dtype: w.dtype() }
    }

    /// `(out, in)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.weight.value.dims2()?)
    }

    /// The layer's name: its weight's without `.weight`.
    pub fn name(&self) -> &str {
        self.weight.name.strip_suffix(".weight").unwrap_or(&self.weight.name)
    }
}

/// `x` `[N, in]` → `[N, out]` of each layer.
pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor, side: &Side) -> Result<([Tensor; N], Saved)> {
    let (y, saved) = forward_list(&layers, x, side)?;
    match y.try_into() {
        Ok(y) => Ok((y, saved)),
        Err(y) => bail!("{N} layers gave {} outputs", y.len()),
    }
}

/// [`forward_all`] of any number of layers.
pub fn forward_list(layers: &[&Linear], x: &Tensor, side: &Side) -> Result<(Vec<Tensor>, Saved)> {
    let mut y = Vec::with_capacity(layers.len());
    for l in layers {
        y.push(linear(x, l.weight.compute(), l.bias.as_ref().map(Param::compute))?);
    }
    let mut saved = Vec::new();
    for group in groups(layers, x, side)? {
        let updates = group.updates(layers, side);
        let h = lora::down(x, &updates)?;
        lora::up_(&group.of(&y), &h, &updates)?;
        let scaled = scale(layers, &group, x, &h, &updates, &mut y)?;
        saved.push(Ran { group, h, scaled });
    }
    Ok((y, Saved(saved)))
}

/// Adds the layers' gradients to `grads`, and the gradient of their common input to `dx` if it is wanted.
///
/// `x` is that input; it is read only if one of them [`Linear::needs_input`].
pub fn backward_all(
    layers: &[&Linear],
    saved: &Saved,
    x: Option<&Tensor>,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
    dx: &mut InputGrad,
) -> Result<()> {
    let rest = backward_to_input(layers, saved, dy, side, grads, dx)?;
    backward_from_input(layers, rest, x, side, grads)
}

/// The part of [`backward_all`] that does without the input, for who rebuilds it with the help of dX.
pub fn backward_to_input(
    layers: &[&Linear],
    saved: &Saved,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
    dx: &mut InputGrad,
) -> Result<Rest> {
    let seen = unscale(layers, saved, dy, side, grads)?;
    let mut us = Vec::with_capacity(saved.0.len());
    for (Ran { group, h, .. }, dy) in saved.0.iter().zip(&seen.groups) {
        let mut db = Vec::with_capacity(group.0.len());
        for d in group.deltas(layers) {
            db.push(if d.b.trainable { Some(grads.slot(&d.b)?.clone()) } else { None });
        }
        let trains = group.deltas(layers).any(LowRank::trains);
        // u [N, rank] is all that A and x see of dY.
        let u = (trains || !matches!(dx, InputGrad::Unwanted)).then(|| {
            let (dy, db): (Vec<_>, Vec<_>) = (dy.iter().collect(), db.iter().map(Option::as_ref).collect());
            lora::back(&dy, h, &group.updates(layers, side), &db)
        });
        us.push(u.transpose()?);
    }
    for (i, l) in layers.iter().enumerate() {
        if let Some(b) = l.bias.as_ref().filter(|b| b.trainable) {
            grads.add(&b.name, sum_rows(dy[i])?)?;
        }
        dx.add_product(Mat::N(&seen.layers[i]), Mat::N(l.weight.compute()))?;
        for d in seen.dropped.iter().filter(|d| d.layer == i) {
            dx.add_dropped(d.mask, Mat::N(&d.dy), Mat::N(l.weight.compute()))?;
        }
        // A group's updates meet dX once, after the product of its last layer.
        for (Ran { group, .. }, u) in saved.0.iter().zip(&us).filter(|(r, _)| r.group.last() == Some(i)) {
            if let (InputGrad::Sum(dx), Some(u)) = (&*dx, u) {
                lora::add_dx_(dx, u, &group.updates(layers, side))?;
            }
        }
    }
    let mut rest = Rest { us: Vec::new(), dy: seen.layers, dropped: seen.dropped };
    for (ran, u) in saved.0.iter().zip(us) {
        if let (Some(u), true) = (u, ran.group.deltas(layers).any(|d| d.a.trainable)) {
            rest.us.push((ran.group.clone(), u));
        }
    }
    Ok(rest)
}

/// The rest of [`backward_all`]: the gradients that `x`, the input, is a factor of.
pub fn backward_from_input(
    layers: &[&Linear],
    rest: Rest,
    x: Option<&Tensor>,
    side: &Side,
    grads: &mut Grads,
) -> Result<()> {
    let Some(x) = x else { return Ok(()) };
    for (l, dy) in layers.iter().zip(&rest.dy).filter(|(l, _)| l.weight.trainable) {
        grads.add_product(&l.weight, 1.0, Mat::T(dy), Mat::N(x))?;
    }
    for d in rest.dropped.iter().filter(|d| layers[d.layer].weight.trainable) {
        let x = dropout(d.mask.0, x, d.mask.1)?;
        grads.add_product(&layers[d.layer].weight, 1.0, Mat::T(&d.dy), Mat::N(&x))?;
    }
    for (group, u) in &rest.us {
        let mut da = Vec::with_capacity(group.0.len());
        for d in group.deltas(layers) {
            da.push(if d.a.trainable { Some(grads.slot(&d.a)?.clone()) } else { None });
        }
        let da: Vec<_> = da.iter().map(Option::as_ref).collect();
        lora::add_da(&da, u, x, &group.updates(layers, side))?;
    }
    Ok(())
}

/// Updates that run together: the index of each one's layer, in rising order, and its index among that layer's updates.
#[derive(Debug, Clone)]
struct Group(Vec<(usize, usize)>);

impl Group {
    fn deltas<'a>(&'a self, layers: &'a [&Linear]) -> impl Iterator<Item = &'a LowRank> {
        self.0.iter().map(|(i, j)| &layers[*i].deltas[*j])
    }

    fn updates<'a>(&'a self, layers: &'a [&Linear], side: &Side) -> Vec<lora::Update<'a>> {
        let of =
            |d: &'a LowRank| lora::Update { a: d.a.compute(), b: d.b.compute(), scale: d.scale, mask: d.mask(side) };
        self.deltas(layers).map(of).collect()
    }

    /// Each member's of what there is one for each layer.
    fn of<'a, T: std::borrow::Borrow<Tensor>>(&self, each: &'a [T]) -> Vec<&'a Tensor> {
        self.0.iter().map(|(i, _)| each[*i].borrow()).collect()
    }

    /// The last layer that has a member.
    fn last(&self) -> Option<usize> {
        self.0.last().map(|(i, _)| *i)
    }
}

/// The layers' updates of this pass, those of one kind together where that gains anything. A layer's own updates keep their order,
/// and no two of them share a group.
fn groups(layers: &[&Linear], x: &Tensor, side: &Side) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (i, l) in layers.iter().enumerate() {
        let mut from = 0;
        for (j, d) in l.deltas.iter().enumerate().filter(|(_, d)| !side.skips(d)) {
            let joins = |g: &Group| g.0.first().is_some_and(|(i, j)| layers[*i].deltas[*j].alike(d));
            let open = groups.iter().skip(from).position(joins).map(|at| at + from);
            match open.filter(|_| layers.len() > 1) {
                Some(at) if lora::gains_from_groups(d.a.value.dim(0)?, x)? => {
                    groups[at].0.push((i, j));
                    from = at + 1;
                }
                _ => {
                    groups.push(Group(vec![(i, j)]));
                    from = groups.len();
                }
            }
        }
    }
    Ok(groups)
}

module!(Linear: weight, bias, deltas);
module!(LowRank: a, b, magnitude);
