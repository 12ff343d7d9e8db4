//! Named parameters, whether they train, and the one road that their gradients take.

use crate::error::Result;
use crate::ops::matmul::{Mat, add_, matmul_add};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// A parameter under its canonical dotted name. Clones of the tensor share storage: an in-place step is seen by all.
#[derive(Debug, Clone)]
pub struct Param {
    pub name: String,
    pub value: Tensor,
    pub trainable: bool,
}

impl Param {
    /// A frozen parameter.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        Self { name: name.into(), value, trainable: false }
    }
}

/// Something that owns parameters.
pub trait Module {
    /// Calls `f` on every parameter; a tied one may come twice, under one name.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param));

    /// Does anything in here train?
    fn trains(&mut self) -> bool {
        let mut any = false;
        self.visit(&mut |p| any |= p.trainable);
        any
    }

    /// All parameters by name.
    fn params(&mut self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        self.visit(&mut |p| {
            all.insert(p.name.clone(), p.value.clone());
        });
        all
    }

    /// The parameters that train, by name.
    fn trainable(&mut self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        self.visit(&mut |p| {
            if p.trainable {
                all.insert(p.name.clone(), p.value.clone());
            }
        });
        all
    }

    /// Trains exactly the named parameters.
    fn set_trainable(&mut self, names: &BTreeSet<String>) {
        self.visit(&mut |p| p.trainable = names.contains(&p.name));
    }
}

/// Gradients of the trained parameters by name, summed over the micro-batches of a step.
#[derive(Debug, Default)]
pub struct Grads(BTreeMap<String, Tensor>);

impl Grads {
    /// No gradient yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `grad` to what is there. The tensor must be the caller's own.
    pub fn add(&mut self, name: &str, grad: Tensor) -> Result<()> {
        match self.0.get(name) {
            Some(sum) => add_(sum, 1.0, &grad),
            None => {
                self.0.insert(name.to_string(), grad.detach());
                Ok(())
            }
        }
    }

    /// Adds `alpha·A·B` straight into the sum.
    pub fn add_product(&mut self, p: &Param, alpha: f64, a: Mat, b: Mat) -> Result<()> {
        matmul_add(self.slot(p)?, alpha, a, b)
    }

    /// The sum for a parameter, zero at first.
    pub fn slot(&mut self, p: &Param) -> Result<&Tensor> {
        if !self.0.contains_key(&p.name) {
            self.0.insert(p.name.clone(), p.value.zeros_like()?);
        }
        Ok(&self.0[&p.name])
    }

    /// The gradients by name, in sorted order.
    pub fn by_name(&self) -> &BTreeMap<String, Tensor> {
        &self.0
    }

    /// The gradients, taken out.
    pub fn into_inner(self) -> BTreeMap<String, Tensor> {
        self.0
    }
}
