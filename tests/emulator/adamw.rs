//! The optimizer's kernels (`kernels/adamw.cu`): every form has the bits of the CPU's reference through `optim::AdamW`, stochastic
//! rounding is exact over all random words, and neither chunks, threads nor their order change a bit.

use super::emulator::{ORDERS, OnCpu, Order, kernels_of, launched};
use adfreeze::ops::Weight;
use adfreeze::ops::launch::{Emulator, Grid, HostArg, emulated};
use adfreeze::ops::random::{Key, normal};
use adfreeze::optim::verify::{self, FORMS, train};
use adfreeze::spec::MomentType;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

const LENGTHS: [usize; 3] = [5, 4100, 300];
const STEPS: u32 = 3;
const GROUPS: usize = 2;
const LRS: [f64; GROUPS] = [2e-2, 5e-3];
const DECAYS: [f64; GROUPS] = [0.1, 0.0];
const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-6;
const MAX_NORM: f64 = 1.0;

/// How a launch is cut up; it must not matter.
#[derive(Debug, Clone, Copy)]
struct Cut {
    chunk: usize,
    threads: u32,
    order: Order,
}

/// The memory of one parameter; only what its form needs is filled.
#[derive(Clone, Default)]
struct Parameter {
    master: Vec<f32>,
    half: Vec<bf16>,
    shadow: Vec<bf16>,
    grad: Vec<f32>,
    moments: [Vec<f32>; 2],
    codes: [Vec<u8>; 2],
    scales: [Vec<f32>; 2],
}

/// `struct Param` of the kernels.
#[repr(C)]
struct Row {
    p: u64,
    shadow: u64,
    g: u64,
    m: u64,
    v: u64,
    m_scale: u64,
    v_scale: u64,
    n: i64,
    id: u32,
    group: i32,
    leaf: i64,
}

/// `struct Clip`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Clip {
    norm: f64,
    scale: f32,
    skip: i32,
}

fn memory<T>(v: &mut [T], written: bool) -> HostArg {
    HostArg::Memory { at: v.as_mut_ptr().cast(), bytes: size_of_val(v), offset: 0, written }
}

fn scalar<const N: usize>(bytes: [u8; N]) -> HostArg {
    let mut b = [0; 8];
    b[..N].copy_from_slice(&bytes);
    HostArg::Scalar(b)
}

fn launch(cut: Cut, kernel: &str, blocks: usize, threads: u32, args: &[HostArg]) {
    let grid = Grid { grid: [blocks as u32, 1, 1], block: [threads, 1, 1], shared: 0 };
    OnCpu::new(cut.order).launch("adamw", kernel, grid, args).unwrap();
}

fn start(eight: bool) -> Vec<Parameter> {
    let draw = |i: usize, n: usize| -> Vec<f32> {
        normal(Key::new(3, "start").index(i as u64), &[n], 0.5, DType::F32).unwrap().to_vec1().unwrap()
    };
    let parameter = |(i, n): (usize, &usize)| {
        let master = draw(i, *n);
        let half: Vec<bf16> = master.iter().map(|x| bf16::from_f32(*x)).collect();
        let (moments, codes) = if eight { (0, *n) } else { (*n, 0) };
        Parameter {
            shadow: vec![bf16::NAN; *n],
            half,
            master,
            grad: vec![0.0; *n],
            moments: [vec![0.0; moments], vec![0.0; moments]],
            codes: [vec![0; codes], vec![0; codes]],
            scales: [vec![0.0; codes.div_ceil(256)], vec![0.0; codes.div_ceil(256)]],
        }
    };
    LENGTHS.iter().enumerate().map(parameter).collect()
}

fn grad(step: u32, i: usize) -> Vec<f32> {
    let key = Key::new(4, "grad").index(u64::from(step)).index(i as u64);
    normal(key, &[LENGTHS[i]], 0.1, DType::F32).unwrap().to_vec1().unwrap()
}

