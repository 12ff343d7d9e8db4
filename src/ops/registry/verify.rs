//! Whether an op gives what its case promises, on whatever runs it: values against the f64 reference, by the rule of
//! FlashAttention's tests (at most twice as far off as the plain computation in the same type), below an absolute limit.

use super::Case;
use crate::bail;
use crate::error::Result;
use crate::ops::launch::download;
use crate::ops::random::{Key, normal};
use candle_core::{DType, Device, Tensor};

/// An op's output and the gradients of its inputs.
pub struct Values {
    /// The output.
    pub y: Tensor,
    /// Gradients of the inputs; None where an input has none.
    pub grads: Vec<Option<Tensor>>,
}

impl Values {
    /// Runs a case forward and backward.
    pub fn of(case: &Case, x: &[Tensor], dy: &Tensor) -> Result<Self> {
        Ok(Self { y: (case.forward)(x)?, grads: (case.backward)(x, dy)? })
    }

    /// Output and gradients with their names.
    pub fn all<'a>(&'a self) -> impl Iterator<Item = (String, &'a Tensor)> {
        let named = |(i, g): (usize, &'a Option<Tensor>)| g.as_ref().map(|g| (format!("gradient of input {i}"), g));
        std::iter::once(("output".to_string(), &self.y)).chain(self.grads.iter().enumerate().filter_map(named))
    }

    /// The first value whose bits differ from another run's.
    pub fn differs(&self, other: &Self) -> Result<Option<String>> {
        for ((what, a), (_, b)) in self.all().zip(other.all()) {
            let (a, b) = (download::<f64>(a)?, download::<f64>(b)?);
            if a.len() != b.len() || a.iter().zip(&b).any(|(a, b)| a.to_bits() != b.to_bits()) {
                return Ok(Some(what));
            }
        }
        Ok(None)
    }
}

/// A case with random inputs in one type, and what it should give.
pub struct Subject {
    /// Inputs, on the CPU.
    pub x: Vec<Tensor>,
    /// The gradient of the output, on the CPU.
    pub dy: Tensor,
    truth: Values,
    plain: Values,
}

/// How far a value is off.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Which value.
    pub what: String,
    /// Relative distance from f64 (Frobenius); infinite if there is a NaN.
    pub off: f64,
    /// What it may be.
    pub bound: f64,
}

impl Verdict {
    /// Is the value good enough?
    pub fn holds(&self) -> bool {
        self.off <= self.bound
    }
}

impl Subject {
    /// Draws inputs and computes the reference in f64, and the plain computation in `dtype`, on the CPU.
    pub fn new(case: &Case, dtype: DType) -> Result<Self> {
        let key = Key::new(11, &format!("{} {} {dtype:?}", case.op, case.label));
        let draw = |i: usize, shape: &[usize]| -> Result<Tensor> {
            Ok(normal(key.index(i as u64), shape, 1.0, DType::F64)?.to_dtype(dtype)?)
        };
        let mut x = Vec::with_capacity(case.inputs.len());
        for (i, shape) in case.inputs.iter().enumerate() {
            x.push(draw(i, shape)?);
        }
        let mut exact = Vec::with_capacity(x.len());
        for t in &x {
            exact.push(t.to_dtype(DType::F64)?);
        }
        let dy = draw(99, (case.forward)(&exact)?.dims())?;
        let truth = Values::of(case, &exact, &dy.to_dtype(DType::F64)?)?;
        let plain = Values::of(case, &x, &dy)?;
        Ok(Self { x, dy, truth, plain })
    }

    /// Inputs and the output's gradient on a device.
    pub fn on(&self, device: &Device) -> Result<(Vec<Tensor>, Tensor)> {
        let x = self.x.iter().map(|t| t.to_device(device)).collect::<candle_core::Result<_>>()?;
        Ok((x, self.dy.to_device(device)?))
    }

    /// How far each of the values is off. An error if one is missing.
    pub fn judge(&self, found: &Values) -> Result<Vec<Verdict>> {
        let n = found.all().count();
        if [&self.plain, &self.truth].iter().any(|v| v.all().count() != n) {
            bail!("a gradient is missing")
        }
        let mut out = Vec::with_capacity(n);
        for (((what, a), (_, p)), (_, t)) in found.all().zip(self.plain.all()).zip(self.truth.all()) {
            let (floor, limit) = if a.dtype() == DType::BF16 { (2e-3, 5e-2) } else { (2e-6, 2e-2) };
            // What is computed from f32 values has only its own rounding to excuse it; gradients that cancel show the most.
            let limit = if self.dy.dtype() == DType::BF16 { limit } else { 1e-3 };
            let bound = (2.0 * distance(p, t)? + floor).min(limit);
            out.push(Verdict { what, off: distance(a, t)?, bound });
        }
        Ok(out)
    }
}

/// ‖a − b‖ / ‖b‖ (Frobenius); infinite if `a` holds NaN or has another shape.
pub fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() {
        return Ok(f64::INFINITY);
    }
    let (a, b) = (download::<f64>(a)?, download::<f64>(b)?);
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (off, size) = (norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)), norm(&mut b.iter().copied()));
    Ok(if off.is_nan() { f64::INFINITY } else { off / size.max(1e-3) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_seen() {
        let case = super::super::all().into_iter().find(|c| c.op == "linear" && c.inputs.len() > 1);
        let case = case.or_else(|| super::super::all().into_iter().next()).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let subject = Subject::new(&case, dtype).unwrap();
            let right = Values::of(&case, &subject.x, &subject.dy).unwrap();
            assert!(subject.judge(&right).unwrap().iter().all(Verdict::holds));
            let again = Values::of(&case, &subject.x, &subject.dy).unwrap();
            assert!(right.differs(&again).unwrap().is_none());
            let scaled = |by: f64| Values { y: (&right.y * by).unwrap(), grads: right.grads.clone() };
            let wrong = subject.judge(&scaled(1.1)).unwrap();
            assert!(!wrong[0].holds() && wrong[1..].iter().all(Verdict::holds), "{wrong:?}");
            assert!(!subject.judge(&scaled(f64::NAN)).unwrap()[0].holds());
            assert_eq!(right.differs(&scaled(1.1)).unwrap().as_deref(), Some("output"));
            assert!(subject.judge(&Values { y: right.y.clone(), grads: vec![] }).is_err());
        }
    }
}
