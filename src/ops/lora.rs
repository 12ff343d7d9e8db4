//! Low-rank updates (LoRA, Hu et al. 2021) of a linear layer, cut at the small tensors h = drop(x)·Aᵀ and u = s·dY·B, so that
//! each large tensor passes by once a product: y += s·h·Bᵀ, dB += s·dYᵀ·h, dA += uᵀ·drop(x), dX += drop(u·A).
//!
//! x `[N, in]`, y and dY `[N, out]`, A `[r, in]`, B `[out, r]`. Layers that share x (q, k and v; gate and up) hand in their updates
//! as one group: h and u are then `[G·N, r]`, one update's rows below the other's. In bf16 with a rank of 8, 16, … 256 the kernels of
//! `kernels/lora.cu` compute it, which draw the mask again wherever they need it and let x and dX pass by once for up to three
//! updates; otherwise it is composed of products, one update after the other.

use super::launch::{Arg, Grid, Path, empty, launch, launch_plain, path};
use super::matmul::{Mat, add_, matmul, matmul_add};
use super::random::{Key, dropout};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Dropout's mask: its key and the probability of a zero.
pub type Mask = Option<(Key, f64)>;

/// One low-rank update of a group, whose members have one rank and share x.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// `[r, in]`.
    pub a: &'a Tensor,
    /// `[out, r]`; the outputs of a group's members may differ in width.
    pub b: &'a Tensor,
    /// What B·A is multiplied by.
    pub scale: f64,
    /// The mask of x, the same in forward and backward.
    pub mask: Mask,
}

/// Do updates of this rank on `x` gain from being handed in as a group?
pub fn gains_from_groups(rank: usize, x: &Tensor) -> Result<bool> {
    Ok(fits(rank, x) && path("lora", x)? == Path::Kernel)
}

/// h = drop(x)·Aᵀ of each update.
pub fn down(x: &Tensor, group: &[Update]) -> Result<Tensor> {
    let Some(l) = Kernels::of(group, &[x])? else {
        return stacked(group, |g| matmul(Mat::N(&dropped(x, g.mask)?), Mat::T(g.a)));
    };
    let (n, k) = x.dims2()?;
    let h = empty(x, DType::BF16, (group.len() * n, l.rank))?;
    for run in runs(group.len(), l.most(l.slices() * l.width), |i, j| alike(group[i].mask, group[j].mask)) {
        let (g, h) = (&group[run.clone()], part(&h, &run, n)?);
        let most = match (l.odd, l.width) {
            (true, _) => 8,
            (false, 16 | 32) => 16,
            (false, _) => 12,
        };
        let lines = l.lines(g.len(), most);
        let tensors =
            [[Arg::In(x), Arg::len(k)?].as_slice(), &three(g, |g| Arg::In(g.a)), &[Arg::Out(&h), Arg::Null]].concat();
        let sizes = [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(g.len())?, Arg::F32(kept(g))];
        let args = [tensors.as_slice(), &sizes, &stream(g)].concat();
        l.launch("down", l.grid(n.div_ceil(16 * lines), 1, g.len() * lines, g.len() * l.width), &args)?;
    }
    Ok(h)
}

/// y += s·h·Bᵀ in place, for each update its y.
pub fn up_(y: &[&Tensor], h: &Tensor, group: &[Update]) -> Result<()> {
    let n = rows_of(y, group)?;
    let Some(l) = Kernels::of(group, y)? else {
        return (0..y.len()).try_for_each(|i| {
            let h = part(h, &(i..i + 1), n)?;
            matmul_add(y[i], group[i].scale, Mat::N(&h), Mat::T(group[i].b))
        });
    };
    // One kernel for every rank; rows of B in shared memory avoid each other's banks.
    let depth = l.rank.next_multiple_of(32);
    let stride = if depth.is_multiple_of(64) { depth + 32 } else { depth };
    for run in runs(group.len(), MOST, |i, j| group[i].scale == group[j].scale) {
        let (g, y, h) = (&group[run.clone()], &y[run.clone()], part(h, &run, n)?);
        let mut widths = Vec::with_capacity(3);
        for y in y {
            widths.push(y.dim(1)?);
        }
        let grid = Grid {
            grid: [n.div_ceil(128) as u32, widest(&widths).div_ceil(PART) as u32, g.len() as u32],
            block: [256, 1, 1],
            shared: 256 * stride as u32,
        };
        widths.resize(3, 0);
        let widths = [Arg::len(widths[0])?, Arg::len(widths[1])?, Arg::len(widths[2])?];
        let tensors = [[Arg::In(&h)].as_slice(), &three(g, |g| Arg::In(g.b)), &three(y, |y| Arg::Out(y))].concat();
        let sizes = [Arg::len(n)?, Arg::len(l.rank)?, Arg::F32(g[0].scale as f32)];
        l.launch("up", grid, &[tensors.as_slice(), &widths, &widths, &sizes].concat())?;
    }
    Ok(())
}

