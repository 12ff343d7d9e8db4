//! Modules grafted into the layers of a backbone, on their stream of rows.
//!
//! An insert is an island (see [`super::island`]) that keeps its input alone and runs again in backward, whatever the layer
//! keeps: it is small beside the layer, and its graph would be the larger part of what stands in memory. Its parameters are
//! named `{place}.{kind}.{adapter}.…`, see [`super::role::Scope::adapter`].

pub mod bottleneck;
pub mod cross_attention;

use super::island::{self, Pass, Tape, Vars};
use super::params::{Grads, Module, module};
use super::segment::Side;
use crate::bail;
use crate::error::Result;
use crate::ops::attention::Sequences;
use crate::ops::bytes;
use crate::ops::embedding::gather;
use crate::spec::Sees;
use candle_core::Tensor;
use std::fmt::Debug;

/// What a kind of insert can do.
pub trait Insert: Module + Debug + Send + Sync {
    /// The adapter that it belongs to.
    fn adapter(&self) -> &str;

    /// Rows `[N, D]` → `[N, D]`, a tensor of its own. `visual` is there if it [`Insert::sees`] any.
    fn forward(&self, x: &Tensor, visual: Option<Seen>, vars: &mut Vars) -> Result<Tensor>;

    /// Does any of its parameters train?
    fn learns(&self) -> bool;

    /// Which visual tokens a row sees, if the insert reads them.
    fn sees(&self) -> Option<Sees> {
        None
    }

    /// A clone behind a box.
    fn boxed(&self) -> Box<dyn Insert>;
}

/// Visual tokens as an insert reads them.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// `[M, D]`.
    pub tokens: &'a Tensor,
    /// Which of them each row of the stream sees.
    pub sequences: &'a Sequences,
}

/// The inserts at one place of a layer, one after the other.
#[derive(Debug, Default)]
pub struct Inserts(Vec<Box<dyn Insert>>);

/// The inputs of inserts that ran, in order.
#[derive(Default)]
pub struct Inputs(Vec<Tensor>);

impl Inputs {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(bytes).sum()
    }
}

impl Inserts {
    /// Is nothing grafted here?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Inserts that are here.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts one behind those that are here; an error if the adapter has one already.
    pub fn push(&mut self, insert: Box<dyn Insert>) -> Result<()> {
        if self.0.iter().any(|i| i.adapter() == insert.adapter()) {
            bail!("there is already an adapter named `{}`", insert.adapter(); "give one of the two another `name`")
        }
        self.0.push(insert);
        Ok(())
    }

    /// Does one of them read visual tokens?
    pub fn see(&self) -> bool {
        self.0.iter().any(|i| i.sees().is_some())
    }

    /// `x` through all of them; `x` itself if there are none, or if the pass leaves out adapters.
    pub fn forward(&self, mut x: Tensor, side: &Side) -> Result<(Tensor, Inputs)> {
        let mut inputs = Vec::new();
        for insert in self.active(side) {
            let (y, _) = run(insert, &x, side, None)?;
            inputs.push(std::mem::replace(&mut x, y));
        }
        Ok((x, Inputs(inputs)))
    }

    /// Adds the gradients of what trains; returns that of the first one's input if it is wanted and if there are any inserts.
    pub fn backward(
        &self,
        Inputs(inputs): &Inputs,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let mut d: Option<Tensor> = None;
        for (i, input) in inputs.iter().enumerate().rev() {
            let Some(insert) = self.active(side).nth(i) else { bail!("an insert is gone since the pass that used it") };
            let (_, tape) = run(insert, input, side, Some(need_dx || i > 0))?;
            let Some(tape) = tape else { return Ok(None) };
            let [dx, dvisual] = island::backward_of(tape, d.as_ref().unwrap_or(dy), grads)?;
            if let (Some(sees), Some(visual), Some(dv)) = (insert.sees(), &side.visual, dvisual) {
                grads.add_visual(&visual.tokens, &visual.view(sees).rows, &dv)?;
            }
            d = dx;
        }
        Ok(d)
    }

    fn active(&self, side: &Side) -> impl Iterator<Item = &dyn Insert> {
        let off = side.adapters_off;
        self.0.iter().filter(move |_| !off).map(|i| &**i)
    }
}

/// The output of one insert; and its graph, if a backward pass follows: `Some` says whether it has to give dX.
fn run(insert: &dyn Insert, x: &Tensor, side: &Side, dx: Option<bool>) -> Result<(Tensor, Option<Tape<2>>)> {
    let pass = Pass { trains: dx.is_some(), need_dx: false, dropout: side.dropout.filter(|_| insert.learns()) };
    let Some(sees) = insert.sees() else {
        // The second input is of no use to it.
        return island::forward_of([(x, dx == Some(true)), (x, false)], pass, |[x, _], vars| {
            insert.forward(x, None, vars)
        });
    };
    let Some(visual) = &side.visual else {
        // No picture: there are no tokens, and no row sees any.
        let sequences = Sequences::default();
        return island::forward_of([(x, dx == Some(true)), (x, false)], pass, |[x, tokens], vars| {
            insert.forward(x, Some(Seen { tokens, sequences: &sequences }), vars)
        });
    };
    let view = visual.view(sees);
    let tokens = gather(&visual.tokens, &view.rows)?;
    let wants = dx.is_some() && visual.need_grad;
    island::forward_of([(x, dx == Some(true)), (&tokens, wants)], pass, |[x, tokens], vars| {
        insert.forward(x, Some(Seen { tokens, sequences: &view.sequences }), vars)
    })
}

impl Clone for Inserts {
    fn clone(&self) -> Self {
        Self(self.0.iter().map(|i| i.boxed()).collect())
    }
}

module!(Inserts: 0);