/// One step of every parameter by `kernel`; the first parameter has group 0, the others group 1.
fn step(cut: Cut, kernel: &str, params: &mut [Parameter], step: u32) -> Clip {
    let (half, eight) = (kernel.ends_with("bf16"), kernel.starts_with("adamw8"));
    let (mut rows, mut chunks, mut leaf) = (Vec::new(), Vec::new(), 0);
    for (i, p) in params.iter_mut().enumerate() {
        p.grad = grad(step, i);
        let n = LENGTHS[i];
        let at = |f: &mut Vec<f32>| f.as_mut_ptr() as u64;
        let [m, v] = &mut p.moments;
        let [mc, vc] = &mut p.codes;
        let [ms, vs] = &mut p.scales;
        rows.push(Row {
            p: if half { p.half.as_mut_ptr() as u64 } else { at(&mut p.master) },
            shadow: if half { 0 } else { p.shadow.as_mut_ptr() as u64 },
            g: at(&mut p.grad),
            m: if eight { mc.as_mut_ptr() as u64 } else { at(m) },
            v: if eight { vc.as_mut_ptr() as u64 } else { at(v) },
            m_scale: at(ms),
            v_scale: at(vs),
            n: n as i64,
            id: i as u32,
            group: i32::from(i > 0),
            leaf,
        });
        chunks.extend((0..n.div_ceil(cut.chunk)).flat_map(|c| [i as i32, c as i32]));
        leaf += n.div_ceil(4096) as i64;
    }
    let correction = |beta: f64| 1.0 - beta.powi(step as i32);
    let rate = |row: &Row| {
        let g = row.group as usize;
        let keep = (1.0 - LRS[g] * DECAYS[g]) as f32;
        let (size, root) = ((LRS[g] / correction(BETAS[0])) as f32, correction(BETAS[1]).sqrt() as f32);
        [keep.to_bits(), size.to_bits(), root.to_bits(), 1]
    };
    let mut rates: Vec<u32> = rows.iter().flat_map(rate).collect();
    let (mut leaves, mut squares, mut norms) = (vec![f64::NAN; leaf as usize], [f64::NAN; 3], [f64::NAN; GROUPS]);
    let mut clip = [Clip { norm: f64::NAN, scale: f32::NAN, skip: -1 }];
    let blocks = chunks.len() / 2;
    let tables = [memory(&mut rows, false), memory(&mut rates, false)];
    let parts = [memory(&mut chunks, false), scalar((cut.chunk as i32).to_ne_bytes())];
    let args = [tables.as_slice(), &parts, &[memory(&mut leaves, true)]].concat();
    launch(cut, "grad_squares", blocks, cut.threads, &args);
    let sizes = [scalar((LENGTHS.len() as i32).to_ne_bytes()), scalar((GROUPS as i32).to_ne_bytes())];
    let outputs = [memory(&mut squares, true), memory(&mut norms, true), memory(&mut clip, true)];
    let inputs = [memory(&mut leaves, false), scalar(MAX_NORM.to_ne_bytes())];
    launch(cut, "grad_norm", 1, 1024, &[tables.as_slice(), &sizes, &inputs, &outputs].concat());
    let betas = [1.0 - BETAS[0], BETAS[1], 1.0 - BETAS[1], EPS].map(|x| scalar((x as f32).to_ne_bytes()));
    let noise = [7u32, 9, step].map(|x| scalar(x.to_ne_bytes()));
    let args = [tables.as_slice(), &parts[..1], &[memory(&mut clip, false)], &parts[1..], &betas, &noise].concat();
    launch(cut, kernel, blocks, cut.threads, &args);
    clip[0]
}

fn run(cut: Cut, kernel: &str) -> (Vec<Parameter>, Vec<Clip>) {
    let mut params = start(kernel.starts_with("adamw8"));
    let clips = (1..=STEPS).map(|s| step(cut, kernel, &mut params, s)).collect();
    (params, clips)
}

