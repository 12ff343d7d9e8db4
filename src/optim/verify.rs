//! A few steps of AdamW on made-up parameters in each form of storage, to be done once by the CPU's reference and once by the
//! kernels, and compared: by the emulator's tests and by `adfreeze selftest`.

use super::{AdamW, Groups, Schedule, StepReport};
use crate::error::Result;
use crate::ops::Weight;
use crate::ops::launch::host;
use crate::ops::random::{Key, normal};
use crate::spec::{self, MomentType, ParamGroup, Scheduler, Warmup};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// How parameters and moments are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// bf16 alone, rounded stochastically; else f32 with a bf16 copy.
    pub half: bool,
    /// Of parameters that are large enough.
    pub moments: MomentType,
}

/// Every form that there is a kernel for.
pub const FORMS: [Form; 4] = [
    Form { half: false, moments: MomentType::F32 },
    Form { half: true, moments: MomentType::F32 },
    Form { half: false, moments: MomentType::Eight },
    Form { half: true, moments: MomentType::Eight },
];

/// Steps that [`train`] makes.
pub const STEPS: u32 = 3;

/// Share of the elements that may be others on a GPU where moments have 8 bits: its roots and quotients are approximate there, so
/// that a number close to a threshold of rounding may fall on the other side.
pub const ROOM: f64 = 0.01;

/// The second parameter is a matrix of `elements` (a multiple of 4), the others are short.
fn shapes(elements: usize) -> BTreeMap<String, Vec<usize>> {
    let shapes = [("a", vec![5]), ("b1", vec![elements / 4, 4]), ("b2", vec![300])];
    shapes.into_iter().map(|(name, shape)| (name.to_string(), shape)).collect()
}

/// Clips, in two groups of which one decays.
pub fn optimizer(form: Form, elements: usize) -> Result<AdamW> {
    let group = |pattern: &str, lr, decay| ParamGroup {
        name: None,
        r#match: vec![pattern.into()],
        lr: Some(lr),
        weight_decay: Some(decay),
        ..Default::default()
    };
    let groups = Groups::resolve(&[group("a", 2e-2, 0.1), group("b*", 5e-3, 0.0)], 1.0, 0.0, &shapes(elements))?;
    let schedule = Schedule::new(&Scheduler::Constant(Warmup::default()), STEPS as usize);
    let hyper = spec::AdamW { betas: [0.9, 0.95], eps: 1e-6, moments: form.moments, ..Default::default() };
    Ok(AdamW::new(hyper, groups, schedule, 1.0, Key::new(7, "noise")))
}

/// Parameters that do not begin where their memory does, so that the first two lie at no multiple of 16 bytes.
pub fn weights(form: Form, elements: usize, device: &Device) -> Result<BTreeMap<String, Weight>> {
    let mut all = BTreeMap::new();
    for (i, (name, shape)) in shapes(elements).into_iter().enumerate() {
        let n: usize = shape.iter().product();
        let offset = 2 - i;
        let own = normal(Key::new(3, "start").index(i as u64), &[offset + n], 0.5, DType::F32)?.to_device(device)?;
        let rounded = own.to_dtype(DType::BF16)?;
        let view = |t: &Tensor| -> Result<Tensor> { Ok(t.narrow(0, offset, n)?.reshape(shape.as_slice())?) };
        let weight = if form.half {
            Weight { value: view(&rounded)?, rounded: None }
        } else {
            Weight { value: view(&own)?, rounded: Some(view(&rounded)?) }
        };
        all.insert(name, weight);
    }
    Ok(all)
}

/// Of step `step` (from 1): the last parameter gets none in the second; the matrix's is the transposed of what lies in memory.
pub fn grads(step: u32, elements: usize, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let mut all = BTreeMap::new();
    for (i, (name, shape)) in shapes(elements).into_iter().enumerate().filter(|(i, _)| (*i, step) != (2, 2)) {
        let stored: Vec<usize> = shape.iter().rev().copied().collect();
        let key = Key::new(4, "grad").index(u64::from(step)).index(i as u64);
        let g = normal(key, &stored, 0.1, DType::F32)?.to_device(device)?;
        all.insert(name, if shape.len() > 1 { g.t()? } else { g });
    }
    Ok(all)
}

/// What some steps leave.
#[derive(Debug, Clone)]
pub struct Trained {
    /// Values (under the parameters' names), rounded copies (`NAME.rounded`) and the optimizer's state, on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
    /// What each step told.
    pub reports: Vec<StepReport>,
}