/// u = s·dY·B of each update, and dB += s·dYᵀ·h where a sum is given.
pub fn back(dy: &[&Tensor], h: &Tensor, group: &[Update], db: &[Option<&Tensor>]) -> Result<Tensor> {
    let n = rows_of(dy, group)?;
    let one = |i: usize| -> Result<Tensor> { part(h, &(i..i + 1), n) };
    let Some(l) = Kernels::of(group, dy)? else {
        let mut all = dy.iter().zip(db).enumerate();
        return stacked(group, |g| {
            let Some((i, (dy, db))) = all.next() else {
                bail!("lora: {} gradients for a group of {}", dy.len(), group.len())
            };
            if let Some(db) = db {
                matmul_add(db, g.scale, Mat::T(dy), Mat::N(&one(i)?))?;
            }
            Ok((matmul(Mat::N(dy), Mat::N(g.b))? * g.scale)?)
        });
    };
    let u = empty(h, DType::BF16, (group.len() * n, l.rank))?;
    for (i, g) in group.iter().enumerate() {
        l.back(dy[i], &one(i)?, g, db[i], &part(&u, &(i..i + 1), n)?)?;
    }
    Ok(u)
}

/// dA += uᵀ·drop(x) where a sum is given, which may be f32 where the rest is bf16.
pub fn add_da(da: &[Option<&Tensor>], u: &Tensor, x: &Tensor, group: &[Update]) -> Result<()> {
    let (n, k) = x.dims2()?;
    let Some(l) = Kernels::of(group, &[x])? else {
        return (0..group.len()).try_for_each(|i| {
            let Some(da) = da[i] else { return Ok(()) };
            matmul_add(da, 1.0, Mat::T(&part(u, &(i..i + 1), n)?), Mat::N(&dropped(x, group[i].mask)?))
        });
    };
    let stretches = n.div_ceil(STRETCH).max(1);
    let together = |i: usize, j: usize| da[i].is_some() == da[j].is_some() && alike(group[i].mask, group[j].mask);
    for run in runs(group.len(), l.most(l.slices() * l.width.max(64)), together) {
        let (g, da) = (&group[run.clone()], &da[run.clone()]);
        if da[0].is_none() {
            continue;
        }
        let lines = l.lines(g.len(), if l.odd || l.width == 128 { 8 } else { 12 });
        let one = l.rank * k;
        let sums = empty(x, DType::F32, stretches * g.len() * one)?;
        let (u, size) = (part(u, &run, n)?, [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(g.len())?]);
        let tensors = [Arg::In(x), Arg::len(k)?, Arg::In(&u), Arg::Out(&sums)];
        let grid = l.grid(k.div_ceil(l.columns(lines)), stretches, g.len() * lines, g.len() * l.width.max(64));
        l.launch("da", grid, &[tensors.as_slice(), &size, &stream(g)].concat())?;
        for (i, da) in da.iter().enumerate() {
            let Some(da) = da else { continue };
            let sums = sums.narrow(0, i * one, sums.elem_count() - i * one)?;
            reduce(&sums, da, (stretches, g.len() * one), f64::from(kept(g)), true)?;
        }
    }
    Ok(())
}

