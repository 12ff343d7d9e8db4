//! Every kernel of `kernels/`, compiled for the CPU, against the f64 reference: all cases of the registry, forward and
//! backward, in f32 and bf16, with the threads of a block in five orders that must give the same bits.

#[path = "emulator/adamw.rs"]
mod adamw;
#[path = "emulator/attention.rs"]
mod attention;
mod emulator;
#[path = "emulator/faults.rs"]
mod faults;

use adfreeze::error::Result;
use adfreeze::ops::launch::emulated;
use adfreeze::ops::random::{Key, normal};
use adfreeze::ops::registry::{Case, all};
use candle_core::{DType, Tensor};
use emulator::{ORDERS, OnCpu, Order, kernels_of, launched};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An op's output and the gradients of its inputs.
struct Values {
    y: Tensor,
    grads: Vec<Option<Tensor>>,
}

impl Values {
    fn of(case: &Case, x: &[Tensor], dy: &Tensor) -> Result<Self> {
        Ok(Self { y: (case.forward)(x)?, grads: (case.backward)(x, dy)? })
    }

    fn emulated(case: &Case, x: &[Tensor], dy: &Tensor, order: Order) -> Result<Self> {
        emulated(Rc::new(OnCpu::new(order)), || Self::of(case, x, dy))
    }

    fn all<'a>(&'a self) -> impl Iterator<Item = (String, &'a Tensor)> {
        let named = |(i, g): (usize, &'a Option<Tensor>)| g.as_ref().map(|g| (format!("gradient of input {i}"), g));
        std::iter::once(("output".to_string(), &self.y)).chain(self.grads.iter().enumerate().filter_map(named))
    }
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖a − b‖ / ‖b‖ (Frobenius); infinite if `a` holds NaN.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (off, size) = (norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)), norm(&mut b.iter().copied()));
    if off.is_nan() { f64::INFINITY } else { off / size.max(1e-3) }
}

fn told(what: &str, e: &adfreeze::error::Error) -> String {
    format!("{what}: {}", e.report())
}

/// What one case shows, or what is wrong with it.
fn run(case: &Case, dtype: DType) -> std::result::Result<(), String> {
    let name = format!("{} {} {dtype:?}", case.op, case.label);
    let key = Key::new(11, &name);
    let draw = |i: usize, shape: &[usize]| normal(key.index(i as u64), shape, 1.0, DType::F64).unwrap();
    let x: Vec<Tensor> = case.inputs.iter().enumerate().map(|(i, s)| draw(i, s).to_dtype(dtype).unwrap()).collect();
    let exact: Vec<Tensor> = x.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
    let y = (case.forward)(&exact).map_err(|e| told(&name, &e))?;
    let dy = draw(99, y.dims()).to_dtype(dtype).unwrap();
    let truth = Values::of(case, &exact, &dy.to_dtype(DType::F64).unwrap()).map_err(|e| told(&name, &e))?;
    let plain = Values::of(case, &x, &dy).map_err(|e| told(&name, &e))?;
    let mut first: Option<Values> = None;
    for order in ORDERS {
        let ours = Values::emulated(case, &x, &dy, order).map_err(|e| told(&format!("{name}, {order:?}"), &e))?;
        if [&plain, &truth].iter().any(|v| v.all().count() != ours.all().count()) {
            return Err(format!("{name}: a gradient is missing"));
        }
        for (((what, a), (_, p)), (_, t)) in ours.all().zip(plain.all()).zip(truth.all()) {
            // The rule of FlashAttention's tests: at most twice as far off as the plain computation in the same type.
            let (off, allowed) = (distance(a, t), distance(p, t));
            let floor = if a.dtype() == DType::BF16 { 2e-3 } else { 2e-6 };
            if !allowed.is_finite() || off > 2.0 * allowed + floor {
                return Err(format!("{name}, {order:?}: {what} is off by {off:.2e}, the plain way by {allowed:.2e}"));
            }
        }
        match &first {
            None => first = Some(ours),
            Some(f) => {
                for ((what, a), (_, b)) in ours.all().zip(f.all()) {
                    if flat(a).iter().zip(&flat(b)).any(|(a, b)| a.to_bits() != b.to_bits()) {
                        return Err(format!("{name}: {what} depends on the order of threads ({order:?})"));
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_kernel_gives_the_references_values_in_any_order_of_threads() {
    let cases = || all().into_iter().flat_map(|_| [DType::F32, DType::BF16]).count();
    let (next, total) = (AtomicUsize::new(0), cases());
    let worker = || {
        let (cases, mut wrong) = (all(), Vec::new());
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(case) = cases.get(i / 2) else { return wrong };
            let dtype = if i % 2 == 0 { DType::F32 } else { DType::BF16 };
            wrong.extend(run(case, dtype).err());
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let wrong: Vec<String> = std::thread::scope(|s| {
        let workers: Vec<_> = (0..threads).map(|_| s.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{} of {total} cases:\n{}", wrong.len(), wrong.join("\n"));
    let (there, ran) = (kernels_of(&OnCpu::new(Order::Forward).folder, &["adamw"]), launched());
    let idle: Vec<&String> = there.iter().filter(|k| !ran.contains(*k)).collect();
    assert!(idle.is_empty(), "no case runs these kernels: {idle:?}");
}