/// [`STEPS`] steps on `device`.
pub fn train(form: Form, elements: usize, device: &Device) -> Result<Trained> {
    let (mut optimizer, weights) = (optimizer(form, elements)?, weights(form, elements, device)?);
    let mut reports = Vec::new();
    for step in 1..=STEPS {
        reports.push(optimizer.step(&weights, &grads(step, elements, device)?)?);
    }
    let mut tensors = optimizer.state()?;
    for (name, w) in weights {
        tensors.extend(w.rounded.map(|r| (format!("{name}.rounded"), r)));
        tensors.insert(name, w.value);
    }
    for t in tensors.values_mut() {
        *t = host(t)?;
    }
    Ok(Trained { tensors, reports })
}

impl Trained {
    /// What has other bits than in `want`: a tensor or a step's norms.
    pub fn differs(&self, want: &Self) -> Result<Option<String>> {
        if !self.tensors.keys().eq(want.tensors.keys()) {
            return Ok(Some("set of tensors".into()));
        }
        for (name, t) in &self.tensors {
            if !others(t, &want.tensors[name], 0.0)?.is_empty() {
                return Ok(Some(name.clone()));
            }
        }
        Ok(self.norms_differ(want))
    }

    /// The step whose norms are others. A factor of clipping is compared in f32, as kernels know it.
    pub fn norms_differ(&self, want: &Self) -> Option<String> {
        let rounded = |r: &StepReport| StepReport { clip: f64::from(r.clip as f32), ..r.clone() };
        let all = |t: &Self| t.reports.iter().map(rounded).collect::<Vec<_>>();
        let step = all(self).iter().zip(&all(want)).position(|(a, b)| a != b)?;
        Some(format!("norms of step {}", step + 1))
    }

    /// Share of all elements that are others than in `want`: f32 by more than a relative 10⁻⁴, bf16 and codes by their bits.
    pub fn share_off(&self, want: &Self) -> Result<f64> {
        if !self.tensors.keys().eq(want.tensors.keys()) {
            return Ok(1.0);
        }
        let (mut off, mut all) = (0, 0);
        for (name, t) in &self.tensors {
            off += others(t, &want.tensors[name], 1e-4)?.len();
            all += t.elem_count();
        }
        Ok(off as f64 / all as f64)
    }
}

/// Indices of the elements that differ, in f32 by more than a relative `room`; all of them if type or shape do.
fn others(a: &Tensor, b: &Tensor, room: f64) -> Result<Vec<usize>> {
    let n = a.elem_count();
    if a.dtype() != b.dtype() || a.dims() != b.dims() {
        return Ok((0..n.max(1)).collect());
    }
    let numbers = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) };
    let room = if a.dtype() == DType::F32 { room } else { 0.0 };
    let (a, b) = (numbers(a)?, numbers(b)?);
    let alike = |x: f64, y: f64| x.to_bits() == y.to_bits() || (x - y).abs() < room * x.abs().max(y.abs());
    Ok((0..n).filter(|i| !alike(a[*i], b[*i])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_other_element_or_norm_shows() {
        let form = FORMS[2];
        let want = train(form, 4100, &Device::Cpu).unwrap();
        assert!(want.reports.iter().any(|r| r.clip < 1.0) && want.tensors.contains_key("b1.exp_avg_scale"));
        assert_eq!(want.differs(&train(form, 4100, &Device::Cpu).unwrap()).unwrap(), None);
        let mut moved = want.clone();
        let mut values: Vec<f32> = want.tensors["b2"].to_vec1().unwrap();
        values[7] *= 1.0 + 1e-6;
        moved.tensors.insert("b2".into(), Tensor::new(values.as_slice(), &Device::Cpu).unwrap());
        assert_eq!(moved.differs(&want).unwrap().as_deref(), Some("b2"));
        assert_eq!(moved.share_off(&want).unwrap(), 0.0);
        values[7] *= 1.01;
        moved.tensors.insert("b2".into(), Tensor::new(values.as_slice(), &Device::Cpu).unwrap());
        assert!(moved.share_off(&want).unwrap() > 0.0);
        values[7] = f32::NAN;
        moved.tensors.insert("b2".into(), Tensor::new(values.as_slice(), &Device::Cpu).unwrap());
        assert!(moved.share_off(&want).unwrap() > 0.0);
        moved.tensors.remove("b2");
        assert_eq!(moved.share_off(&want).unwrap(), 1.0);
        let mut told = want.clone();
        told.reports[1].grad_norm *= 1.0 + 1e-15;
        assert_eq!(told.differs(&want).unwrap().as_deref(), Some("norms of step 2"));
    }
}
