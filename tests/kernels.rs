//! Every kernel of `kernels/`, compiled for the CPU, against the f64 reference: all cases of the registry, forward and
//! backward, in f32 and bf16, with the threads of a block in six orders that must give the same bits.

#[path = "emulator/adamw.rs"]
mod adamw;
#[path = "emulator/attention.rs"]
mod attention;
#[path = "emulator/barriers.rs"]
mod barriers;
mod emulator;
#[path = "emulator/faults.rs"]
mod faults;
#[path = "emulator/lora.rs"]
mod lora;
#[path = "emulator/training.rs"]
mod training;

use adfreeze::ops::launch::emulated;
use adfreeze::ops::registry::verify::{Subject, Values};
use adfreeze::ops::registry::{Case, all};
use candle_core::DType;
use emulator::{OnCpu, Order, kernels_of, launched, orders};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn told(what: &str, e: &adfreeze::error::Error) -> String {
    format!("{what}: {}", e.report())
}

/// What is wrong with one case, if anything, with the kernels of `folder`.
fn run(case: &Case, dtype: DType, folder: &Path) -> std::result::Result<(), String> {
    let name = format!("{} {} {dtype:?}", case.op, case.label);
    let subject = Subject::new(case, dtype).map_err(|e| told(&name, &e))?;
    let mut first: Option<Values> = None;
    for order in orders() {
        let at = |e| told(&format!("{name}, {order:?}"), &e);
        let run = || Values::of(case, &subject.x, &subject.dy);
        let on_cpu = OnCpu { order, folder: folder.to_path_buf() };
        let ours = emulated(Rc::new(on_cpu), run).map_err(at)?;
        if let Some(v) = subject.judge(&ours).map_err(at)?.iter().find(|v| !v.holds()) {
            return Err(format!("{name}, {order:?}: the {} is off by {:.2e}, {:.2e} would do", v.what, v.off, v.bound));
        }
        match &first {
            None => first = Some(ours),
            Some(f) => {
                if let Some(what) = ours.differs(f).map_err(at)? {
                    return Err(format!("{name}: the {what} depends on the order of threads ({order:?})"));
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
            wrong.extend(run(case, dtype, &OnCpu::new(Order::Forward).folder).err());
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
