//! Named parameters, whether they train, and the one road that their gradients take.

use super::role::Role;
use crate::error::Result;
use crate::ops::embedding::scatter_add_;
use crate::ops::launch::widen;
use crate::ops::matmul::{Mat, add_, matmul_add};
use crate::ops::{Weight, overwrite};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// A parameter under its canonical dotted name. Clones of its tensors share storage: an in-place step is seen by all.
#[derive(Debug, Clone)]
pub struct Param {
    pub name: String,
    /// What is trained and saved: f32 where a model that computes in bf16 trains it (the master), else the type of
    /// computation.
    pub value: Tensor,
    /// The value rounded to the type of computation, if that is another one.
    rounded: Option<Tensor>,
    pub trainable: bool,
    pub role: Role,
}

impl Param {
    /// A frozen parameter that is computed with as it stands.
    pub fn new(name: impl Into<String>, value: Tensor, role: Role) -> Self {
        Self { name: name.into(), value, rounded: None, trainable: false, role }
    }

    /// A frozen parameter that is computed with in `dtype`.
    pub fn computed_in(name: impl Into<String>, value: Tensor, role: Role, dtype: DType) -> Result<Self> {
        let rounded = rounded(&value, dtype)?;
        Ok(Self { name: name.into(), value, rounded, trainable: false, role })
    }

    /// Is it an adapter's?
    pub fn is_adapter(&self) -> bool {
        self.role.adapter.is_some()
    }

    /// What layers compute with.
    pub fn compute(&self) -> &Tensor {
        self.rounded.as_ref().unwrap_or(&self.value)
    }

    /// Overwrites the value, in the type that it has; every clone of the parameter sees it.
    pub fn overwrite(&self, value: &Tensor) -> Result<()> {
        overwrite(&self.value, value)?;
        self.rounded.iter().try_for_each(|rounded| overwrite(rounded, value))
    }

    /// The optimizer's view: the value, and the copy that an update has to keep up with it.
    pub fn weight(&self) -> Weight {
        Weight { value: self.value.clone(), rounded: self.rounded.clone() }
    }
}

/// `value` in `dtype`, if it has another type.
fn rounded(value: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    Ok(if value.dtype() == dtype { None } else { Some(value.to_dtype(dtype)?) })
}

/// Something that owns parameters.
pub trait Module {
    /// Calls `f` on every parameter; a tied one may come twice, under one name.
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param));

    /// [`Module::visit`], to change them.
    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param));

    /// Does anything in here train?
    fn trains(&self) -> bool {
        let mut any = false;
        self.visit(&mut |p| any |= p.trainable);
        any
    }

    /// All parameters by name.
    fn params(&self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        self.visit(&mut |p| {
            all.insert(p.name.clone(), p.value.clone());
        });
        all
    }

    /// Names of the parameters that `which` picks.
    fn names(&self, which: impl Fn(&Param) -> bool) -> BTreeSet<String>
    where
        Self: Sized,
    {
        let mut names = BTreeSet::new();
        self.visit(&mut |p| _ = which(p).then(|| names.insert(p.name.clone())));
        names
    }

    /// What all parameters are, by name.
    fn roles(&self) -> BTreeMap<String, Role> {
        let mut all = BTreeMap::new();
        self.visit(&mut |p| _ = all.insert(p.name.clone(), p.role.clone()));
        all
    }

    /// Shapes of all parameters by name.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.params().into_iter().map(|(name, t)| (name, t.dims().to_vec())).collect()
    }

    /// The parameters that train, by name.
    fn trainable(&self) -> BTreeMap<String, Tensor> {
        self.weights().into_iter().map(|(name, w)| (name, w.value)).collect()
    }

    /// The parameters that train, as the optimizer sees them, by name.
    fn weights(&self) -> BTreeMap<String, Weight> {
        let mut all = BTreeMap::new();
        self.visit(&mut |p| {
            if p.trainable {
                all.insert(p.name.clone(), p.weight());
            }
        });
        all
    }

    /// Sets parameters by name; they are computed with in the same type and on the same device as before. What is tied
    /// stays tied.
    fn assign(&mut self, values: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut set: BTreeMap<String, Weight> = BTreeMap::new();
        let mut result = Ok(());
        self.visit_mut(&mut |p| {
            if let (Ok(()), Some(v)) = (&result, values.get(&p.name)) {
                let device = p.value.device().clone();
                result = replace(p, &mut set, || Ok(v.to_device(&device)?));
            }
        });
        result
    }

    /// Gives every parameter that trains an f32 value beside the bf16 copy that it is computed with.
    fn make_masters(&mut self) -> Result<()> {
        let mut set: BTreeMap<String, Weight> = BTreeMap::new();
        let mut result = Ok(());
        self.visit_mut(&mut |p| {
            if result.is_ok() && p.trainable && p.value.dtype() == DType::BF16 {
                let value = p.value.clone();
                result = replace(p, &mut set, || widen(&value));
            }
        });
        result
    }

    /// Leaves the parameters that train and that `which` picks in the type that they are computed with alone.
    fn drop_masters(&mut self, which: impl Fn(&Param) -> bool) -> Result<()>
    where
        Self: Sized,
    {
        let mut set: BTreeMap<String, Weight> = BTreeMap::new();
        let mut result = Ok(());
        self.visit_mut(&mut |p| {
            if let (Ok(()), true, Some(rounded)) = (&result, p.trainable && which(p), p.rounded.clone()) {
                result = replace(p, &mut set, || Ok(rounded));
            }
        });
        result
    }

    /// Trains exactly the named parameters.
    fn set_trainable(&mut self, names: &BTreeSet<String>) {
        self.visit_mut(&mut |p| p.trainable = names.contains(&p.name));
    }
}

