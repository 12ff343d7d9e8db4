//! Differentiable operations: each file holds a forward and its own backward over candle tensors, as a CPU reference and
//! as launches of our kernels ([`launch`]).
//!
//! candle's graph would keep every activation, compute gradients of frozen weights and offers no in-place sums;
//! so the trunk of a model calls these pairs explicitly (see `model::segment`). Every op is generic over f32 and f64,
//! so that a whole chain can be checked against finite differences. [`registry`] lists the cases every test walks.
//!
//! Shapes: activations of all sequences of a micro-batch stand packed in rows, `[N, D]`; there is no padding.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod embedding;
pub(crate) mod gemm;
pub mod graph;
pub mod host;
pub mod launch;
pub mod lora;
pub mod matmul;
pub mod norm;
pub mod patches;
pub mod philox;
pub mod random;
pub mod registry;
pub mod rope;

use crate::bail;
use crate::error::Result;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor, WithDType};
use half::bf16;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Mutex;

/// The floating-point types that ops compute in.
pub trait Real:
    WithDType + Send + Sync + std::iter::Sum + std::ops::Neg<Output = Self> + num_traits::Float + Default
{
    /// Gauss error function.
    fn erf(self) -> Self;
    /// From a host constant.
    fn of(x: f64) -> Self;
    /// To a host number.
    fn f64(self) -> f64;
}

impl Real for f32 {
    fn erf(self) -> Self {
        libm::erff(self)
    }
    fn of(x: f64) -> Self {
        x as f32
    }
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn erf(self) -> Self {
        libm::erf(self)
    }
    fn of(x: f64) -> Self {
        x
    }
    fn f64(self) -> f64 {
        self
    }
}

/// Runs `$body` with the type alias `$t` set to the element type of `$x` (f32 or f64).
macro_rules! dispatch {
    ($x:expr, $name:literal, $t:ident => $body:expr) => {{
        let x: &candle_core::Tensor = $x;
        if !x.device().is_cpu() {
            $crate::bail!("{}: no kernel for device {:?}", $name, x.device().location())
        }
        match x.dtype() {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => $crate::bail!("{}: dtype {other:?} is not supported, use f32 or f64", $name),
        }
    }};
}
pub(crate) use dispatch;

/// A read lock on a contiguous CPU tensor, seen as a slice.
pub(crate) struct Data<G, T> {
    guard: G,
    range: std::ops::Range<usize>,
    kind: std::marker::PhantomData<T>,
}

impl<G: Deref<Target = Storage>, T: WithDType> Deref for Data<G, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.guard {
            // `data` has checked device and dtype.
            Storage::Cpu(s) => T::cpu_storage_as_slice(s).map_or(&[], |s| &s[self.range.clone()]),
            _ => &[],
        }
    }
}

/// The elements of a contiguous CPU tensor of type `T`.
pub(crate) fn data<T: WithDType>(t: &Tensor) -> Result<Data<impl Deref<Target = Storage>, T>> {
    if t.dtype() != T::DTYPE {
        bail!("expected {:?}, found {:?} of shape {:?}", T::DTYPE, t.dtype(), t.shape())
    }
    let (guard, layout) = t.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a contiguous tensor is needed, shape {:?}", t.shape())
    };
    if !matches!(&*guard, Storage::Cpu(_)) {
        bail!("a tensor on the CPU is needed")
    }
    Ok(Data { guard, range: start..end, kind: std::marker::PhantomData })
}

/// A new CPU tensor that owns `v`.
pub(crate) fn tensor<T: WithDType>(v: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(v, shape, &Device::Cpu)?)
}

/// Overwrites the elements of a contiguous CPU tensor in place; every clone of it sees the change.
pub(crate) fn update<T: WithDType>(t: &Tensor, f: impl FnOnce(&mut [T])) -> Result<()> {
    struct Op<F>(Mutex<Option<F>>);
    trait Run {
        fn run(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()>;
    }
    struct Typed<T, F>(Op<F>, std::marker::PhantomData<T>);
    impl<T: WithDType, F: FnOnce(&mut [T])> Run for Typed<T, F> {
        fn run(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
            let Some((a, b)) = l.contiguous_offsets() else { candle_core::bail!("in-place: not contiguous") };
            let f = self.0.0.lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))?.take();
            // The slice comes out mutable by taking the vector and putting it back: candle has no typed mutable view.
            let mut v = T::cpu_storage_data(std::mem::replace(s, CpuStorage::U8(vec![])))?;
            if let Some(f) = f {
                f(&mut v[a..b]);
            }
            *s = T::to_cpu_storage_owned(v);
            Ok(())
        }
    }
    impl<T: WithDType, F: FnOnce(&mut [T])> InplaceOp1 for Typed<T, F> {
        fn name(&self) -> &'static str {
            "update"
        }
        fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
            self.run(s, l)
        }
    }
    if t.dtype() != T::DTYPE {
        bail!("in-place: expected {:?}, found {:?}", T::DTYPE, t.dtype())
    }
    t.inplace_op1(&Typed(Op(Mutex::new(Some(f))), std::marker::PhantomData::<T>))?;
    Ok(())
}

