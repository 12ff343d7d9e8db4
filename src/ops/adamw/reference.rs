//! AdamW on the CPU. On full moments each operation is rounded where `torch.optim.AdamW` rounds (its single-tensor path), in
//! the parameter's own type; elements are independent, so the result does not depend on how they are spread over threads.

use super::super::philox::philox4x32;
use super::super::{Real, data, update};
use super::{BLOCK, Codes, Gradient, Moments, Norms, Parameter, Rate, Step, clip};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor, WithDType};
use half::bf16;
use rayon::prelude::*;

/// Elements of a task: whole blocks of 8-bit moments, and whole octets of noise.
const CHUNK: usize = 64 * BLOCK;
/// Elements of a partial sum of the norm, as in the kernels.
const LEAF: usize = 4096;

/// The update of [`super::step`].
pub(super) fn step(params: &[Parameter], s: &Step) -> Result<Norms> {
    let mut squares = Vec::with_capacity(params.len());
    for p in params {
        squares.push(p.update.as_ref().map_or(Ok(0.0), |u| super::sum_of_squares(u.grad))?);
    }
    let by_group = |g: usize| {
        let mut lanes = [0.0; 32];
        squares.iter().enumerate().filter(|(i, _)| params[*i].group == g).for_each(|(i, x)| lanes[i % 32] += x);
        warp_sum(lanes)
    };
    let groups: Vec<f64> = (0..s.groups).map(by_group).collect();
    let sum: f64 = groups.iter().sum();
    let (total, skipped) = (sum.sqrt(), !sum.is_finite());
    let clip = if skipped { 0.0 } else { clip(total, s.max_norm) };
    let norms = Norms { total, clip, skipped, groups: groups.iter().map(|g| g.sqrt()).collect(), squares };
    if skipped {
        return Ok(norms);
    }
    for (id, p) in params.iter().enumerate() {
        let Some(u) = &p.update else { continue };
        let (value, noise) = (&p.weight.value, Noise { key: s.noise.pair(), step: s.index, id: id as u32 });
        match (value.dtype(), u.moments) {
            (DType::F32, Moments::Full { mean, square }) => full::<f32>([value, mean, square], u, s, clip, noise)?,
            (DType::F64, Moments::Full { mean, square }) => full::<f64>([value, mean, square], u, s, clip, noise)?,
            (DType::BF16, Moments::Full { mean, square }) => full::<bf16>([value, mean, square], u, s, clip, noise)?,
            (DType::F32, Moments::Eight { mean, square }) => eight::<f32>(value, [mean, square], u, s, clip, noise)?,
            (DType::BF16, Moments::Eight { mean, square }) => eight::<bf16>(value, [mean, square], u, s, clip, noise)?,
            (other, _) => bail!("parameters are f32 or bf16, or f64 with moments of their type; not {other:?}"),
        }
        p.weight.round()?;
    }
    Ok(norms)
}

/// Σ x² as the kernels add it up: leaves of 4096 elements, in each of which lane l of a warp takes the elements with
/// e / 4 mod 32 = l, in four sums; then the leaves, lane by lane.
pub(super) fn sum_of_squares<T: Real>(x: &[T]) -> f64 {
    let leaf = |x: &[T]| {
        let mut sums = [0.0; 128];
        for part in x.chunks(128) {
            for (sum, x) in sums.iter_mut().zip(part) {
                let x = x.f64();
                *sum += x * x;
            }
        }
        let lane = |l: usize| (sums[4 * l] + sums[4 * l + 1]) + (sums[4 * l + 2] + sums[4 * l + 3]);
        warp_sum(std::array::from_fn(lane))
    };
    let leaves: Vec<f64> = x.par_chunks(LEAF).map(leaf).collect();
    let mut lanes = [0.0; 32];
    leaves.iter().enumerate().for_each(|(i, x)| lanes[i % 32] += x);
    warp_sum(lanes)
}

/// A warp's sum by butterflies.
fn warp_sum(mut lanes: [f64; 32]) -> f64 {
    for o in [16, 8, 4, 2, 1] {
        lanes = std::array::from_fn(|l| lanes[l] + lanes[l ^ o]);
    }
    lanes[0]
}

/// The noise of one parameter in one step: 16 bits an element, a word of Philox for two.
#[derive(Clone, Copy)]
struct Noise {
    key: [u32; 2],
    step: u32,
    id: u32,
}

