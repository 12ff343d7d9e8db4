//! Rows by index: token embeddings, splicing visual features into a sequence, picking labelled rows.

use super::launch::{Arg, Grid, Path, empty, launch, launch_mixed, pack, path, upload, wide, widen};
use super::{data, dims2, on_wide, tensor, update};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor, WithDType};
use half::bf16;
use std::collections::BTreeMap;
use std::ops::AddAssign;

/// Rows of `table` `[V, D]` in the order of `ids` → `[ids, D]`.
pub fn gather(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    fn run<T: WithDType>(table: &Tensor, ids: &[u32], d: usize) -> Result<Tensor> {
        let table = data::<T>(table)?;
        let mut out = Vec::with_capacity(ids.len() * d);
        for id in ids {
            out.extend_from_slice(&table[*id as usize * d..(*id as usize + 1) * d]);
        }
        tensor(out, (ids.len(), d))
    }
    let (v, d) = dims2(table, "gather")?;
    if let Some(id) = ids.iter().find(|i| **i as usize >= v) {
        bail!("gather: index {id} is outside the table of {v} rows")
    }
    match (path("gather", table)?, table.dtype()) {
        (Path::Kernel, _) => kernel_gather(table, ids, d),
        (Path::Widened, _) => run::<bf16>(table, ids, d),
        (Path::Reference, DType::F32) => run::<f32>(table, ids, d),
        (Path::Reference, _) => run::<f64>(table, ids, d),
    }
}

/// `table[ids[i]] = rows[i]` in place, both of one type; no index may come twice.
pub fn scatter_(table: &Tensor, ids: &[u32], rows: &Tensor) -> Result<()> {
    fn run<T: WithDType>(table: &Tensor, ids: &[u32], rows: &Tensor, d: usize) -> Result<()> {
        let rows = data::<T>(rows)?;
        update::<T>(table, |table| {
            for (id, row) in ids.iter().zip(rows.chunks_exact(d)) {
                table[*id as usize * d..(*id as usize + 1) * d].copy_from_slice(row);
            }
        })
    }
    let d = check(table, ids, rows)?;
    match (path("scatter", table)?, table.dtype()) {
        (Path::Kernel, _) => kernel_scatter(table, ids, rows, d),
        (Path::Widened, _) => run::<bf16>(table, ids, rows, d),
        (Path::Reference, DType::F32) => run::<f32>(table, ids, rows, d),
        (Path::Reference, _) => run::<f64>(table, ids, rows, d),
    }
}

/// `table[ids[i]] += rows[i]` in place, in order: backward of [`gather`], deterministic. The table may be f32 where the
/// rows are bf16.
pub fn scatter_add_(table: &Tensor, ids: &[u32], rows: &Tensor) -> Result<()> {
    fn run<T: WithDType + AddAssign>(table: &Tensor, ids: &[u32], rows: &Tensor, d: usize) -> Result<()> {
        let rows = data::<T>(rows)?;
        update::<T>(table, |table| {
            for (id, row) in ids.iter().zip(rows.chunks_exact(d)) {
                for (t, r) in table[*id as usize * d..(*id as usize + 1) * d].iter_mut().zip(row) {
                    *t += *r;
                }
            }
        })
    }
    let d = check(table, ids, rows)?;
    match path("scatter", rows)? {
        Path::Kernel => kernel_scatter_add(table, ids, rows, d),
        Path::Widened => on_wide(table, |table| run::<f32>(table, ids, &widen(rows)?, d)),
        Path::Reference if rows.dtype() == DType::F32 => run::<f32>(table, ids, rows, d),
        Path::Reference => run::<f64>(table, ids, rows, d),
    }
}

/// The width of the rows, if everything fits.
fn check(table: &Tensor, ids: &[u32], rows: &Tensor) -> Result<usize> {
    let ((v, d), (n, width)) = (dims2(table, "scatter")?, dims2(rows, "scatter")?);
    if n != ids.len() || width != d || ids.iter().any(|i| *i as usize >= v) {
        bail!("scatter: {} indices, rows {:?}, table {:?}", ids.len(), rows.dims(), table.dims())
    }
    Ok(d)
}

fn kernel_gather(table: &Tensor, ids: &[u32], d: usize) -> Result<Tensor> {
    let (n, out) = (ids.len(), empty(table, table.dtype(), (ids.len(), d))?);
    let wide = wide(d, &[Some(table)]);
    let index = upload(table.device(), ids, n)?;
    let args = [Arg::In(table), Arg::In(&index), Arg::Out(&out), Arg::len(n)?, Arg::len(d)?, Arg::flag(wide)];
    launch("elementwise", "gather", table.dtype(), Grid::rows(n, d, pack(&[Some(table)])), &args)?;
    Ok(out)
}

fn kernel_scatter(table: &Tensor, ids: &[u32], rows: &Tensor, d: usize) -> Result<()> {
    let (n, wide) = (ids.len(), wide(d, &[Some(table), Some(rows)]));
    let index = upload(table.device(), ids, n)?;
    let args = [Arg::Out(table), Arg::In(&index), Arg::In(rows), Arg::len(n)?, Arg::len(d)?, Arg::flag(wide)];
    launch("elementwise", "scatter", table.dtype(), Grid::rows(n, d, pack(&[Some(table)])), &args)
}

/// The rows of each target come one after the other, in the order in which they stand: no atomics, always the same sum.
fn kernel_scatter_add(table: &Tensor, ids: &[u32], rows: &Tensor, d: usize) -> Result<()> {
    let mut by_target: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (row, id) in ids.iter().enumerate() {
        by_target.entry(*id).or_default().push(row as u32);
    }
    let (n, types) = (by_target.len(), [table.dtype(), rows.dtype()]);
    let targets: Vec<u32> = by_target.keys().copied().collect();
    let mut offsets = vec![0u32];
    offsets.extend(by_target.values().scan(0, |end, rows| {
        *end += rows.len() as u32;
        Some(*end)
    }));
    let order: Vec<u32> = by_target.into_values().flatten().collect();
    let both = [Some(table), Some(rows)];
    let index = [
        upload(table.device(), &targets, n)?,
        upload(table.device(), &offsets, n + 1)?,
        upload(table.device(), &order, ids.len())?,
    ];
    let [targets, offsets, order] = &index;
    let args = [Arg::Out(table), Arg::In(targets), Arg::In(offsets), Arg::In(order), Arg::In(rows)];
    let sizes = [Arg::len(n)?, Arg::len(d)?, Arg::flag(wide(d, &both))];
    let grid = Grid::rows(n, d, pack(&both));
    launch_mixed("elementwise", "scatter_add", types, grid, &[args.as_slice(), &sizes].concat())
}
