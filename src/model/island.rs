//! Islands in the chain: modules written as ordinary differentiable candle code, run on fresh variables. The graph
//! of an island lives from its forward to its backward; adding one needs no backward by hand.

use super::params::{Grads, Module, Param};
use crate::error::{Error, Result};
use candle_core::{Tensor, Var};
use std::collections::BTreeMap;

/// A differentiable module.
pub trait Island: Module {
    /// Computes with the parameters that `vars` hands out.
    fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor>;
}

/// Hands out a parameter: a variable of this pass if it trains and gradients are wanted, else the plain tensor.
pub struct Vars {
    record: bool,
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
}

/// An island's graph, waiting for backward.
pub struct Tape {
    x: Option<Var>,
    vars: BTreeMap<String, Var>,
    y: Tensor,
}

/// The output, detached; and the graph if something trains in here or `need_dx`.
pub fn forward<M: Island>(module: &M, trains: bool, x: &Tensor, need_dx: bool) -> Result<(Tensor, Option<Tape>)> {
    let mut vars = Vars { record: trains, vars: BTreeMap::new() };
    let input = need_dx.then(|| Var::from_tensor(x)).transpose()?;
    let y = module.forward(input.as_ref().map_or(x, |v| v.as_tensor()), &mut vars)?;
    let out = y.detach();
    let tape = (trains || need_dx).then_some(Tape { x: input, vars: vars.vars, y });
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
