//! Low-rank updates (LoRA, Hu et al. 2021) of a linear layer, cut at the small tensors h = drop(x)·Aᵀ and u = s·dY·B, so that
//! each large tensor passes by once a product: y += s·h·Bᵀ, dB += s·dYᵀ·h, dA += uᵀ·drop(x), dX += drop(u·A).
//!
//! x `[N, in]`, y and dY `[N, out]`, A `[r, in]`, B `[out, r]`, h and u `[N, r]`. In bf16 with a rank of 8, 16, … 256 the kernels
//! of `kernels/lora.cu` compute it, which draw the mask again wherever they need it; otherwise it is composed of products.

use super::launch::{Arg, Grid, Path, empty, launch, launch_plain, path};
use super::matmul::{Mat, add_, matmul, matmul_add};
use super::random::{Key, dropout};
use crate::error::Result;
use candle_core::{DType, Tensor};

/// Dropout's mask: its key and the probability of a zero.
pub type Mask = Option<(Key, f64)>;

/// h = drop(x)·Aᵀ.
pub fn down(x: &Tensor, a: &Tensor, mask: Mask) -> Result<Tensor> {
    let Some(l) = Kernels::of(a.dim(0)?, x)? else { return matmul(Mat::N(&dropped(x, mask)?), Mat::T(a)) };
    let (n, k) = x.dims2()?;
    let h = empty(x, DType::BF16, (n, l.rank))?;
    let lines = l.lines(if l.odd {
        8
    } else if l.width < 64 {
        16
    } else {
        12
    });
    let tensors = [Arg::In(x), Arg::len(k)?, Arg::In(a), Arg::Null, Arg::Null, Arg::Out(&h), Arg::Null];
    let sizes = [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(1)?, Arg::F32(kept(mask))];
    let args = [tensors.as_slice(), &sizes, &stream(mask)].concat();
    l.launch("down", l.grid(n.div_ceil(16 * lines), 1, lines, l.width), &args)?;
    Ok(h)
}

/// y += s·h·Bᵀ in place.
pub fn up_(y: &Tensor, h: &Tensor, b: &Tensor, s: f64) -> Result<()> {
    let (n, out) = y.dims2()?;
    let Some(l) = Kernels::of(b.dim(1)?, y)? else { return matmul_add(y, s, Mat::N(h), Mat::T(b)) };
    // One kernel for every rank; rows of B in shared memory avoid each other's banks.
    let depth = l.rank.next_multiple_of(32);
    let stride = if depth.is_multiple_of(64) { depth + 32 } else { depth };
    let grid = Grid {
        grid: [n.div_ceil(128) as u32, out.div_ceil(PART) as u32, 1],
        block: [256, 1, 1],
        shared: 256 * stride as u32,
    };
    let none = [Arg::Null; 2];
    let zero = [Arg::I32(0); 2];
    let args = [&[Arg::In(h), Arg::In(b)], none.as_slice(), &[Arg::Out(y)], &none, &[Arg::len(out)?], &zero].concat();
    let args =
        [args.as_slice(), &[Arg::len(out)?], &zero, &[Arg::len(n)?, Arg::len(l.rank)?, Arg::F32(s as f32)]].concat();
    l.launch("up", grid, &args)
}