const PLAIN: Cut = Cut { chunk: 4096, threads: 64, order: Order::Forward };

const ELEMENTS: usize = LENGTHS[1];

fn on_kernels<T>(order: Order, f: impl FnOnce() -> T) -> T {
    emulated(Rc::new(OnCpu::new(order)), f)
}

/// What is wrong with the kernels of a folder, in the first form and order in which something is.
pub fn fault(folder: &Path) -> Option<String> {
    FORMS.into_iter().find_map(|form| {
        let reference = train(form, ELEMENTS, &Device::Cpu).unwrap();
        ORDERS.into_iter().find_map(|order| {
            let on_cpu = OnCpu { order, folder: folder.to_path_buf() };
            let ours = match emulated(Rc::new(on_cpu), || train(form, ELEMENTS, &Device::Cpu)) {
                Ok(ours) => ours,
                Err(e) => return Some(format!("{form:?}, {order:?}: {}", e.report())),
            };
            let other = ours.differs(&reference).unwrap()?;
            Some(format!("{form:?}, {order:?}: {other}"))
        })
    })
}

#[test]
fn every_form_has_the_bits_of_the_reference() {
    for form in FORMS {
        let reference = train(form, ELEMENTS, &Device::Cpu).unwrap();
        assert_eq!(reference.tensors.contains_key("b1.exp_avg_scale"), form.moments == MomentType::Eight, "{form:?}");
        assert_eq!(reference.tensors["b2.step"].to_vec1::<u32>().unwrap(), [verify::STEPS - 1]);
        for order in ORDERS {
            let ours = on_kernels(order, || train(form, ELEMENTS, &Device::Cpu)).unwrap();
            assert_eq!(ours.differs(&reference).unwrap(), None, "{form:?} {order:?}");
        }
    }
    let own = |k: &String| (k.starts_with("adamw") || k.starts_with("grad_")) && !k.ends_with("_test");
    let ran = launched();
    let idle: Vec<String> = kernels_of(&OnCpu::new(Order::Forward).folder, &[]).into_iter().filter(own).collect();
    let idle: Vec<&String> = idle.iter().filter(|k| !ran.contains(*k)).collect();
    assert!(idle.is_empty(), "no step runs these kernels: {idle:?}");
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_is_named() {
    let bits = |w: &BTreeMap<String, Weight>| -> Vec<Vec<u32>> {
        let of = |w: &Weight| w.value.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        w.values().map(|w| of(w).into_iter().map(f32::to_bits).collect()).collect()
    };
    for form in FORMS {
        let mut optimizer = verify::optimizer(form, ELEMENTS).unwrap();
        let weights = verify::weights(form, ELEMENTS, &Device::Cpu).unwrap();
        let before = bits(&weights);
        for (bad, kind) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "infinite")] {
            let mut grads = verify::grads(1, ELEMENTS, &Device::Cpu).unwrap();
            grads.insert("b2".into(), Tensor::full(bad, LENGTHS[2], &Device::Cpu).unwrap());
            let e = on_kernels(Order::Forward, || optimizer.step(&weights, &grads)).unwrap_err();
            assert_eq!(e.cause(), format!("the gradient of `b2` is {kind}"));
        }
        assert_eq!(bits(&weights), before, "{form:?}");
        assert_eq!(optimizer.state().unwrap().len(), 1, "{form:?}");
    }
}