/// dX += Σ drop(u·A) in place, with the masks of [`down`].
pub fn add_dx_(dx: &Tensor, u: &Tensor, group: &[Update]) -> Result<()> {
    let (n, k) = dx.dims2()?;
    let Some(l) = Kernels::of(group, &[dx])? else {
        return group.iter().enumerate().try_for_each(|(i, g)| {
            let u = part(u, &(i..i + 1), n)?;
            match g.mask {
                None => matmul_add(dx, 1.0, Mat::N(&u), Mat::N(g.a)),
                Some((key, p)) => add_(dx, 1.0, &dropout(key, &matmul(Mat::N(&u), Mat::N(g.a))?, p)?),
            }
        });
    };
    let depth = l.rank.next_multiple_of(32);
    for run in runs(group.len(), l.most(depth), |i, j| alike(group[i].mask, group[j].mask)) {
        let (g, u) = (&group[run.clone()], part(u, &run, n)?);
        let grid = Grid {
            grid: [n.div_ceil(128) as u32, k.div_ceil(PART) as u32, 1],
            block: [256, 1, 1],
            shared: (256 * depth * g.len()) as u32,
        };
        let tensors = [[Arg::In(&u)].as_slice(), &three(g, |g| Arg::In(g.a)), &[Arg::Out(dx), Arg::len(k)?]].concat();
        let sizes = [Arg::len(n)?, Arg::len(k)?, Arg::len(l.rank)?, Arg::len(g.len())?, Arg::F32(kept(g))];
        l.launch("dx", grid, &[tensors.as_slice(), &sizes, &stream(g)].concat())?;
    }
    Ok(())
}

/// Rows whose products are summed at once; the stretches are then added in order, so the device changes no bit.
const STRETCH: usize = 1024;
/// Columns of the large tensor that a block of `lora_up` and `lora_dx` walks.
const PART: usize = 1024;
/// Updates of one launch.
const MOST: usize = 3;
/// Dynamic shared memory that a block has on every GPU from compute capability 8.0 on, in bytes.
const SHARED: usize = 99 * 1024;

fn fits(rank: usize, large: &Tensor) -> bool {
    rank.is_multiple_of(8) && (8..=256).contains(&rank) && large.dtype() == DType::BF16
}

/// Which form of the kernels suits a rank and large tensors.
struct Kernels {
    rank: usize,
    /// Ranks of a slice: 16, 32, 64 or 128.
    width: usize,
    /// Rows that cannot be read 16 bytes at a time.
    odd: bool,
}

impl Kernels {
    /// None where the updates are composed of products.
    fn of(group: &[Update], large: &[&Tensor]) -> Result<Option<Self>> {
        let rank = rank_of(group)?;
        let mut odd = false;
        for t in large {
            if !fits(rank, t) || path("lora", t)? != Path::Kernel {
                return Ok(None);
            }
            odd |= !t.dim(1)?.is_multiple_of(8) || !t.layout().start_offset().is_multiple_of(8);
        }
        Ok(Some(Self { rank, width: rank.next_power_of_two().clamp(16, 128), odd }))
    }

    /// Slices of an update's ranks.
    fn slices(&self) -> usize {
        self.rank.div_ceil(self.width)
    }

    /// Updates of one launch that takes `256·width` bytes of shared memory for each.
    fn most(&self, width: usize) -> usize {
        (SHARED / (256 * width)).clamp(1, MOST)
    }

    /// Warps of a block beside each other for each of `groups` updates' slices, of at most `most` in all.
    fn lines(&self, groups: usize, most: usize) -> usize {
        (most / (groups * self.slices())).max(1)
    }

    /// Columns of a block of `lora_da` and `lora_db`.
    fn columns(&self, lines: usize) -> usize {
        lines * if self.width <= 32 { 64 } else { 32 }
    }

    /// `lines` warps and `256·width` bytes of shared memory for each slice.
    fn grid(&self, x: usize, y: usize, lines: usize, width: usize) -> Grid {
        let block = [32 * (self.slices() * lines) as u32, 1, 1];
        Grid { grid: [x as u32, y as u32, 1], block, shared: (256 * self.slices() * width) as u32 }
    }

