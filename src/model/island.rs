//! Islands in the chain: modules written as ordinary differentiable candle code, run on fresh variables. The graph
//! of an island lives from its forward to its backward; adding one needs no backward by hand.

use super::params::{Grads, Param};
use crate::error::{Error, Result};
use crate::ops::graph;
use crate::ops::random::Key;
use candle_core::{Tensor, Var};
use std::collections::BTreeMap;

/// What is wanted of a pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass {
    /// Gradients of what trains in the island.
    pub trains: bool,
    /// The gradient of its input.
    pub need_dx: bool,
    /// Key of the dropout masks; none where nothing is masked.
    pub dropout: Option<Key>,
}

/// What an island computes with beside its input: parameters, as variables of this pass where they train and gradients are
/// wanted, else as plain tensors; and dropout masks.
pub struct Vars {
    record: bool,
    dropout: Option<Key>,
    vars: BTreeMap<String, Var>,
}

impl Vars {
    /// The tensor to compute with.
    pub fn get(&mut self, p: &Param) -> Result<Tensor> {
        if !(self.record && p.trainable) {
            return Ok(p.compute().clone());
        }
        if !self.vars.contains_key(&p.name) {
            self.vars.insert(p.name.clone(), Var::from_tensor(p.compute())?);
        }
        Ok(self.vars[&p.name].as_tensor().clone())
    }

    /// `x` with the mask that this pass has for `name`; `x` itself in a pass without dropout.
    pub fn dropout(&self, name: &str, x: Tensor, p: f64) -> Result<Tensor> {
        match self.dropout.filter(|_| p > 0.0) {
            Some(key) => graph::dropout(key.child(name), &x, p),
            None => Ok(x),
        }
    }
}

/// An island's graph, waiting for backward.
pub struct Tape {
    x: Option<Var>,
    vars: BTreeMap<String, Var>,
    y: Tensor,
}

/// Runs `island` on `x`: its output, detached; and the graph if `pass` wants gradients.
pub fn forward(
    x: &Tensor,
    pass: Pass,
    island: impl FnOnce(&Tensor, &mut Vars) -> Result<Tensor>,
) -> Result<(Tensor, Option<Tape>)> {
    let mut vars = Vars { record: pass.trains, dropout: pass.dropout, vars: BTreeMap::new() };
    let input = pass.need_dx.then(|| Var::from_tensor(x)).transpose()?;
    let y = island(input.as_ref().map_or(x, |v| v.as_tensor()), &mut vars)?;
    let out = y.detach();
    let tape = (pass.trains || pass.need_dx).then_some(Tape { x: input, vars: vars.vars, y });
    Ok((out, tape))
}

/// Takes the graph's gradients at `dy`: parameters' into `grads`, the input's is returned if it was asked for.
pub fn backward(tape: Tape, dy: &Tensor, grads: &mut Grads) -> Result<Option<Tensor>> {
    // Σ y·dy has the gradient dy at y; its own value is of no interest.
    let mut store = (&tape.y * dy.detach())?.sum_all()?.backward()?;
    for (name, var) in &tape.vars {
        let g = store
            .remove(var)
            .ok_or_else(|| Error::new(format!("{name}: the projector's graph gives it no gradient")))?;
        grads.add(name, g.contiguous()?)?;
    }
    let Some(x) = tape.x else { return Ok(None) };
    Ok(store.remove(&x).map(|g| g.detach().contiguous()).transpose()?)
}
