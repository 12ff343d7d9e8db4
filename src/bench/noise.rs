//! Numbers to measure on: normal, on the device, in the type of computation, in a moment. A short table is drawn and laid end to
//! end, so that the weights of a 7B model need neither their f32 values nor the host's time.

use crate::error::Result;
use crate::model::init::{Place, Source, fresh};
use crate::model::role::{Init, Linears};
use crate::ops::random::{Key, normal};
use candle_core::{DType, Tensor};

/// Length of the table: a prime, so that no row of a matrix is like the one above it.
const PERIOD: usize = 262_139;

/// Where numbers come from.
pub struct Noise {
    place: Place,
    key: Key,
    /// Tables by type and deviation.
    tables: Vec<(DType, f64, Tensor)>,
}

impl Noise {
    /// Numbers for what computes at `place`.
    pub fn new(place: &Place) -> Self {
        Self { place: place.clone(), key: Key::new(1, "bench"), tables: Vec::new() }
    }

    /// A normal tensor in the type of computation; `name` says which numbers.
    pub fn normal(&mut self, name: &str, shape: &[usize], std: f64) -> Result<Tensor> {
        self.in_type(name, shape, std, self.place.dtype)
    }

    /// As [`Noise::normal`], in the type of sums and masters.
    pub fn wide(&mut self, name: &str, shape: &[usize], std: f64) -> Result<Tensor> {
        self.in_type(name, shape, std, self.place.master())
    }

    fn in_type(&mut self, name: &str, shape: &[usize], std: f64, dtype: DType) -> Result<Tensor> {
        let table = self.table(std, dtype)?;
        let n: usize = shape.iter().product();
        let out = Tensor::zeros(n, dtype, &self.place.device)?;
        let (mut at, mut from) = (0, self.key.child(name).words(0)[0] as usize % PERIOD);
        while at < n {
            let len = (PERIOD - from).min(n - at);
            #[allow(clippy::disallowed_methods, reason = "a fresh tensor that no graph knows")]
            out.slice_set(&table.narrow(0, from, len)?, 0, at)?;
            (at, from) = (at + len, 0);
        }
        Ok(out.reshape(shape)?)
    }

    fn table(&mut self, std: f64, dtype: DType) -> Result<Tensor> {
        if let Some((.., t)) = self.tables.iter().find(|(d, s, _)| *d == dtype && *s == std) {
            return Ok(t.clone());
        }
        let t = normal(self.key, &[PERIOD], std, dtype)?.to_device(&self.place.device)?;
        self.tables.push((dtype, std, t.clone()));
        Ok(t)
    }
}

/// Weights of backbones are noise, everything else is as a fresh model has it.
impl Source for Noise {
    fn place(&self) -> &Place {
        &self.place
    }

    fn get(&mut self, name: &str, shape: &[usize], dtype: DType, init: Init) -> Result<Tensor> {
        match init {
            Init::Normal(deviation) if deviation == Linears::DEVIATION => self.in_type(name, shape, deviation, dtype),
            init => Ok(fresh(self.key, name, shape, dtype, init)?.to_device(&self.place.device)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_normal_their_own_and_differ_by_name() {
        let mut noise = Noise::new(&Place::cpu());
        let n = 2 * PERIOD + 5;
        let [x, y] = ["x", "y"].map(|name| noise.normal(name, &[n], 0.5).unwrap().to_vec1::<f32>().unwrap());
        let mean = |v: &[f32], f: fn(f64) -> f64| v.iter().map(|x| f(f64::from(*x))).sum::<f64>() / n as f64;
        assert!(mean(&x, |x| x).abs() < 0.01 && (mean(&x, |x| x * x) - 0.25).abs() < 0.01);
        assert!(x != y && x[..5] == x[PERIOD..PERIOD + 5]);
        let again = noise.normal("x", &[n], 0.5).unwrap();
        crate::ops::update::<f32>(&again, |v| v.fill(0.0)).unwrap();
        assert_eq!(noise.normal("x", &[n], 0.5).unwrap().to_vec1::<f32>().unwrap(), x);
    }
}
