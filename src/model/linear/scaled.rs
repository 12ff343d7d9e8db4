//! What magnitudes (DoRA, `model::dora`) do to the outputs of linear layers, and backward through it.

use super::{Group, Linear, Saved};
use crate::error::Result;
use crate::model::dora::Gain;
use crate::model::params::Grads;
use crate::model::segment::Side;
use crate::ops::lora;
use crate::ops::matmul::{Mat, matmul};
use crate::ops::random::{Key, dropout};
use candle_core::Tensor;

/// How a magnitude scaled an output.
pub(super) struct Scaled {
    pub(super) gain: Gain,
    /// What it multiplied, `[N, out]`, if the magnitude trains.
    pub(super) z: Option<Tensor>,
}

/// A second product of a layer: that of its dropped input, which a magnitude scales under dropout.
pub(super) struct Dropped {
    pub(super) layer: usize,
    pub(super) mask: (Key, f64),
    /// (g − 1)∘dY.
    pub(super) dy: Tensor,
}

/// Scales the outputs `y` to which a group's updates, of hidden rows `h`, have been added, if they have magnitudes.
pub(super) fn scale(
    layers: &[&Linear],
    group: &Group,
    x: &Tensor,
    h: &Tensor,
    updates: &[lora::Update],
    y: &mut [Tensor],
) -> Result<Vec<Scaled>> {
    let (n, mut out) = (x.dim(0)?, Vec::new());
    for (k, (i, j)) in group.0.iter().enumerate() {
        let (l, u) = (layers[*i], &updates[k]);
        let Some(m) = &l.deltas[*j].magnitude else { continue };
        let gain = m.gain(&l.weight, u.a, u.b, u.scale)?;
        let z = match (u.mask, &l.bias) {
            (Some((key, p)), _) => {
                let z = matmul(Mat::N(&dropout(key, x, p)?), Mat::T(l.weight.compute()))?;
                lora::up_(&[&z], &h.narrow(0, k * n, n)?, &updates[k..=k])?;
                z
            }
            (None, Some(b)) => y[*i].broadcast_sub(b.compute())?,
            (None, None) => y[*i].clone(),
        };
        y[*i] = gain.apply(&y[*i], &z)?;
        out.push(Scaled { gain, z: m.param.trainable.then_some(z) });
    }
    Ok(out)
}

/// dY as each part of the layers sees it.
pub(super) struct Seen {
    /// Of each group, its members'.
    pub(super) groups: Vec<Vec<Tensor>>,
    /// Of each layer's own product.
    pub(super) layers: Vec<Tensor>,
    pub(super) dropped: Vec<Dropped>,
}

/// Takes dY back through the gains, the last update's first, and adds the magnitudes' gradients.
pub(super) fn unscale(
    layers: &[&Linear],
    saved: &Saved,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
) -> Result<Seen> {
    let whole = dy.iter().map(|t| (*t).clone()).collect();
    let mut seen = Seen { groups: Vec::new(), layers: whole, dropped: Vec::new() };
    for ran in saved.0.iter().rev() {
        let mut own = Vec::with_capacity(ran.group.0.len());
        for (k, (i, j)) in ran.group.0.iter().enumerate() {
            let (d, dy) = (&layers[*i].deltas[*j], &mut seen.layers[*i]);
            let (Some(m), Some(s)) = (&d.magnitude, ran.scaled.get(k)) else {
                own.push(dy.clone());
                continue;
            };
            if let Some(z) = &s.z {
                grads.add(&m.param.name, s.gain.grad(dy, z)?)?;
            }
            let more = s.gain.more(dy)?;
            let scaled = (&more + &*dy)?;
            match d.mask(side) {
                Some(mask) => seen.dropped.push(Dropped { layer: *i, mask, dy: more }),
                None => *dy = scaled.clone(),
            }
            own.push(scaled);
        }
        seen.groups.push(own);
    }
    seen.groups.reverse();
    Ok(seen)
}
