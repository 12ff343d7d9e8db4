use super::*;
use crate::spec::{ParamGroup, Scheduler, Warmup};
use serde_json::Value;

type Tensors = BTreeMap<String, Tensor>;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/optim/adamw.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tensors(values: &Value, shapes: &Value, dtype: DType) -> Tensors {
    let mut out = Tensors::new();
    for (name, v) in values.as_object().unwrap() {
        let data: Vec<f64> = serde_json::from_value(v.clone()).unwrap();
        let shape: Vec<usize> = serde_json::from_value(shapes[name].clone()).unwrap();
        let t = Tensor::from_vec(data, shape, &Device::Cpu).unwrap();
        out.insert(name.clone(), t.to_dtype(dtype).unwrap());
    }
    out
}

fn optimizer(run: &Value) -> AdamW {
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(run["shapes"].clone()).unwrap();
    let b = ParamGroup { name: Some("b".into()), r#match: vec!["b.*".into()], lr: Some(2e-2), ..Default::default() };
    // The golden has decay 0.1 on `b.weight`, none on `b.bias`, 0.01 on `a.weight`.
    let a = ParamGroup {
        name: Some("a".into()),
        r#match: vec!["a.*".into()],
        weight_decay: Some(0.01),
        ..Default::default()
    };
    let groups = Groups::resolve(&[b, a], 5e-3, 0.1, &shapes).unwrap();
    let warmup = Warmup { warmup_steps: Some(2), warmup_ratio: None };
    let schedule = Schedule::new(&Scheduler::Cosine(warmup), 6);
    let hyper = spec::AdamW { betas: [0.9, 0.95], eps: 1e-6, weight_decay: 0.1, ..Default::default() };
    AdamW::new(hyper, groups, schedule, 1.0, Key::new(1, "noise"))
}

fn worst(a: &Tensors, b: &Tensors) -> f64 {
    assert!(a.keys().eq(b.keys()));
    let diff = |(x, y): (&Tensor, &Tensor)| {
        let d = (x.to_dtype(DType::F64).unwrap() - y.to_dtype(DType::F64).unwrap()).unwrap();
        d.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap()
    };
    a.values().zip(b.values()).map(diff).fold(0.0, f64::max)
}

fn follows_torch(dtype: DType, key: &str, tolerance: f64) {
    let all = golden();
    let run = &all[key];
    let params = tensors(&run["start"], &run["shapes"], dtype);
    let mut opt = optimizer(run);
    let mut clipped = 0;
    for (s, row) in run["steps"].as_array().unwrap().iter().enumerate() {
        let report = opt.step(&Weight::plain(&params), &tensors(&row["grads"], &run["shapes"], dtype)).unwrap();
        let want = row["grad_norm"].as_f64().unwrap();
        assert!((report.grad_norm - want).abs() < 1e-6 * want, "norm in step {s}");
        for group in &report.groups {
            let grads = row["grads"].as_object().unwrap().iter().filter(|(n, _)| n.starts_with(&group.name));
            let want: f64 = grads.flat_map(|(_, g)| g.as_array().unwrap()).map(|x| x.as_f64().unwrap().powi(2)).sum();
            assert!((group.grad_norm - want.sqrt()).abs() < 1e-9, "norm of group {} in step {s}", group.name);
        }
        clipped += usize::from(report.clip < 1.0);
        assert_eq!((report.groups[0].name.as_str(), report.groups[0].lr), ("b", row["lr"]["b"].as_f64().unwrap()));
        assert_eq!(report.groups[1].lr, row["lr"]["default"].as_f64().unwrap());
        let off = worst(&params, &tensors(&row["params"], &run["shapes"], dtype));
        assert!(off <= tolerance, "{key} step {s}: {off:e} away from torch");
    }
    assert!(clipped > 0 && clipped < 6, "the golden must clip in some steps only");
}

#[test]
fn follows_torch_in_f32() {
    follows_torch(DType::F32, "f32", 3e-7);
}

#[test]
fn follows_torch_in_f64() {
    follows_torch(DType::F64, "f64", 1e-12);
}

/// The textbook formula, one scalar, in plain f64.
#[test]
fn follows_the_formula() {
    let (lr, decay, [b1, b2], eps) = (1e-2, 0.05, [0.9, 0.999], 1e-8);
    let shapes = BTreeMap::from([("w".to_string(), vec![1, 1])]);
    let groups = Groups::resolve(&[], lr, decay, &shapes).unwrap();
    let constant = Schedule::new(&Scheduler::Constant(Warmup::default()), 10);
    let hyper = spec::AdamW { betas: [b1, b2], eps, weight_decay: decay, ..Default::default() };
    let mut opt = AdamW::new(hyper, groups, constant, 0.0, Key::new(1, "noise"));
    let w = Tensor::new(&[[0.7f64]], &Device::Cpu).unwrap();
    let params = Tensors::from([("w".to_string(), w.clone())]);
    let (mut p, mut m, mut v) = (0.7f64, 0.0, 0.0);
    for t in 1..=10 {
        let g = (t as f64).sin() * 3.0;
        let grad = Tensor::new(&[[g]], &Device::Cpu).unwrap();
        opt.step(&Weight::plain(&params), &Tensors::from([("w".to_string(), grad)])).unwrap();
        m = b1 * m + (1.0 - b1) * g;
        v = b2 * v + (1.0 - b2) * g * g;
        let (mh, vh) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
        p = p * (1.0 - lr * decay) - lr * mh / (vh.sqrt() + eps);
        // `w` is a clone of what the optimizer was given: it sees the update.
        let got = w.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((got - p).abs() < 1e-14, "step {t}: {got} {p}");
    }
}

#[test]
fn a_resumed_optimizer_continues_to_the_bit() {
    let all = golden();
    let run = &all["f32"];
    let rows = run["steps"].as_array().unwrap();
    let grads = |s: usize| tensors(&rows[s]["grads"], &run["shapes"], DType::F32);
    let params = tensors(&run["start"], &run["shapes"], DType::F32);
    let mut unbroken = optimizer(run);
    for s in 0..3 {
        unbroken.step(&Weight::plain(&params), &grads(s)).unwrap();
    }
    let copy: Tensors = params.iter().map(|(n, t)| (n.clone(), t.copy().unwrap())).collect();
    let mut resumed = optimizer(run);
    resumed.load_state(&unbroken.state().unwrap()).unwrap();
    assert_eq!(resumed.steps_done(), 3);
    for s in 3..6 {
        let a = unbroken.step(&Weight::plain(&params), &grads(s)).unwrap();
        let b = resumed.step(&Weight::plain(&copy), &grads(s)).unwrap();
        assert_eq!(a, b);
    }
    assert_eq!(worst(&params, &copy), 0.0);
    let (a, b) = (unbroken.state().unwrap(), resumed.state().unwrap());
    assert_eq!(worst(&a, &b), 0.0);
    assert_eq!(a["b.bias.step"].to_vec1::<u32>().unwrap(), [5], "no gradient in one of the six steps");
    assert_eq!(a["step"].to_vec1::<u32>().unwrap(), [6]);
}

#[test]
fn bad_gradients_change_nothing_and_are_named() {
    let all = golden();
    let run = &all["f32"];
    let start = tensors(&run["start"], &run["shapes"], DType::F32);
    let params: Tensors = start.iter().map(|(n, t)| (n.clone(), t.copy().unwrap())).collect();
    let mut opt = optimizer(run);
    let good = tensors(&run["steps"][1]["grads"], &run["shapes"], DType::F32);
    let mut refuse = |name: &str, grad: Tensor, says: &str| {
        let mut grads = good.clone();
        grads.insert(name.into(), grad);
        let e = opt.step(&Weight::plain(&params), &grads).unwrap_err();
        assert!(e.cause().contains(name) && e.cause().contains(says), "{e}");
        assert_eq!((worst(&params, &start), opt.steps_done()), (0.0, 0));
    };
    let nan = Tensor::full(f32::NAN, (5, 3), &Device::Cpu).unwrap();
    refuse("b.weight", nan.clone(), "NaN");
    refuse("b.weight", nan.t().unwrap(), "shape");
    refuse("b.weight", Tensor::zeros((5, 3), DType::F64, &Device::Cpu).unwrap(), "f32");
    refuse("c.weight", nan, "not among the trained parameters");
    let few = Tensors::from([("a.weight".to_string(), params["a.weight"].clone())]);
    assert!(opt.step(&Weight::plain(&few), &good).unwrap_err().cause().contains("b.bias"));
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let all = golden();
    let run = &all["f32"];
    let params = tensors(&run["start"], &run["shapes"], DType::F32);
    let mut opt = optimizer(run);
    opt.step(&Weight::plain(&params), &tensors(&run["steps"][0]["grads"], &run["shapes"], DType::F32)).unwrap();
    let good = opt.state().unwrap();
    let mut refuse = |change: &dyn Fn(&mut Tensors), says: &str| {
        let mut state = good.clone();
        change(&mut state);
        let e = optimizer(run).load_state(&state).unwrap_err();
        assert!(e.cause().contains(says), "{e} does not say {says}");
        assert_eq!(opt.load_state(&state).unwrap_err().cause(), e.cause());
        assert_eq!(opt.steps_done(), 1);
    };
    let vector = || Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    refuse(&|s| drop(s.remove("step")), "no `step`");
    refuse(&|s| drop(s.remove("a.weight.exp_avg_sq")), "no `a.weight.exp_avg_sq`");
    refuse(&|s| drop(s.remove("a.weight.exp_avg")), "no `a.weight.exp_avg`");
    refuse(&|s| drop(s.insert("a.weight.exp_avg".into(), vector())), "a.weight.exp_avg` is F32 [2]");
    refuse(&|s| drop(s.insert("z.exp_avg".into(), vector())), "`z` is not trained now");
    refuse(&|s| drop(s.insert("a.weight.max".into(), vector())), "unknown `a.weight.max`");
    refuse(&|s| drop(s.insert("b.bias.step".into(), vector())), "not one number");
}

/// A constant gradient moves each weight by lr a step: 1e-4, where bf16 has a step of 8e-3 at 1.
#[test]
fn stochastic_rounding_moves_weights_on_the_average_by_steps_below_a_place() {
    const N: usize = 4096;
    let shapes = BTreeMap::from([("w".to_string(), vec![N])]);
    for moments in [MomentType::F32, MomentType::Eight] {
        let groups = Groups::resolve(&[], 1e-4, 0.0, &shapes).unwrap();
        let constant = Schedule::new(&Scheduler::Constant(Warmup::default()), 50);
        let hyper = spec::AdamW { moments, ..Default::default() };
        let mut opt = AdamW::new(hyper, groups, constant, 0.0, Key::new(1, "noise"));
        let w = Tensor::full(half::bf16::from_f32(1.25), N, &Device::Cpu).unwrap();
        let params = Weight::plain(&Tensors::from([("w".to_string(), w.clone())]));
        let grads = Tensors::from([("w".to_string(), Tensor::full(0.3f32, N, &Device::Cpu).unwrap())]);
        for _ in 0..50 {
            opt.step(&params, &grads).unwrap();
        }
        let mean = w.to_dtype(DType::F64).unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap();
        // 50 steps of 1e-4; a mean of 4096 roundings of ±4e-3 · √(50 · 0.013) deviates by about 1e-5.
        assert!((mean - 1.245).abs() < 1e-4, "{moments:?}: {mean}");
    }
}

#[test]
fn eight_bit_moments_resume_to_the_bit_and_are_not_taken_for_f32() {
    const N: usize = 5000;
    let shapes = BTreeMap::from([("small".to_string(), vec![7]), ("w".to_string(), vec![N])]);
    let optimizer = |moments| {
        let groups = Groups::resolve(&[], 1e-2, 0.0, &shapes).unwrap();
        let constant = Schedule::new(&Scheduler::Constant(Warmup::default()), 6);
        AdamW::new(spec::AdamW { moments, ..Default::default() }, groups, constant, 1.0, Key::new(1, "noise"))
    };
    let draw = |what: &str, n: usize| crate::ops::random::normal(Key::new(2, what), &[n], 1.0, DType::F32).unwrap();
    let grads = |s: usize| {
        let of = |(name, shape): (&String, &Vec<usize>)| (name.clone(), draw(&format!("{name}{s}"), shape[0]));
        shapes.iter().map(of).collect::<Tensors>()
    };
    let params: Tensors = shapes.iter().map(|(n, s)| (n.clone(), draw(n, s[0]))).collect();
    let mut unbroken = optimizer(MomentType::Eight);
    assert_eq!(unbroken.bytes_to_come(&Device::Cpu), 7 * 8 + 2 * (5000 + 4 * 20));
    for s in 0..3 {
        unbroken.step(&Weight::plain(&params), &grads(s)).unwrap();
    }
    assert_eq!(unbroken.bytes_to_come(&Device::Cpu), 0);
    let state = unbroken.state().unwrap();
    assert_eq!((state["w.exp_avg"].dtype(), state["small.exp_avg"].dtype()), (DType::U8, DType::F32));
    let copy: Tensors = params.iter().map(|(n, t)| (n.clone(), t.copy().unwrap())).collect();
    let mut resumed = optimizer(MomentType::Eight);
    resumed.load_state(&state).unwrap();
    for s in 3..6 {
        let a = unbroken.step(&Weight::plain(&params), &grads(s)).unwrap();
        assert_eq!(a, resumed.step(&Weight::plain(&copy), &grads(s)).unwrap());
    }
    assert_eq!(worst(&params, &copy), 0.0);
    assert_eq!(worst(&unbroken.state().unwrap(), &resumed.state().unwrap()), 0.0);

    let e = optimizer(MomentType::F32).load_state(&state).unwrap_err();
    assert!(e.cause().contains("`w.exp_avg` is U8: its moments are 8bit, the recipe says f32"), "{e}");
    let mut f32_state = state.clone();
    f32_state.insert("w.exp_avg".into(), draw("m", N));
    let e = optimizer(MomentType::Eight).load_state(&f32_state).unwrap_err();
    assert!(e.cause().contains("its moments are f32, the recipe says 8bit"), "{e}");
    f32_state.remove("w.exp_avg_sq_scale");
    f32_state.insert("w.exp_avg".into(), state["w.exp_avg"].clone());
    let e = optimizer(MomentType::Eight).load_state(&f32_state).unwrap_err();
    assert!(e.cause().contains("no `w.exp_avg_sq_scale`"), "{e}");
}
