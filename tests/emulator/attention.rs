//! The ways to compute attention against each other: kernels on tensor cores and by blocks within FlashAttention's rule,
//! and two answers behind one prompt against two sequences.

use super::emulator::{OnCpu, Order};
use adfreeze::error::Result;
use adfreeze::ops::attention::{Config, Saved, Segment, Sequences, backward, blockwise, forward};
use adfreeze::ops::launch::emulated;
use adfreeze::ops::random::{Key, normal};
use adfreeze::ops::registry::verify::distance;
use candle_core::{D, DType, Device, Tensor};
use std::rc::Rc;

/// o, dq, dk, dv and log-sum-exp.
type Values = [Tensor; 5];

fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Chosen,
    ByBlocks,
}

/// q, k, v, dO for `n` queries and `m` keys.
fn draw(cfg: Config, n: usize, m: usize, dtype: DType) -> [Tensor; 4] {
    let widths = [(n, cfg.heads), (m, cfg.kv_heads), (m, cfg.kv_heads), (n, cfg.heads)];
    let mut i = 0;
    widths.map(|(rows, heads)| {
        i += 1;
        let key = Key::new(3, "attention").index(i);
        normal(key, &[rows, heads * cfg.head_dim], 1.0, DType::F64).unwrap().to_dtype(dtype).unwrap()
    })
}

fn values(way: Way, cfg: Config, sequences: &Sequences, [q, k, v, d_o]: &[Tensor; 4]) -> Values {
    let run = || -> Result<Values> {
        let (o, lse) = match way {
            Way::Chosen => forward(cfg, sequences, q, k, v)?,
            Way::ByBlocks => blockwise::forward(cfg, sequences, q, k, v)?,
        };
        let saved = Saved { q, k, v, o: &o, lse: &lse };
        let (dq, dk, dv) = match way {
            Way::Chosen => backward(cfg, sequences, saved, d_o)?,
            Way::ByBlocks => blockwise::backward(cfg, sequences, saved, d_o)?,
        };
        Ok([o, dq, dk, dv, lse])
    };
    run().unwrap_or_else(|e| panic!("{cfg:?}: {}", e.report()))
}

fn on_kernels(way: Way, cfg: Config, sequences: &Sequences, x: &[Tensor; 4]) -> Values {
    emulated(Rc::new(OnCpu::new(Order::Forward)), || values(way, cfg, sequences, x))
}

