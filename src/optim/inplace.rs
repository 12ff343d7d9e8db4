//! AdamW's arithmetic as in-place operations: every clone of a tensor sees the new values.
//!
//! Each op rounds where `torch.optim.AdamW` rounds (its single-tensor path), in the tensor's own dtype. Elements are
//! independent, so the result does not depend on how they are spread over threads.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, WithDType};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

/// m ← m + (1 − β)(clip·g − m)
pub(super) struct Mean {
    pub beta: f64,
    pub clip: f64,
}

impl Mean {
    fn run<T: Real>(&self, m: &mut [T], g: &[T]) {
        let (weight, clip) = (T::from_f64(1.0 - self.beta), T::from_f64(self.clip));
        m.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).for_each(|(m, g)| {
            for (m, &g) in m.iter_mut().zip(g) {
                *m += weight * (g * clip - *m);
            }
        });
    }
}

/// v ← β·v + (1 − β)(clip·g)²
pub(super) struct Square {
    pub beta: f64,
    pub clip: f64,
}

impl Square {
    fn run<T: Real>(&self, v: &mut [T], g: &[T]) {
        let (beta, weight, clip) = (T::from_f64(self.beta), T::from_f64(1.0 - self.beta), T::from_f64(self.clip));
        v.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).for_each(|(v, g)| {
            for (v, &g) in v.iter_mut().zip(g) {
                let g = g * clip;
                *v = *v * beta + weight * g * g;
            }
        });
    }
}

/// p ← keep·p − size · m / (√v / correction + ε)
pub(super) struct Update {
    pub keep: f64,
    pub size: f64,
    pub correction: f64,
    pub eps: f64,
}

impl Update {
    fn run<T: Real>(&self, p: &mut [T], m: &[T], v: &[T]) {
        let (keep, size) = (T::from_f64(self.keep), T::from_f64(self.size));
        let (correction, eps) = (T::from_f64(self.correction), T::from_f64(self.eps));
        let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks(CHUNK)).zip(v.par_chunks(CHUNK));
        chunks.for_each(|((p, m), v)| {
            for ((p, &m), &v) in p.iter_mut().zip(m).zip(v) {
                *p = *p * keep - size * m / (v.sqrt() / correction + eps);
            }
        });
    }
}

/// f32 and f64: what the update is written for.
trait Real: WithDType {
    fn sqrt(self) -> Self;
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! real {
    ($t:ty, $variant:ident) => {
        impl Real for $t {
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(v) => Some(v),
                    _ => None,
                }
            }
        }
    };
}
real!(f32, F32);
real!(f64, F64);

fn read<'a, T: Real>(s: &'a CpuStorage, l: &Layout) -> candle_core::Result<&'a [T]> {
    let Some((start, end)) = l.contiguous_offsets() else { candle_core::bail!("an operand is not contiguous") };
    Ok(&s.as_slice::<T>()?[start..end])
}

fn write<'a, T: Real>(s: &'a mut CpuStorage, l: &Layout) -> candle_core::Result<&'a mut [T]> {
    match (T::slice_mut(s), l.contiguous_offsets()) {
        (Some(v), Some((start, end))) => Ok(&mut v[start..end]),
        _ => candle_core::bail!("an operand is not contiguous or not of one dtype"),
    }
}

macro_rules! moment_op {
    ($op:ty, $name:literal) => {
        impl InplaceOp2 for $op {
            fn name(&self) -> &'static str {
                $name
            }
            fn cpu_fwd(
                &self,
                s1: &mut CpuStorage,
                l1: &Layout,
                s2: &CpuStorage,
                l2: &Layout,
            ) -> candle_core::Result<()> {
                match s1 {
                    CpuStorage::F64(_) => self.run::<f64>(write(s1, l1)?, read(s2, l2)?),
                    _ => self.run::<f32>(write(s1, l1)?, read(s2, l2)?),
                }
                Ok(())
            }
        }
    };
}
moment_op!(Mean, "adamw_mean");
moment_op!(Square, "adamw_square");

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw_update"
    }
    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<()> {
        match s1 {
            CpuStorage::F64(_) => self.run::<f64>(write(s1, l1)?, read(s2, l2)?, read(s3, l3)?),
            _ => self.run::<f32>(write(s1, l1)?, read(s2, l2)?, read(s3, l3)?),
        }
        Ok(())
    }
}