impl Noise {
    /// Of the eight elements of which `e` is one.
    fn octet(self, e: usize, stream: u32) -> [u32; 8] {
        let words = philox4x32(self.key, [self.step, self.id, (e / 8) as u32, stream]);
        std::array::from_fn(|k| words[k / 2] >> (k % 2 * 16) & 0xffff)
    }
}

/// How a parameter's elements are stored.
trait Stored: WithDType + Send + Sync {
    /// What is computed in.
    type Wide: Real;
    /// Does storing take noise?
    const NOISY: bool;
    fn widen(self) -> Self::Wide;
    fn store(x: Self::Wide, random: u32) -> Self;
}

macro_rules! plain {
    ($t:ty) => {
        impl Stored for $t {
            type Wide = $t;
            const NOISY: bool = false;
            fn widen(self) -> $t {
                self
            }
            fn store(x: $t, _: u32) -> $t {
                x
            }
        }
    };
}
plain!(f32);
plain!(f64);

impl Stored for bf16 {
    type Wide = f32;
    const NOISY: bool = true;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    /// Away from zero for as many of the 65,536 values of `random` as the low 16 bits of `x` say; NaN stays NaN.
    fn store(x: f32, random: u32) -> Self {
        let bits = x.to_bits();
        bf16::from_bits(if x.is_nan() { (bits | 0x40_0000) >> 16 } else { bits.wrapping_add(random) >> 16 } as u16)
    }
}

/// Factors of an update in the type that it computes in.
#[derive(Clone, Copy)]
struct Factors<T> {
    clip: T,
    w1: T,
    beta2: T,
    w2: T,
    eps: T,
    keep: T,
    size: T,
    correction: T,
}

impl<T: Real> Factors<T> {
    fn new(s: &Step, r: Rate, clip: f64) -> Self {
        let [b1, b2] = s.betas;
        let of = |x: f64| <T as Real>::of(x);
        let (w1, beta2, w2, eps) = (of(1.0 - b1), of(b2), of(1.0 - b2), of(s.eps));
        Self { clip: of(clip), w1, beta2, w2, eps, keep: of(r.keep), size: of(r.size), correction: of(r.correction) }
    }
}

/// Runs `f` on the elements of three tensors, which it may write.
fn in_place<A: WithDType, B: WithDType, C: WithDType>(
    [a, b, c]: [&Tensor; 3],
    f: impl FnOnce(&mut [A], &mut [B], &mut [C]),
) -> Result<()> {
    let mut inner = Ok(());
    update::<A>(a, |a| {
        let mut innermost = Ok(());
        inner = update::<B>(b, |b| innermost = update::<C>(c, |c| f(a, b, c))).and(innermost);
    })?;
    inner
}

fn full<P: Stored>(tensors: [&Tensor; 3], u: &Gradient, s: &Step, clip: f64, noise: Noise) -> Result<()> {
    let grad = u.grad.contiguous()?;
    let g = data::<P::Wide>(&grad)?;
    let (g, f): (&[P::Wide], _) = (&g, Factors::<P::Wide>::new(s, u.rate, clip));
    in_place::<P, P::Wide, P::Wide>(tensors, |p, m, v| {
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(moments);
        chunks.enumerate().for_each(|(c, ((p, g), (m, v)))| {
            let mut random = [0; 8];
            for (i, ((p, g), (m, v))) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)).enumerate() {
                if P::NOISY && i % 8 == 0 {
                    random = noise.octet(c * CHUNK + i, 0);
                }
                let g = *g * f.clip;
                *m = *m + f.w1 * (g - *m);
                *v = *v * f.beta2 + f.w2 * g * g;
                let x = p.widen() * f.keep - f.size * *m / (num_traits::Float::sqrt(*v) / f.correction + f.eps);
                *p = P::store(x, random[i % 8]);
            }
        });
    })
}

/// A block's largest |m| below this counts as 0: 127⁴ over less overflows.
const NEGLIGIBLE: f32 = 1e-30;
const M_TOP: f32 = 127.0 * 127.0 * 127.0 * 127.0;
const V_TOP: f32 = 255.0 * 255.0;
/// Added to a small f32, it leaves the nearest whole number in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Squares of what is larger overflow.
const LARGEST_ROOT: f32 = 1.8e19;