fn to(x: &[Tensor; 4], dtype: DType) -> [Tensor; 4] {
    x.each_ref().map(|t| t.to_dtype(dtype).unwrap())
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    flat(a)
        .iter()
        .zip(&flat(b))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

/// o, dq, dk, dv of one sequence with one head as ops on bf16 tensors give them: every result is rounded to bf16, sums
/// are in f32.
fn plain_bf16(causal: bool, x: &[Tensor; 4]) -> [Tensor; 4] {
    let run = || -> candle_core::Result<[Tensor; 4]> {
        let round = |t: Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let product = |a: &Tensor, b: &Tensor| round(a.contiguous()?.matmul(&b.contiguous()?)?);
        let [q, k, v, d_o] = to(x, DType::F32);
        let ((n, d), m) = (q.dims2()?, k.dim(0)?);
        let scale = 1.0 / (d as f64).sqrt();
        let hidden = |i: usize| causal && i % m + n > i / m + m;
        let mask: Vec<f32> = (0..n * m).map(|i| if hidden(i) { f32::NEG_INFINITY } else { 0.0 }).collect();
        let scores = round((product(&q, &k.t()?)? * scale)?)?;
        let scores = (scores + Tensor::from_vec(mask, (n, m), &Device::Cpu)?)?;
        let p = round(candle_nn::ops::softmax(&scores, D::Minus1)?)?;
        let dp = product(&d_o, &v.t()?)?;
        let delta = (&p * &dp)?.sum_keepdim(D::Minus1)?;
        let ds = round((round((&p * dp.broadcast_sub(&delta)?)?)? * scale)?)?;
        Ok([product(&p, &v)?, product(&ds, &k)?, product(&ds.t()?, &q)?, product(&p.t()?, &d_o)?])
    };
    run().unwrap()
}

#[test]
fn kernels_on_tensor_cores_and_by_blocks_err_no_more_than_plain_bf16() {
    for (head_dim, n, m, causal) in [(64, 150, 150, true), (128, 70, 200, false), (80, 90, 131, true)] {
        let cfg = Config { heads: 1, kv_heads: 1, head_dim, causal };
        let segments = Sequences::from(vec![Segment::new(0..n, 0..m)]);
        let x = draw(cfg, n, m, DType::BF16);
        let truth = values(Way::Chosen, cfg, &segments, &to(&x, DType::F64));
        let plain = plain_bf16(causal, &x);
        let tensor_cores = on_kernels(Way::Chosen, cfg, &segments, &x);
        let by_blocks = on_kernels(Way::ByBlocks, cfg, &segments, &x);
        for (i, (what, factor)) in [("o", 2.0), ("dq", 3.0), ("dk", 3.0), ("dv", 3.0)].into_iter().enumerate() {
            let off = |t: &Tensor| largest_difference(t, &truth[i]);
            let (cores, blocks, plain) = (off(&tensor_cores[i]), off(&by_blocks[i]), off(&plain[i]));
            assert!(cores <= factor * plain, "{cfg:?} {what}: off by {cores:.2e}, plain bf16 by {plain:.2e}");
            assert!(blocks <= plain, "{cfg:?} {what}: by blocks off by {blocks:.2e}, plain bf16 by {plain:.2e}");
            let apart = largest_difference(&tensor_cores[i], &by_blocks[i]);
            assert!(apart <= factor * plain, "{cfg:?} {what}: {apart:.2e} apart, plain bf16 off by {plain:.2e}");
        }
        for lse in [&tensor_cores[4], &by_blocks[4]] {
            assert!(largest_difference(lse, &truth[4]) < 1e-5, "{cfg:?}: {:e}", largest_difference(lse, &truth[4]));
        }
    }
}

#[test]
fn two_answers_behind_one_prompt_are_two_sequences() {
    let (prompt, first, second) = (37, 70, 45);
    let total = prompt + first + second;
    let rows = |t: &Tensor, from: usize, n: usize| t.narrow(0, from, n).unwrap();
    let stacked = |parts: &[Tensor]| Tensor::cat(parts, 0).unwrap();
    for (dtype, head_dim, kernels, most) in
        [(DType::F64, 40, false, 1e-13), (DType::F32, 40, true, 2e-6), (DType::BF16, 64, true, 6e-3)]
    {
        let cfg = Config { heads: 2, kv_heads: 1, head_dim, causal: true };
        let run = |segments: Vec<Segment>, x: &[Tensor; 4]| match kernels {
            true => on_kernels(Way::Chosen, cfg, &segments.into(), x),
            false => values(Way::Chosen, cfg, &segments.into(), x),
        };
        let x = draw(cfg, total, total, dtype);
        let shared = run(vec![Segment::two_answers(0, prompt, first, second)], &x);
        // The prompt once more before the second answer, there without a gradient.
        let mut apart = x
            .each_ref()
            .map(|t| stacked(&[rows(t, 0, prompt + first), rows(t, 0, prompt), rows(t, prompt + first, second)]));
        let none = rows(&x[3], 0, prompt).zeros_like().unwrap();
        apart[3] = stacked(&[rows(&x[3], 0, prompt + first), none, rows(&x[3], prompt + first, second)]);
        let (one, two) = (0..prompt + first, prompt + first..prompt + total);
        let apart = run(vec![Segment::new(one.clone(), one), Segment::new(two.clone(), two)], &apart);
        for (what, (shared, apart)) in ["o", "dq", "dk", "dv", "lse"].iter().zip(shared.iter().zip(&apart)) {
            let mut head = rows(apart, 0, prompt);
            let again = rows(apart, prompt + first, prompt);
            if what.starts_with('d') {
                // Both answers' share, as one sum.
                let sum = (head.to_dtype(DType::F64).unwrap() + again.to_dtype(DType::F64).unwrap()).unwrap();
                head = sum.to_dtype(apart.dtype()).unwrap();
            } else {
                assert_eq!(flat(&head), flat(&again), "{dtype:?} {what}: the prompt differs from itself");
            }
            let expected = stacked(&[head, rows(apart, prompt, first), rows(apart, 2 * prompt + first, second)]);
            let off = distance(shared, &expected).unwrap();
            assert!(off < most, "{dtype:?} {what}: off by {off:.2e}");
        }
    }
}