    /// [`back`] of one update into `u`.
    fn back(&self, dy: &Tensor, h: &Tensor, g: &Update, db: Option<&Tensor>, u: &Tensor) -> Result<()> {
        let (n, out) = dy.dims2()?;
        let sizes = [Arg::len(n)?, Arg::len(out)?, Arg::len(self.rank)?];
        let stretches = n.div_ceil(STRETCH).max(1);
        if let (Some(db), true) = (db, self.width <= 32) {
            // Both from one pass over dY: parts of u by columns, parts of dB by rows.
            let lines = if self.odd || self.width == 32 { 8 } else { 12 };
            let blocks = out.div_ceil(64 * lines);
            let db_part = empty(dy, DType::F32, (stretches * out, self.rank))?;
            let u_part = empty(dy, DType::F32, (blocks * n, self.rank))?;
            let tensors =
                [Arg::In(dy), Arg::len(out)?, Arg::In(h), Arg::In(g.b), Arg::Out(&db_part), Arg::Out(&u_part)];
            let shared = 2 * 64 * 64 * 2 + 64 * lines * self.width * 2 + 2 * lines * 16 * (self.width + 8) * 4;
            let grid = Grid {
                grid: [blocks as u32, stretches as u32, 1],
                block: [32 * lines as u32, 1, 1],
                shared: shared as u32,
            };
            self.launch("dy", grid, &[tensors.as_slice(), &sizes].concat())?;
            reduce(&db_part, db, (stretches, out * self.rank), g.scale, true)?;
            return reduce(&u_part, u, (blocks, n * self.rank), g.scale, false);
        }
        let lines = self.lines(1, if self.odd || self.width == 128 { 8 } else { 12 });
        if let Some(db) = db {
            let db_part = empty(dy, DType::F32, (stretches * out, self.rank))?;
            let tensors = [Arg::In(dy), Arg::len(out)?, Arg::In(h), Arg::Out(&db_part)];
            let grid = self.grid(out.div_ceil(self.columns(lines)), stretches, lines, self.width.max(64));
            self.launch("db", grid, &[tensors.as_slice(), &sizes].concat())?;
            reduce(&db_part, db, (stretches, out * self.rank), g.scale, true)?;
        }
        let tensors = [Arg::In(dy), Arg::len(out)?, Arg::In(g.b), Arg::Out(u), Arg::Null];
        let args = [tensors.as_slice(), &sizes, &[Arg::F32(g.scale as f32)]].concat();
        self.launch("u", self.grid(n.div_ceil(16 * lines), 1, lines, self.width.max(64)), &args)
    }

    /// Launches the form of a kernel for this width, or its only one (`up`, `dx`).
    fn launch(&self, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
        let width = if matches!(kernel, "up" | "dx") { String::new() } else { format!("_{}", self.width) };
        let odd = if self.odd { "_odd" } else { "" };
        launch("lora", &format!("lora_{kernel}{width}{odd}"), DType::BF16, grid, args)
    }
}

/// The rank of all updates of a group.
fn rank_of(group: &[Update]) -> Result<usize> {
    let Some(first) = group.first() else { bail!("lora: a group without an update") };
    let rank = first.a.dim(0)?;
    for g in group {
        if g.a.dim(0)? != rank || g.b.dim(1)? != rank || g.a.dim(1)? != first.a.dim(1)? {
            bail!("lora: A {:?} and B {:?} in one group with A {:?}", g.a.dims(), g.b.dims(), first.a.dims())
        }
    }
    Ok(rank)
}

/// The rows of each update's output, which must be as many.
fn rows_of(outputs: &[&Tensor], group: &[Update]) -> Result<usize> {
    let n = outputs.first().map_or(Ok(0), |t| t.dim(0))?;
    if outputs.len() != group.len() || outputs.iter().any(|t| t.dims().first() != Some(&n)) {
        let dims: Vec<&[usize]> = outputs.iter().map(|t| t.dims()).collect();
        bail!("lora: outputs {dims:?} for a group of {}", group.len())
    }
    Ok(n)
}

/// The rows of h or u that belong to the updates of `run`.
fn part(t: &Tensor, run: &Range<usize>, n: usize) -> Result<Tensor> {
    Ok(t.narrow(0, run.start * n, run.len() * n)?)
}