/// Runs an in-place op on `t`, on a widened copy of it if it is bf16, which is then rounded back into `t`.
pub(crate) fn on_wide(t: &Tensor, f: impl FnOnce(&Tensor) -> Result<()>) -> Result<()> {
    if t.dtype() != DType::BF16 {
        return f(t);
    }
    let copy = launch::widen(t)?;
    f(&copy)?;
    let rounded = data::<f32>(&copy)?;
    update::<bf16>(t, |t| t.iter_mut().zip(rounded.iter()).for_each(|(t, x)| *t = bf16::from_f32(*x)))
}

/// A vector of `n` elements that the caller overwrites entirely.
///
/// Zeroed pages would be written twice; the allocator hands back warm ones.
#[allow(clippy::uninit_vec, reason = "every bit pattern is a number, and each is overwritten")]
pub(crate) fn scratch<T: Real>(n: usize) -> Vec<T> {
    let mut v = Vec::with_capacity(n);
    // SAFETY: T is f32 or f64, for which every bit pattern is a value, and callers write each element before reading.
    unsafe { v.set_len(n) };
    v
}

/// A trained parameter as an optimizer sees it.
#[derive(Debug, Clone)]
pub struct Weight {
    /// What is updated.
    pub value: Tensor,
    /// The value rounded to the type that layers compute in, if that is another one; it follows every update.
    pub rounded: Option<Tensor>,
}

impl Weight {
    /// Weights that are computed with as they stand.
    pub fn plain(values: &BTreeMap<String, Tensor>) -> BTreeMap<String, Self> {
        let plain = |t: &Tensor| Self { value: t.clone(), rounded: None };
        values.iter().map(|(name, t)| (name.clone(), plain(t))).collect()
    }

    /// Rounds the value anew, in place, on the CPU.
    pub(crate) fn round(&self) -> Result<()> {
        let Some(rounded) = &self.rounded else { return Ok(()) };
        let value = data::<f32>(&self.value)?;
        update::<bf16>(rounded, |r| {
            r.iter_mut().zip(value.iter()).for_each(|(r, v)| *r = bf16::from_f32(*v));
        })
    }
}

/// Writes the elements of `new`, in `t`'s type and on its device, over those of `t`; every clone of `t` sees them. `new` must be
/// a tensor of its own.
pub(crate) fn overwrite(t: &Tensor, new: &Tensor) -> Result<()> {
    #[allow(clippy::disallowed_methods, reason = "an update in place, of which no graph may know")]
    t.slice_set(&new.to_device(t.device())?.to_dtype(t.dtype())?, 0, 0)?;
    Ok(())
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes(t: &Tensor) -> usize {
    t.elem_count() * t.dtype().size_in_bytes()
}

/// Rows and columns of a matrix.
pub(crate) fn dims2(t: &Tensor, what: &str) -> Result<(usize, usize)> {
    match t.dims() {
        [n, d] => Ok((*n, *d)),
        other => bail!("{what}: expected a matrix, found shape {other:?}"),
    }
}

/// Rows handled by one task, so that small inputs stay on one thread.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    let threads = rayon::current_num_threads().max(1);
    rows.div_ceil(threads * 2).max(16 * 1024 / width.max(1)).max(1)
}

/// Raw pointer that tasks share to write disjoint parts of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);
// SAFETY: users write disjoint index ranges only, and the buffer outlives the parallel section.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    pub(crate) fn new(v: &mut [T]) -> Self {
        Self(v.as_mut_ptr())
    }
    /// Pointer to element `i`.
    ///
    /// # Safety
    /// `i` must lie in the buffer, and no two tasks may touch the same element.
    pub(crate) unsafe fn at(self, i: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}