/// u = s·dY·B, and dB += s·dYᵀ·h if a sum is given.
pub fn back(dy: &Tensor, h: &Tensor, b: &Tensor, s: f64, db: Option<&Tensor>) -> Result<Tensor> {
    let (n, out) = dy.dims2()?;
    let Some(l) = Kernels::of(b.dim(1)?, dy)? else {
        if let Some(db) = db {
            matmul_add(db, s, Mat::T(dy), Mat::N(h))?;
        }
        return Ok((matmul(Mat::N(dy), Mat::N(b))? * s)?);
    };
    let sizes = [Arg::len(n)?, Arg::len(out)?, Arg::len(l.rank)?];
    let stretches = n.div_ceil(STRETCH).max(1);
    let u = empty(dy, DType::BF16, (n, l.rank))?;
    if let (Some(db), true) = (db, l.width <= 32) {
        // Both from one pass over dY: parts of u by columns, parts of dB by rows.
        let lines = if l.odd || l.width == 32 { 8 } else { 12 };
        let blocks = out.div_ceil(64 * lines);
        let part = empty(dy, DType::F32, (stretches * out, l.rank))?;
        let u_part = empty(dy, DType::F32, (blocks * n, l.rank))?;
        let tensors = [Arg::In(dy), Arg::len(out)?, Arg::In(h), Arg::In(b), Arg::Out(&part), Arg::Out(&u_part)];
        let shared = 2 * 64 * 64 * 2 + 64 * lines * l.width * 2 + 2 * lines * 16 * (l.width + 8) * 4;
        let grid = Grid {
            grid: [blocks as u32, stretches as u32, 1],
            block: [32 * lines as u32, 1, 1],
            shared: shared as u32,
        };
        l.launch("dy", grid, &[tensors.as_slice(), &sizes].concat())?;
        reduce(&part, db, stretches, s, true)?;
        reduce(&u_part, &u, blocks, s, false)?;
        return Ok(u);
    }
    let lines = l.lines(if l.odd || l.width == 128 { 8 } else { 12 });
    if let Some(db) = db {
        let part = empty(dy, DType::F32, (stretches * out, l.rank))?;
        let tensors = [Arg::In(dy), Arg::len(out)?, Arg::In(h), Arg::Out(&part)];
        let grid = l.grid(out.div_ceil(l.columns(lines)), stretches, lines, l.width.max(64));
        l.launch("db", grid, &[tensors.as_slice(), &sizes].concat())?;
        reduce(&part, db, stretches, s, true)?;
    }
    let tensors = [Arg::In(dy), Arg::len(out)?, Arg::In(b), Arg::Out(&u), Arg::Null];
    let args = [tensors.as_slice(), &sizes, &[Arg::F32(s as f32)]].concat();
    l.launch("u", l.grid(n.div_ceil(16 * lines), 1, lines, l.width.max(64)), &args)?;
    Ok(u)
}

/// dA += uᵀ·drop(x); the sum may be f32 where the rest is bf16.
pub fn add_da(da: &Tensor, u: &Tensor, x: &Tensor, mask: Mask) -> Result<()> {
    let Some(l) = Kernels::of(da.dim(0)?, x)? else {
        return matmul_add(da, 1.0, Mat::T(u), Mat::N(&dropped(x, mask)?));
    };
    let (n, k) = x.dims2()?;
    let stretches = n.div_ceil(STRETCH).max(1);
    let lines = l.lines(if l.odd || l.width == 128 { 8 } else { 12 });
    let part = empty(x, DType::F32, (stretches * l.rank, k))?;
    let tensors = [Arg::In(x), Arg::len(k)?, Arg::In(u), Arg::Out(&part)];
    let sizes = [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(1)?];
    let grid = l.grid(k.div_ceil(l.columns(lines)), stretches, lines, l.width.max(64));
    l.launch("da", grid, &[tensors.as_slice(), &sizes, &stream(mask)].concat())?;
    reduce(&part, da, stretches, f64::from(kept(mask)), true)
}

/// dX += drop(u·A) in place, with the mask of [`down`].
pub fn add_dx_(dx: &Tensor, u: &Tensor, a: &Tensor, mask: Mask) -> Result<()> {
    let (n, k) = dx.dims2()?;
    let Some(l) = Kernels::of(a.dim(0)?, dx)? else {
        return match mask {
            None => matmul_add(dx, 1.0, Mat::N(u), Mat::N(a)),
            Some((key, p)) => add_(dx, 1.0, &dropout(key, &matmul(Mat::N(u), Mat::N(a))?, p)?),
        };
    };
    let depth = l.rank.next_multiple_of(32);
    let grid = Grid {
        grid: [n.div_ceil(128) as u32, k.div_ceil(PART) as u32, 1],
        block: [256, 1, 1],
        shared: 256 * depth as u32,
    };
    let tensors = [Arg::In(u), Arg::In(a), Arg::Null, Arg::Null, Arg::Out(dx), Arg::len(k)?];
    let sizes = [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(1)?, Arg::F32(kept(mask))];
    let args = [tensors.as_slice(), &sizes, &stream(mask)].concat();
    l.launch("dx", grid, &args)
}

