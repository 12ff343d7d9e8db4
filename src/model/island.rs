//! Islands in the chain: modules written as ordinary differentiable candle code, run on fresh variables. The graph
//! of an island lives from its forward to its backward; adding one needs no backward by hand.

use super::params::{Grads, Param};
use crate::error::{Error, Result};
use crate::ops::bytes;
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

/// What an island computes with beside its input: parameters and dropout masks. Where a parameter trains and gradients are wanted,
/// it is a variable of this pass that holds the value itself, so that its gradient has the value's type (f32 beside bf16); the nodes
/// of [`graph`] compute with it in the type of their rows.
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
            self.vars.insert(p.name.clone(), Var::from_tensor(&p.value)?);
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

/// The graph of an island of N inputs, waiting for backward.
pub struct Tape<const N: usize = 1> {
    inputs: [Option<Var>; N],
    vars: BTreeMap<String, Var>,
    y: Tensor,
}

impl<const N: usize> Tape<N> {
    /// Bytes that it holds: of the parameters' copies, and of all else, which grows with the input's rows.
    pub fn kept_bytes(&self) -> [usize; 2] {
        let params = self.vars.values().map(|v| bytes(v)).sum();
        let mut of: BTreeMap<usize, usize> = BTreeMap::new();
        let inner = self.y.sorted_nodes().into_iter().filter(|t| !t.is_variable());
        for t in inner.chain(self.inputs.iter().flatten().map(Var::as_tensor)) {
            // Views stand in the memory of what they show.
            let at = std::ptr::from_ref(&*t.storage_and_layout().0).addr();
            let size = of.entry(at).or_insert(0);
            *size = bytes(t).max(*size);
        }
        [params, of.values().sum()]
    }
}

/// Runs `island` on `x`: its output, detached; and the graph if `pass` wants gradients.
pub fn forward(
    x: &Tensor,
    pass: Pass,
    island: impl FnOnce(&Tensor, &mut Vars) -> Result<Tensor>,
) -> Result<(Tensor, Option<Tape>)> {
    forward_of([(x, pass.need_dx)], pass, |[x], vars| island(x, vars))
}

/// [`forward`] of several inputs, each with whether its gradient is wanted; `pass.need_dx` is not read.
pub fn forward_of<const N: usize>(
    inputs: [(&Tensor, bool); N],
    pass: Pass,
    island: impl FnOnce([&Tensor; N], &mut Vars) -> Result<Tensor>,
) -> Result<(Tensor, Option<Tape<N>>)> {
    let mut vars = Vars { record: pass.trains, dropout: pass.dropout, vars: BTreeMap::new() };
    let mut wanted = inputs.map(|_| None);
    for ((x, want), var) in inputs.iter().zip(&mut wanted) {
        *var = want.then(|| Var::from_tensor(x)).transpose()?;
    }
    let of = std::array::from_fn(|i| wanted[i].as_ref().map_or(inputs[i].0, |v: &Var| v.as_tensor()));
    let y = island(of, &mut vars)?;
    let out = y.detach();
    let records = pass.trains || inputs.iter().any(|(_, want)| *want);
    Ok((out, records.then_some(Tape { inputs: wanted, vars: vars.vars, y })))
}

/// Takes the graph's gradients at `dy`: parameters' into `grads`, the input's is returned if it was asked for.
pub fn backward(tape: Tape, dy: &Tensor, grads: &mut Grads) -> Result<Option<Tensor>> {
    let [dx] = backward_of(tape, dy, grads)?;
    Ok(dx)
}

/// [`backward`] of several inputs.
pub fn backward_of<const N: usize>(tape: Tape<N>, dy: &Tensor, grads: &mut Grads) -> Result<[Option<Tensor>; N]> {
    // Σ y·dy has the gradient dy at y; its own value is of no interest.
    let mut store = (&tape.y * dy.detach())?.sum_all()?.backward()?;
    for (name, var) in &tape.vars {
        let g =
            store.remove(var).ok_or_else(|| Error::new(format!("{name}: its module's graph gives it no gradient")))?;
        grads.add(name, g.contiguous()?)?;
    }
    let mut out = [const { None }; N];
    for (x, dx) in tape.inputs.iter().zip(&mut out) {
        if let Some(x) = x {
            *dx = store.remove(x).map(|g| g.detach().contiguous()).transpose()?;
        }
    }
    Ok(out)
}
