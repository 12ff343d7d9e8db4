//! Launches of `kernels/adamw.cu`: one for the norm's leaves, one for the norm, and one for the parameters of each form. The
//! host reads nothing before all of them are on their way.

use super::super::launch::{Arg, Grid, address, empty, host, launch_plain, upload};
use super::{Gradient, Moments, Norms, Parameter, Step};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Elements that a block of threads takes; a multiple of [`LEAF`].
const CHUNK: usize = 1 << 15;
/// Elements of a partial sum of the norm.
const LEAF: usize = 4096;

/// Every form of a parameter: the kernel that updates it.
const FORMS: [&str; 4] = ["adamw_f32", "adamw_bf16", "adamw8_f32", "adamw8_bf16"];

/// Which blocks of threads work on which elements: the same in every step of the same parameters.
#[derive(Debug)]
pub struct Plan {
    /// u32 `[C, 2]`, parameter and chunk in it, ordered by form.
    chunks: Tensor,
    /// Where each form's chunks begin and how many they are.
    forms: [(usize, usize); FORMS.len()],
    /// Partial sums of the norm, and where those of each parameter begin.
    leaves: usize,
    first_leaf: Vec<usize>,
}

impl Plan {
    fn new(params: &[Parameter], device: &Device) -> Result<Self> {
        let (mut chunks, mut forms): (Vec<u32>, _) = (Vec::new(), [(0, 0); FORMS.len()]);
        for (form, range) in forms.iter_mut().enumerate() {
            let begin = chunks.len() / 2;
            for (i, p) in params.iter().enumerate() {
                if form_of(p)? == form {
                    let count = p.weight.value.elem_count().div_ceil(CHUNK);
                    chunks.extend((0..count).flat_map(|c| [i as u32, c as u32]));
                }
            }
            *range = (begin, chunks.len() / 2 - begin);
        }
        let mut leaves = 0;
        let mut first_leaf = Vec::with_capacity(params.len());
        for p in params {
            first_leaf.push(leaves);
            leaves += p.weight.value.elem_count().div_ceil(LEAF);
        }
        let count = chunks.len() / 2;
        Ok(Self { chunks: upload(device, &chunks, (count, 2))?, forms, leaves, first_leaf })
    }
}

fn form_of(p: &Parameter) -> Result<usize> {
    match p.weight.value.dtype() {
        DType::F32 => Ok(if p.eight { 2 } else { 0 }),
        DType::BF16 => Ok(if p.eight { 3 } else { 1 }),
        other => bail!("kernels update f32 and bf16 parameters, not {other:?}"),
    }
}

/// The update of [`super::step`].
pub(super) fn step(params: &[Parameter], s: &Step, plan: &mut Option<Plan>) -> Result<Norms> {
    let like = &params[0].weight.value;
    let device = like.device();
    if plan.as_ref().is_none_or(|p| p.first_leaf.len() != params.len()) {
        *plan = Some(Plan::new(params, device)?);
    }
    let Some(plan) = plan else { bail!("no plan was made") };
    // Kept until the launches are on their way: their addresses are in the table.
    let contiguous = |p: &Parameter| p.update.as_ref().map(|u| u.grad.contiguous()).transpose();
    let grads: Vec<Option<Tensor>> = params.iter().map(contiguous).collect::<candle_core::Result<_>>()?;
    let mut rows: Vec<i64> = Vec::with_capacity(10 * params.len());
    let mut rates: Vec<u32> = Vec::with_capacity(4 * params.len());
    for (i, (p, grad)) in params.iter().zip(&grads).enumerate() {
        rows.extend(row(p, grad.as_ref(), i, plan.first_leaf[i])?);
        rates.extend(rate(p.update.as_ref()));
    }
    let (rows, rates) = (upload(device, &rows, (params.len(), 10))?, upload(device, &rates, (params.len(), 4))?);
    let tables = [Arg::In(&rows), Arg::In(&rates)];
    let leaves = empty(like, DType::F64, plan.leaves)?;
    let chunk = Arg::len(CHUNK)?;
    let (count, threads) = (plan.chunks.dim(0)?, 256);
    let args = [tables.as_slice(), &[Arg::In(&plan.chunks), chunk, Arg::Out(&leaves)]].concat();
    launch_plain("adamw", "grad_squares", Grid::line(count, threads), &args)?;

    // What the host wants to know, in one tensor: clip (two words), norms of groups, squares of parameters.
    let told = empty(like, DType::F64, 2 + s.groups + params.len())?;
    let clip = told.narrow(0, 0, 2)?;
    let norms = told.narrow(0, 2, s.groups)?;
    let squares = told.narrow(0, 2 + s.groups, params.len())?;
    let sizes = [Arg::len(params.len())?, Arg::len(s.groups)?, Arg::In(&leaves), Arg::F64(s.max_norm)];
    let args = [tables.as_slice(), &sizes, &[Arg::Out(&squares), Arg::Out(&norms), Arg::Out(&clip)]].concat();
    launch_plain("adamw", "grad_norm", Grid::line(1, 1024), &args)?;

    let [b1, b2] = s.betas;
    let [low, high] = s.noise.pair();
    let betas = [1.0 - b1, b2, 1.0 - b2, s.eps].map(|x| Arg::F32(x as f32));
    let noise = [low, high, s.index].map(Arg::U32);
    for (kernel, (begin, count)) in FORMS.iter().zip(plan.forms).filter(|(_, (_, count))| *count > 0) {
        let chunks = plan.chunks.narrow(0, begin, count)?;
        let args = [tables.as_slice(), &[Arg::In(&chunks), Arg::In(&clip), chunk], &betas, &noise].concat();
        launch_plain("adamw", kernel, Grid::line(count, threads), &args)?;
    }
    let told: Vec<f64> = host(&told)?.to_vec1()?;
    // The second word holds the scale (f32) below the flag that says that everything was skipped.
    let word = told[1].to_bits();
    Ok(Norms {
        total: told[0],
        clip: f64::from(f32::from_bits(word as u32)),
        skipped: word >> 32 != 0,
        groups: told[2..2 + s.groups].to_vec(),
        squares: told[2 + s.groups..].to_vec(),
    })
}

/// `struct Param` of the kernels.
fn row(p: &Parameter, grad: Option<&Tensor>, id: usize, leaf: usize) -> Result<[i64; 10]> {
    let at = |t: &Tensor| address(t).map(|a| a as i64);
    let maybe = |t: Option<&Tensor>| t.map_or(Ok(0), at);
    let [m, v, m_scale, v_scale] = match p.update.as_ref().map(|u| u.moments) {
        None => [0; 4],
        Some(Moments::Full { mean, square }) => [at(mean)?, at(square)?, 0, 0],
        Some(Moments::Eight { mean, square }) => {
            [at(&mean.codes)?, at(&square.codes)?, at(&mean.scales)?, at(&square.scales)?]
        }
    };
    let (n, names) = (p.weight.value.elem_count() as i64, id as i64 | (p.group as i64) << 32);
    let (value, rounded) = (at(&p.weight.value)?, maybe(p.weight.rounded.as_ref())?);
    Ok([value, rounded, maybe(grad)?, m, v, m_scale, v_scale, n, names, leaf as i64])
}

/// `struct Rate` of the kernels.
fn rate(u: Option<&Gradient>) -> [u32; 4] {
    let bits = |x: f64| (x as f32).to_bits();
    u.map_or([0; 4], |u| [bits(u.rate.keep), bits(u.rate.size), bits(u.rate.correction), 1])
}