#[test]
fn how_a_launch_is_cut_changes_no_bit_and_every_form_follows_the_f32_one() {
    let (exact, _) = run(PLAIN, "adamw_f32");
    for kernel in ["adamw_f32", "adamw_bf16", "adamw8_f32", "adamw8_bf16"] {
        let (first, clips) = run(PLAIN, kernel);
        let cuts = ORDERS.map(|order| Cut { chunk: 8192, threads: 128, order });
        for cut in cuts {
            let (other, c) = run(cut, kernel);
            assert_eq!(c, clips, "{kernel} {cut:?}");
            for (a, b) in first.iter().zip(&other) {
                let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same(&a.master, &b.master) && a.half == b.half && a.codes == b.codes, "{kernel} {cut:?}");
                assert!((0..2).all(|k| same(&a.moments[k], &b.moments[k]) && same(&a.scales[k], &b.scales[k])));
            }
        }
        // Rounding a parameter to bf16 may move it by one place in each step; 8-bit moments bend a step by some percent.
        for (p, e) in first.iter().zip(&exact) {
            let value = |i: usize| if kernel.ends_with("bf16") { p.half[i].to_f32() } else { p.master[i] };
            let room = |x: f32| {
                let rounding = if kernel.ends_with("bf16") { 4.0 * (x.abs() + 0.02) / 128.0 } else { 0.0 };
                rounding + if kernel.starts_with("adamw8") { 0.2 * 3.0 * LRS[0] as f32 } else { 0.0 }
            };
            let off = (0..e.master.len()).find(|i| (value(*i) - e.master[*i]).abs() > room(e.master[*i]));
            assert_eq!(off, None, "{kernel}: {:?}", off.map(|i| (value(i), e.master[i])));
        }
    }
}

#[test]
fn stochastic_rounding_is_exact_over_all_random_words() {
    for x in [1.0f32, -1.0, 1.003_906_3, 1.0 + 1e-4, -3.3, 1e-30, -2.5e-39, 65504.7, 0.0, f32::MAX] {
        let mut out = vec![bf16::NAN; 1 << 16];
        launch(PLAIN, "stochastic_test", 256, 256, &[scalar(x.to_ne_bytes()), memory(&mut out, true)]);
        let (down, low) = (bf16::from_bits((x.to_bits() >> 16) as u16), (x.to_bits() & 0xFFFF) as usize);
        let up = bf16::from_bits(down.to_bits() + u16::from(low > 0));
        assert!(out.iter().all(|y| *y == down || *y == up), "{x}");
        let away = out.iter().filter(|y| **y != down).count();
        assert_eq!(away, low, "{x}: rounded away from zero");
    }
    for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut out = vec![bf16::ZERO; 1 << 16];
        launch(PLAIN, "stochastic_test", 256, 256, &[scalar(x.to_ne_bytes()), memory(&mut out, true)]);
        assert!(out.iter().all(|y| y.to_f32() == x || (x.is_nan() && y.is_nan())), "{x}");
    }
}

#[test]
fn eight_bit_moments_come_back_close_and_without_bias() {
    const N: usize = 5000;
    let draw =
        |what: &str| -> Vec<f32> { normal(Key::new(6, what), &[N], 1.0, DType::F32).unwrap().to_vec1().unwrap() };
    let (mut m, mut v): (Vec<f32>, Vec<f32>) = (draw("m"), draw("v").iter().map(|x| x * x).collect());
    let (mut m_back, mut v_back) = (vec![f32::NAN; N], vec![f32::NAN; N]);
    let inputs = [memory(&mut m, false), memory(&mut v, false)];
    let outputs = [memory(&mut m_back, true), memory(&mut v_back, true), scalar((N as i32).to_ne_bytes())];
    let noise = [1u32, 2, 3].map(|x| scalar(x.to_ne_bytes()));
    launch(PLAIN, "moments8_test", N.div_ceil(256), 32, &[inputs.as_slice(), &outputs, &noise].concat());
    for (x, back, rms) in [(&m, &m_back, 0.03), (&v, &v_back, 0.02)] {
        let sum =
            |f: &dyn Fn(f64, f64) -> f64| x.iter().zip(back).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum::<f64>();
        let size = sum(&|a, _| a * a);
        assert!((sum(&|a, b| (a - b) * (a - b)) / size).sqrt() < rms);
        assert!((sum(&|a, b| a * (b - a)) / size).abs() < 2e-3, "biased");
    }
}