/// Rows whose products are summed at once; the stretches are then added in order, so the device changes no bit.
const STRETCH: usize = 1024;
/// Columns of the large tensor that a block of `lora_up` and `lora_dx` walks.
const PART: usize = 1024;

/// Which form of the kernels suits a rank and a large tensor.
struct Kernels {
    rank: usize,
    /// Ranks of a slice: 16, 32, 64 or 128.
    width: usize,
    /// Rows that cannot be read 16 bytes at a time.
    odd: bool,
}

impl Kernels {
    /// None where the update is composed of products.
    fn of(rank: usize, large: &Tensor) -> Result<Option<Self>> {
        let fits = rank.is_multiple_of(8) && (8..=256).contains(&rank) && large.dtype() == DType::BF16;
        if path("lora", large)? != Path::Kernel || !fits {
            return Ok(None);
        }
        let width = rank.next_power_of_two().clamp(16, 128);
        let odd = !large.dim(1)?.is_multiple_of(8) || !large.layout().start_offset().is_multiple_of(8);
        Ok(Some(Self { rank, width, odd }))
    }

    fn units(&self) -> usize {
        self.rank.div_ceil(self.width)
    }

    /// Warps of a block beside each other, of at most `most`.
    fn lines(&self, most: usize) -> usize {
        (most / self.units()).max(1)
    }

    /// Columns of a block of `lora_da` and `lora_db`.
    fn columns(&self, lines: usize) -> usize {
        lines * if self.width <= 32 { 64 } else { 32 }
    }

    fn grid(&self, x: usize, y: usize, lines: usize, width: usize) -> Grid {
        let block = [32 * (self.units() * lines) as u32, 1, 1];
        Grid { grid: [x as u32, y as u32, 1], block, shared: (256 * self.units() * width) as u32 }
    }

    /// Launches the form of a kernel for this width, or its only one (`up`, `dx`).
    fn launch(&self, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        let width = if matches!(kernel, "up" | "dx") { String::new() } else { format!("_{}", self.width) };
        let odd = if self.odd { "_odd" } else { "" };
        launch("lora", &format!("lora_{kernel}{width}{odd}"), DType::BF16, grid, args)
    }
}

/// out (+)= s·Σ of the `count` parts that stand one after the other in `part`, in order.
fn reduce(part: &Tensor, out: &Tensor, count: usize, s: f64, add: bool) -> Result<()> {
    let n = out.elem_count();
    let kernel = if out.dtype() == DType::BF16 { "lora_reduce_bf16" } else { "lora_reduce_f32" };
    let args = [Arg::In(part), Arg::Out(out), Arg::size(n), Arg::len(count)?, Arg::size(n)];
    launch_plain("lora", kernel, Grid::flat(n, 4), &[args.as_slice(), &[Arg::F32(s as f32), Arg::flag(add)]].concat())
}

fn dropped(x: &Tensor, mask: Mask) -> Result<Tensor> {
    mask.map_or_else(|| Ok(x.clone()), |(key, p)| dropout(key, x, p))
}

/// What a kept element is multiplied by.
fn kept(mask: Mask) -> f32 {
    mask.map_or(1.0, |(_, p)| (1.0 / (1.0 - p)) as f32)
}

/// The mask's stream for a kernel that takes up to three.
fn stream(mask: Mask) -> [Arg<'static>; 5] {
    let (key, high, limit) = mask.map_or((0, 0, 0), |(key, p)| key.stream(p));
    [Arg::U64(key), Arg::U64(high), Arg::U64(0), Arg::U64(0), Arg::U32(limit)]
}