fn eight<P: Stored<Wide = f32>>(
    value: &Tensor,
    [m, v]: [&Codes; 2],
    u: &Gradient,
    s: &Step,
    clip: f64,
    noise: Noise,
) -> Result<()> {
    let grad = u.grad.contiguous()?;
    let g = data::<f32>(&grad)?;
    let (g, f): (&[f32], _) = (&g, Factors::<f32>::new(s, u.rate, clip));
    let mut inner = Ok(());
    in_place::<P, u8, u8>([value, &m.codes, &v.codes], |p, m_codes, v_codes| {
        let mut run = |m_scales: &mut [f32], v_scales: &mut [f32]| {
            let codes = m_codes.par_chunks_mut(BLOCK).zip(v_codes.par_chunks_mut(BLOCK));
            let scales = m_scales.par_iter_mut().zip(v_scales);
            let blocks = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(codes).zip(scales);
            blocks.enumerate().for_each(|(b, (((p, g), codes), scales))| block(b, p, g, codes, scales, f, noise));
        };
        let mut innermost = Ok(());
        inner = update::<f32>(&m.scales, |ms| innermost = update::<f32>(&v.scales, |vs| run(ms, vs))).and(innermost);
    })?;
    inner
}

/// One block of up to 256 elements, the `at`-th of its parameter; `v` is stored as its root.
fn block<P: Stored<Wide = f32>>(
    at: usize,
    p: &mut [P],
    g: &[f32],
    (m_codes, v_codes): (&mut [u8], &mut [u8]),
    (m_scale, v_scale): (&mut f32, &mut f32),
    f: Factors<f32>,
    noise: Noise,
) {
    let (m_unit, v_unit, per_correction) = (*m_scale / M_TOP, *v_scale / V_TOP, 1.0 / f.correction);
    let (mut mean, mut root, mut random) = ([0f32; BLOCK], [0f32; BLOCK], [0; 8]);
    for (i, p) in p.iter_mut().enumerate() {
        if P::NOISY && i % 8 == 0 {
            random = noise.octet(at * BLOCK + i, 0);
        }
        let c = f32::from(m_codes[i] as i8);
        let (m, c2) = (c * c.abs() * (c * c) * m_unit, f32::from(v_codes[i]));
        let old = c2 * c2 * v_unit;
        let g = g[i] * f.clip;
        mean[i] = m + f.w1 * (g - m);
        root[i] = (old * old * f.beta2 + f.w2 * g * g).sqrt().min(LARGEST_ROOT);
        let x = p.widen() * f.keep - f.size * mean[i] / (root[i] * per_correction + f.eps);
        *p = P::store(x, random[i % 8]);
    }
    let n = p.len();
    let largest = |x: &[f32; BLOCK]| x[..n].iter().fold(0f32, |top, x| top.max(x.abs()));
    (*m_scale, *v_scale) = (largest(&mean), largest(&root));
    if *m_scale < NEGLIGIBLE {
        *m_scale = 0.0;
    }
    let per = |top: f32, scale: f32| if scale > 0.0 { top / scale } else { 0.0 };
    let (m_per, v_per) = (per(M_TOP, *m_scale), per(V_TOP, *v_scale));
    for i in 0..n {
        if i % 8 == 0 {
            random = noise.octet(at * BLOCK + i, 1);
        }
        m_codes[i] = encode_mean(mean[i], m_per, random[i % 8] & 31);
        v_codes[i] = encode_root(root[i], v_per, random[i % 8] >> 5);
    }
}

/// The code c of m = ±scale·(c / 127)⁴, rounded with five random bits; `per` is 127⁴ / scale, or 0 for a block of zeros.
fn encode_mean(m: f32, per: f32, random: u32) -> u8 {
    let c = (m.abs() * per).sqrt().sqrt();
    let dither = (random as f32 - 15.5) * (1.0 / 32.0);
    ((c + dither).clamp(0.0, 127.0).copysign(m) + ROUND).to_bits() as u8
}

/// The code c of √v = scale·(c / 255)², rounded with eleven random bits such that v keeps its mean; `per` is 255² / scale. What
/// is above 0 never gets code 0.
fn encode_root(root: f32, per: f32, random: u32) -> u8 {
    let t = root * per;
    let low = (t.sqrt() - 0.5).max(if root > 0.0 { 1.0 } else { 0.0 }).min(254.0) + ROUND;
    let a = low - ROUND;
    let (a2, step) = (a * a, 2.0 * a + 1.0);
    // (a + 1)⁴ − a⁴, and what v has above a⁴.
    let (gap, above) = (step * (2.0 * a2 + step), (t - a2) * (t + a2));
    let threshold = (random as f32 + 0.5) * (1.0 / 2048.0);
    low.to_bits() as u8 + u8::from(threshold * gap < above)
}