/// Implements [`Module`] for a type by the list of its fields, each a parameter, a module, or some of them.
macro_rules! module {
    ($of:ty: $($field:tt),+) => {
        impl $crate::model::params::Module for $of {
            fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a $crate::model::params::Param)) {
                $($crate::model::params::Module::visit(&self.$field, f);)+
            }

            fn visit_mut(&mut self, f: &mut dyn FnMut(&mut $crate::model::params::Param)) {
                $($crate::model::params::Module::visit_mut(&mut self.$field, f);)+
            }
        }
    };
}
pub(crate) use module;

impl Module for Param {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        f(self);
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(self);
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        (**self).visit(f);
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        (**self).visit_mut(f);
    }
}

impl<M: Module> Module for Option<M> {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        self.iter().for_each(|m| m.visit(f));
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.iter_mut().for_each(|m| m.visit_mut(f));
    }
}

impl<M: Module> Module for [M] {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        self.iter().for_each(|m| m.visit(f));
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.iter_mut().for_each(|m| m.visit_mut(f));
    }
}

impl<M: Module> Module for Vec<M> {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        self.as_slice().visit(f);
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.as_mut_slice().visit_mut(f);
    }
}

impl<M: Module, const N: usize> Module for [M; N] {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        self.as_slice().visit(f);
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.as_mut_slice().visit_mut(f);
    }
}

/// Gives `p` a new value, and the tensors of `set` if its name has come before.
fn replace(p: &mut Param, set: &mut BTreeMap<String, Weight>, value: impl FnOnce() -> Result<Tensor>) -> Result<()> {
    if !set.contains_key(&p.name) {
        let value = value()?;
        let rounded = rounded(&value, p.compute().dtype())?;
        set.insert(p.name.clone(), Weight { value, rounded });
    }
    let w = &set[&p.name];
    (p.value, p.rounded) = (w.value.clone(), w.rounded.clone());
    Ok(())
}

/// Gradients of the trained parameters by name, summed over the micro-batches of a step; f32 where the model computes in bf16.
#[derive(Debug, Default)]
pub struct Grads {
    by_name: BTreeMap<String, Tensor>,
    /// Of the visual tokens that layers read beside their stream of rows; a micro-batch's.
    visual: Option<Tensor>,
}

impl Grads {
    /// No gradient yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `grad` to what is there. The tensor must be the caller's own.
    pub fn add(&mut self, name: &str, grad: Tensor) -> Result<()> {
        match self.by_name.get(name) {
            Some(sum) => add_(sum, 1.0, &grad),
            None => {
                self.by_name.insert(name.to_string(), widen(&grad.detach())?);
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
        if !self.by_name.contains_key(&p.name) {
            let dtype = if p.value.dtype() == DType::BF16 { DType::F32 } else { p.value.dtype() };
            self.by_name.insert(p.name.clone(), Tensor::zeros(p.value.dims(), dtype, p.value.device())?);
        }
        Ok(&self.by_name[&p.name])
    }

    /// Adds `grad` to the gradient of the visual tokens `like` at `rows`, an f32 sum beside bf16.
    pub fn add_visual(&mut self, like: &Tensor, rows: &[u32], grad: &Tensor) -> Result<()> {
        if self.visual.is_none() {
            self.visual = Some(widen(like)?.zeros_like()?);
        }
        self.visual.iter().try_for_each(|sum| scatter_add_(sum, rows, grad))
    }

    /// The gradient of the visual tokens, if a layer has read them; none is left.
    pub fn take_visual(&mut self) -> Option<Tensor> {
        self.visual.take()
    }

    /// The gradients by name, in sorted order.
    pub fn by_name(&self) -> &BTreeMap<String, Tensor> {
        &self.by_name
    }

    /// The gradients, taken out.
    pub fn into_inner(self) -> BTreeMap<String, Tensor> {
        self.by_name
    }
}
