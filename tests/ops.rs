//! Every op of the registry in f64 against finite differences and against candle's composed ops, and in f32 against f64.

use adfreeze::ops::random::{Key, normal};
use adfreeze::ops::registry::{Case, all};
use candle_core::{DType, Tensor, Var};

fn inputs(case: &Case, dtype: DType) -> Vec<Tensor> {
    let key = Key::new(7, &format!("{} {}", case.op, case.label));
    let draw = |(i, s): (usize, &Vec<usize>)| {
        normal(key.index(i as u64), s, 1.0, DType::F64).unwrap().to_dtype(dtype).unwrap()
    };
    case.inputs.iter().enumerate().map(draw).collect()
}

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference, relative to the largest value (at least 1).
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let scale = b.iter().fold(1f64, |m, x| m.max(x.abs()));
    a.iter()
        .zip(&b)
        .map(|(x, y)| if x.is_nan() || y.is_nan() { f64::INFINITY } else { (x - y).abs() / scale })
        .fold(0.0, f64::max)
}

fn upstream(case: &Case, y: &Tensor) -> Tensor {
    normal(Key::new(9, &case.label), y.dims(), 1.0, DType::F64).unwrap()
}

/// d Σ y·g / d input at up to 12 places by central differences.
fn finite_differences(case: &Case, x: &[Tensor], which: usize, g: &Tensor, grad: &Tensor) -> f64 {
    let (h, base, grad) = (1e-6, flat(&x[which]), flat(grad));
    let loss = |v: Vec<f64>| {
        let mut x = x.to_vec();
        x[which] = Tensor::from_vec(v, x[which].shape(), x[which].device()).unwrap();
        let y = (case.forward)(&x).unwrap();
        (y * g).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let mut worst = 0f64;
    for i in (0..base.len()).step_by(base.len().div_ceil(12)) {
        let at = |d: f64| {
            let mut v = base.clone();
            v[i] += d;
            loss(v)
        };
        worst = worst.max(((at(h) - at(-h)) / (2.0 * h) - grad[i]).abs() / grad[i].abs().max(1.0));
    }
    worst
}

#[test]
fn every_op_against_finite_differences_and_composed_candle() {
    for case in all() {
        let name = format!("{} {}", case.op, case.label);
        let x = inputs(&case, DType::F64);
        let y = (case.forward)(&x).unwrap();
        let g = upstream(&case, &y);
        let grads = (case.backward)(&x, &g).unwrap();
        let vars: Vec<Var> = x.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let oracle = (case.oracle)(&tracked).unwrap();
        assert!(distance(&y, &oracle.detach()) < 1e-12, "{name}: forward differs by {:e}", distance(&y, &oracle));
        let store = (&oracle * &g).unwrap().sum_all().unwrap().backward().unwrap();
        for (i, grad) in grads.iter().enumerate() {
            let Some(grad) = grad else { continue };
            let d = distance(grad, store.get(&vars[i]).unwrap());
            assert!(d < 1e-11, "{name}: gradient of input {i} differs from composed candle by {d:e}");
            let d = finite_differences(&case, &x, i, &g, grad);
            assert!(d < 1e-5, "{name}: gradient of input {i} differs from finite differences by {d:e}");
        }
        let x32 = inputs(&case, DType::F32);
        let (y32, g32) = ((case.forward)(&x32).unwrap(), g.to_dtype(DType::F32).unwrap());
        assert!(distance(&y32, &y) < 5e-6, "{name}: f32 forward is off by {:e}", distance(&y32, &y));
        for (a, b) in (case.backward)(&x32, &g32).unwrap().iter().zip(&grads) {
            if let (Some(a), Some(b)) = (a, b) {
                assert!(distance(a, b) < 2e-5, "{name}: f32 gradient is off by {:e}", distance(a, b));
            }
        }
    }
}

#[test]
fn wrong_shapes_are_errors_not_panics() {
    use adfreeze::ops::attention::{Config, Segment, Skip, forward};
    use adfreeze::ops::matmul::{Mat, linear, matmul_add};
    let t = |r: usize, c: usize| Tensor::zeros((r, c), DType::F32, &candle_core::Device::Cpu).unwrap();
    assert!(linear(&t(2, 3), &t(4, 5), None).unwrap_err().to_string().contains("inner sizes 3 and 5"));
    assert!(matmul_add(&t(2, 2), 1.0, Mat::N(&t(2, 3)), Mat::N(&t(3, 4))).is_err());
    assert!(adfreeze::ops::embedding::gather(&t(2, 3), &[2]).unwrap_err().to_string().contains("index 2"));
    let cfg = Config { heads: 1, kv_heads: 1, head_dim: 3, causal: true };
    let skip = |from, keys| vec![Segment { q: 0..2, k: 0..4, skip: Some(Skip { from, keys }) }].into();
    for segments in [skip(0, 2..5), skip(3, 1..2)] {
        let e = forward(cfg, &segments, &t(2, 3), &t(4, 3), &t(4, 3)).unwrap_err();
        assert!(e.to_string().contains("skips keys"), "{e}");
    }
    assert!(forward(cfg, &skip(2, 1..4), &t(2, 3), &t(4, 3), &t(4, 3)).is_ok());
    let e = adfreeze::ops::attention::blockwise::forward(cfg, &[], &t(2, 3), &t(4, 3), &t(4, 3)).unwrap_err();
    assert!(e.to_string().contains("nothing here runs kernels"), "{e}");
}
