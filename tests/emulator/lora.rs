//! Linear layers that share their input, with adapters on some of them: together they launch fewer kernels than one by one,
//! and give the same bits but for dX, which is rounded less often.

use super::emulator::{OnCpu, Order};
use adfreeze::error::Result;
use adfreeze::model::build;
use adfreeze::model::dora::Magnitude;
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::linear::{InputGrad, Linear, LowRank, backward_all, forward_all};
use adfreeze::model::params::{Grads, Module, Param};
use adfreeze::model::role::{Init, Scope};
use adfreeze::model::segment::Side;
use adfreeze::ops::launch::{Emulator, Grid, HostArg, emulated};
use adfreeze::ops::random::{Key, normal};
use adfreeze::ops::registry::verify::distance;
use candle_core::{DType, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

const IN: usize = 64;
const ROWS: usize = 37;

/// Counts launches by kernel.
struct Counting {
    inner: OnCpu,
    launches: RefCell<BTreeMap<String, usize>>,
}

impl Emulator for Counting {
    fn launch(&self, module: &str, kernel: &str, grid: Grid, args: &[HostArg]) -> Result<()> {
        *self.launches.borrow_mut().entry(kernel.to_string()).or_default() += 1;
        self.inner.launch(module, kernel, grid, args)
    }
}

fn noise(what: &str, shape: &[usize], dtype: DType) -> Tensor {
    let wide = normal(Key::new(7, what), shape, 0.5, DType::F64).unwrap().to_dtype(DType::BF16).unwrap();
    wide.to_dtype(dtype).unwrap()
}

/// The values of bf16 in any type.
fn layer(name: &str, out: usize, adapters: &[(&str, usize, f64)], dtype: DType) -> Linear {
    let mut source = Fresh { key: Key::new(7, "weights"), place: Place { dtype, ..Place::cpu() } };
    let role = Scope::language().role(Init::Zeros);
    let mut l = build::linear(&mut source, &Scope::of(name, &role), out, IN, false).unwrap();
    l.weight = Param::new(l.weight.name.clone(), noise(name, &[out, IN], dtype), role.clone());
    for (adapter, rank, dropout) in adapters {
        let matrix = |m: &str, shape: &[usize]| {
            let name = format!("{name}.lora_{m}.{adapter}.weight");
            Param::new(name.clone(), noise(&name, shape, dtype), role.clone())
        };
        l.deltas.push(LowRank {
            adapter: adapter.to_string(),
            a: matrix("A", &[*rank, IN]),
            b: matrix("B", &[out, *rank]),
            magnitude: adapter.starts_with("dora").then(|| {
                // In f32 beside bf16.
                let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                let name = format!("{name}.lora_magnitude_vector.{adapter}.weight");
                Magnitude::new(Param::new(name.clone(), (noise(&name, &[out], wide) + 4.0).unwrap(), role.clone()))
            }),
            scale: 0.5,
            dropout: *dropout,
        });
    }
    l.visit_mut(&mut |p| p.trainable = p.name.contains("lora_"));
    l
}

/// q, k, v of grouped queries: one adapter on all of them, one on q and v, one with another rank on k. `dora` gives the first one
/// magnitudes, with dropout, and the last one without.
fn layers(dora: bool, dtype: DType) -> [Linear; 3] {
    let (sft, dpo) = if dora { ("dora", "dora2") } else { ("sft", "dpo") };
    let (sft, dpo, own) = ((sft, 16, 0.1), (dpo, 8, 0.0), ("own", 24, 0.1));
    [layer("q", 48, &[sft, dpo], dtype), layer("k", 24, &[sft, own], dtype), layer("v", 24, &[sft, dpo], dtype)]
}

struct Found {
    y: Vec<Tensor>,
    dx: Tensor,
    grads: BTreeMap<String, Tensor>,
}

fn found(together: bool, dora: bool, dtype: DType) -> Found {
    let layers = layers(dora, dtype);
    let [q, k, v] = &layers;
    let mut side = Side::packed(&[ROWS]);
    side.dropout = Some(Key::new(7, "dropout"));
    let x = noise("x", &[ROWS, IN], dtype);
    let dys = layers.each_ref().map(|l| noise(&format!("d{}", l.name()), &[ROWS, l.dims().unwrap().0], dtype));
    let (mut grads, mut dx, mut y) = (Grads::new(), InputGrad::Empty, Vec::new());
    if together {
        let (ys, saved) = forward_all([q, k, v], &x, &side).unwrap();
        y.extend(ys);
        backward_all(&[q, k, v], &saved, Some(&x), &dys.each_ref(), &side, &mut grads, &mut dx).unwrap();
    } else {
        for (l, dy) in layers.iter().zip(&dys) {
            let (one, saved) = l.forward(&x, &side).unwrap();
            y.push(one);
            l.backward(&saved, Some(&x), dy, &side, &mut grads, &mut dx).unwrap();
        }
    }
    Found { y, dx: dx.take().unwrap(), grads: grads.into_inner() }
}

fn counted(together: bool, dora: bool, dtype: DType) -> (Found, BTreeMap<String, usize>) {
    let emulator = Rc::new(Counting { inner: OnCpu::new(Order::Forward), launches: RefCell::default() });
    let found = emulated(emulator.clone(), || found(together, dora, dtype));
    let launches = emulator.launches.take();
    (found, launches)
}

fn bits(t: &Tensor) -> Vec<u64> {
    let flat = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    flat.into_iter().map(f64::to_bits).collect()
}

#[test]
fn layers_that_share_their_input_go_together() {
    let [(ours, few), (single, many)] = [true, false].map(|together| counted(together, false, DType::BF16));
    let count = |launches: &BTreeMap<String, usize>, kernel: &str| {
        launches.iter().filter(|(name, _)| name.starts_with(kernel)).map(|(_, n)| n).sum::<usize>()
    };
    for kernel in ["lora_down", "lora_up", "lora_da", "lora_dx"] {
        assert_eq!((count(&few, kernel), count(&many, kernel)), (3, 6), "{kernel}");
    }
    assert_eq!((count(&few, "lora_dy"), count(&many, "lora_dy")), (6, 6));

    assert!(ours.y.iter().zip(&single.y).all(|(a, b)| bits(a) == bits(b)), "an output changes");
    assert_eq!(ours.grads.len(), 12);
    for (name, g) in &ours.grads {
        assert_eq!(bits(g), bits(&single.grads[name]), "{name}");
    }
    let truth = found(true, false, DType::F64);
    for (name, g) in &ours.grads {
        assert!(distance(g, &truth.grads[name]).unwrap() < 2e-2, "{name}");
    }
    let (off, one_by_one) = (distance(&ours.dx, &truth.dx).unwrap(), distance(&single.dx, &truth.dx).unwrap());
    assert!(off > 0.0 && off <= one_by_one, "dX is off by {off:.2e}, one by one by {one_by_one:.2e}");
}

#[test]
fn the_reference_goes_layer_by_layer() {
    for (dora, dtype) in [(false, DType::F32), (false, DType::BF16), (true, DType::F32), (true, DType::BF16)] {
        let (ours, single) = (found(true, dora, dtype), found(false, dora, dtype));
        let all = |f: &Found| f.y.iter().chain([&f.dx]).chain(f.grads.values()).map(bits).collect::<Vec<_>>();
        assert_eq!(all(&ours), all(&single), "{dtype:?}, DoRA {dora}");
    }
}

/// DoRA on kernels, in groups or layer by layer: as near to f64 as the type allows.
#[test]
fn magnitudes() {
    let truth = found(true, true, DType::F64);
    assert_eq!(truth.grads.len(), 12 + 5);
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
        for together in [true, false] {
            let (ours, launches) = counted(together, true, dtype);
            let products = launches.keys().any(|k| k.starts_with("lora_down"));
            assert_eq!(products, dtype == DType::BF16, "{launches:?}");
            let all = |f: &Found| {
                let y = f.y.iter().enumerate().map(|(i, y)| (format!("y {i}"), y.clone()));
                let grads = f.grads.iter().map(|(n, g)| (n.clone(), g.clone()));
                y.chain([("dX".to_string(), f.dx.clone())]).chain(grads).collect::<Vec<_>>()
            };
            for ((name, got), (_, want)) in all(&ours).iter().zip(all(&truth)) {
                let off = distance(got, &want).unwrap();
                assert!(off < bound, "{dtype:?}, together {together}: {name} is off by {off:.2e}");
            }
            for (name, g) in &ours.grads {
                assert_eq!(g.dtype(), DType::F32, "{name}");
            }
        }
    }
}