/// What `f` gives for each update, one below the other.
fn stacked(group: &[Update], mut f: impl FnMut(&Update) -> Result<Tensor>) -> Result<Tensor> {
    rank_of(group)?;
    if let [one] = group {
        return f(one);
    }
    let parts = group.iter().map(f).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// Cuts `0..n` into runs of at most `most` that go `together` with their first.
fn runs(n: usize, most: usize, together: impl Fn(usize, usize) -> bool) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for i in 0..n {
        match out.last_mut() {
            Some(r) if r.len() < most && together(r.start, i) => r.end += 1,
            _ => out.push(i..i + 1),
        }
    }
    out
}

/// Can one launch draw both masks?
fn alike(a: Mask, b: Mask) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some((a, p)), Some((b, q))) => p == q && a.stream(p).0 == b.stream(q).0,
        _ => false,
    }
}

/// An argument for each of up to three.
fn three<'a, T>(of: &'a [T], arg: impl Fn(&'a T) -> Arg<'a>) -> [Arg<'a>; 3] {
    [0, 1, 2].map(|i| of.get(i).map_or(Arg::Null, &arg))
}

fn widest(widths: &[usize]) -> usize {
    widths.iter().copied().max().unwrap_or(0)
}

/// out (+)= s·Σ of `count` parts, in order; they begin `stride` elements apart.
fn reduce(parts: &Tensor, out: &Tensor, (count, stride): (usize, usize), s: f64, add: bool) -> Result<()> {
    let n = out.elem_count();
    let kernel = if out.dtype() == DType::BF16 { "lora_reduce_bf16" } else { "lora_reduce_f32" };
    let args = [Arg::In(parts), Arg::Out(out), Arg::size(n), Arg::len(count)?, Arg::size(stride)];
    launch_plain("lora", kernel, Grid::flat(n, 4), &[args.as_slice(), &[Arg::F32(s as f32), Arg::flag(add)]].concat())
}

fn dropped(x: &Tensor, mask: Mask) -> Result<Tensor> {
    mask.map_or_else(|| Ok(x.clone()), |(key, p)| dropout(key, x, p))
}

/// What a kept element is multiplied by.
fn kept(run: &[Update]) -> f32 {
    run[0].mask.map_or(1.0, |(_, p)| (1.0 / (1.0 - p)) as f32)
}

/// The masks' streams of a run for a kernel that takes up to three.
fn stream(run: &[Update]) -> [Arg<'static>; 5] {
    let of = |g: &Update| g.mask.map_or((0, 0, 0), |(key, p)| key.stream(p));
    let (key, _, limit) = of(&run[0]);
    let high = |i: usize| Arg::U64(run.get(i).map_or(0, |g| of(g).1));
    [Arg::U64(key), high(0), high(1), high(2), Arg::U32(limit)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_group_has_one_rank() {
        let zeros = |r, c| Tensor::zeros((r, c), DType::F32, &Device::Cpu).unwrap();
        let (x, a, b, a3, b3) = (zeros(4, 5), zeros(2, 5), zeros(6, 2), zeros(3, 5), zeros(6, 3));
        let update = |a, b| Update { a, b, scale: 1.0, mask: None };
        assert_eq!(down(&x, &[update(&a, &b), update(&a, &b)]).unwrap().dims(), [8, 2]);
        for wrong in [vec![update(&a, &b), update(&a3, &b3)], vec![update(&a, &b3)], vec![]] {
            assert!(down(&x, &wrong).unwrap_err().cause().starts_with("lora: "));
        }
        let (y, h) = (zeros(4, 6), zeros(8, 2));
        assert!(up_(&[&y], &h, &[update(&a, &b), update(&a, &b)]).unwrap_err().cause().contains("a group of 2"));
    }

    #[test]
    fn runs_are_of_neighbours_that_go_together() {
        let kinds = [1, 1, 1, 1, 2, 2, 1];
        assert_eq!(runs(7, 3, |i, j| kinds[i] == kinds[j]), [0..3, 3..4, 4..6, 6..7]);
        assert_eq!(runs(3, 1, |_, _| true), [0..1, 1..2, 2..3]);
        assert!(runs(0, 3, |_, _| true).is_empty());
    }
}
