//! Every op that training runs, at the shapes at which LLaVA-1.5-7B runs it, beside its floor.

mod optimizer;
mod products;
mod rows;

use super::noise::Noise;
use super::timer::{Effort, Times};
use super::{Bench, scaled, time, type_name};
use crate::bail;
use crate::error::{Context, Result};
use crate::model::init::Place;
use serde::Serialize;

/// What is timed again and again.
type Run = Box<dyn FnMut() -> Result<()>>;

/// Makes the operands of a run.
type Make = Box<dyn Fn(&mut Noise) -> Result<Run>>;

/// One op at one shape.
pub struct Item {
    /// Its name in `ops::registry`, or that of what is not an op there.
    pub op: &'static str,
    /// What is timed.
    pub what: String,
    /// At which shape.
    pub shape: String,
    /// What it has to do.
    pub work: Work,
    make: Make,
}

/// What must be done in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Every input is read once, every output written once.
    pub bytes: usize,
    /// A product and a sum count as two.
    pub flops: usize,
}

impl Item {
    fn new(
        op: &'static str,
        what: impl Into<String>,
        shape: impl Into<String>,
        work: Work,
        make: impl Fn(&mut Noise) -> Result<Run> + 'static,
    ) -> Self {
        Self { op, what: what.into(), shape: shape.into(), work, make: Box::new(make) }
    }
}

/// The sizes of a model and a micro-batch that the items are made for.
#[derive(Debug, Clone, Copy)]
pub struct Shapes {
    /// Rows of the language model, in sequences of `sequence` tokens.
    pub rows: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Width of the language model.
    pub hidden: usize,
    /// Its heads.
    pub heads: usize,
    /// Width between its gate and down.
    pub mlp: usize,
    /// Its layers, as many as the optimizer updates.
    pub layers: usize,
    /// Rows of its embeddings and head.
    pub vocab: usize,
    /// Rows that predict a label.
    pub labels: usize,
    /// Rank of low-rank updates.
    pub rank: usize,
    /// Pictures of a micro-batch.
    pub pictures: usize,
    /// Pixels along an edge of a picture.
    pub edge: usize,
    /// Pixels along an edge of a patch.
    pub patch: usize,
    /// Width of the tower.
    pub tower: usize,
    /// Its heads.
    pub tower_heads: usize,
    /// Width inside its MLP.
    pub tower_mlp: usize,
}

impl Shapes {
    /// LLaVA-1.5-7B with 8 sequences of 2,048 tokens.
    pub const LLAVA: Self = Self {
        rows: 16_384,
        sequence: 2048,
        hidden: 4096,
        heads: 32,
        mlp: 11_008,
        layers: 32,
        vocab: 32_064,
        labels: 4096,
        rank: 128,
        pictures: 28,
        edge: 336,
        patch: 14,
        tower: 1024,
        tower_heads: 16,
        tower_mlp: 4096,
    };

    /// The same widths of heads and proportions, in seconds on a CPU.
    pub const SMALL: Self = Self {
        rows: 512,
        sequence: 128,
        hidden: 256,
        heads: 2,
        mlp: 688,
        layers: 2,
        vocab: 2048,
        labels: 64,
        rank: 16,
        pictures: 4,
        edge: 64,
        patch: 8,
        tower: 128,
        tower_heads: 2,
        tower_mlp: 512,
    };

    /// Patches of a picture.
    fn patches(&self) -> usize {
        (self.edge / self.patch).pow(2)
    }

    /// Rows of the tower: each picture's patches and its class token.
    fn tower_rows(&self) -> usize {
        self.pictures * (self.patches() + 1)
    }
}

/// All items, for what computes at `place`.
pub fn items(s: Shapes, place: &Place) -> Vec<Item> {
    [rows::items(s, place), products::items(s, place), optimizer::items(s, place)].into_iter().flatten().collect()
}

/// An item as it was measured.
#[derive(Serialize)]
struct Record<'a> {
    what: &'a str,
    shape: &'a str,
    dtype: &'static str,
    device: &'a str,
    #[serde(flatten)]
    times: Times,
    bytes: usize,
    flops: usize,
    floor_s: f64,
    /// The floor over the median: 1 is as fast as can be.
    share_of_floor: f64,
}

/// The items whose name holds `only`; an error that names all of them if there is none.
pub fn choose(shapes: Shapes, place: &Place, only: Option<&str>) -> Result<Vec<Item>> {
    let (chosen, others): (Vec<Item>, Vec<Item>) =
        items(shapes, place).into_iter().partition(|i| only.is_none_or(|o| i.what.contains(o)));
    if chosen.is_empty() {
        let names: Vec<&str> = others.iter().map(|i| i.what.as_str()).collect();
        bail!("--only {}: no kernel's name holds that", only.unwrap_or_default(); "there are: {}", names.join("; "))
    }
    Ok(chosen)
}

/// Measures the items, and tells of each at once.
pub fn run(bench: &mut Bench, items: &[Item]) -> Result<()> {
    let gpu = !bench.place.device.is_cpu();
    let effort = Effort { seconds: if gpu { 0.2 } else { 0.05 }, least: 3, most: 100 };
    if !bench.out.json {
        writeln!(bench.out.to, "{}", line(["kernel", "shape", "median", "fastest", "floor", "of floor", "rate"]))?;
    }
    let mut noise = Noise::new(&bench.place);
    for item in items {
        let at = || format!("{} {}", item.what, item.shape);
        let mut run = (item.make)(&mut noise).with_context(at)?;
        let times = bench.clock.measure(effort, &mut *run).with_context(at)?;
        let (moving, computing) = (
            item.work.bytes as f64 / bench.machine.copy_bytes_per_s,
            item.work.flops as f64 / bench.machine.matmul_flops_per_s,
        );
        let record = Record {
            what: &item.what,
            shape: &item.shape,
            dtype: type_name(bench.place.dtype),
            device: &bench.machine.device,
            times,
            bytes: item.work.bytes,
            flops: item.work.flops,
            floor_s: moving.max(computing),
            share_of_floor: moving.max(computing) / times.median,
        };
        bench.out.record(&record, || {
            let rate = if computing > moving {
                format!("{}FLOP/s", scaled(item.work.flops as f64 / times.median))
            } else {
                format!("{}B/s", scaled(item.work.bytes as f64 / times.median))
            };
            let share = format!("{:.1} %", 100.0 * record.share_of_floor);
            let times = [times.median, times.min, record.floor_s].map(time);
            line([&item.what, &item.shape, &times[0], &times[1], &times[2], &share, &rate])
        })?;
    }
    Ok(())
}

/// Cells in columns of fixed width, since the next line is not known yet.
fn line([what, shape, median, min, floor, share, rate]: [&str; 7]) -> String {
    format!("{what:<48} {shape:<34} {median:>9} {min:>9} {floor:>9} {share:>8} {rate:>14}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::registry;
    use std::collections::BTreeSet;

    #[test]
    fn every_op_has_an_item_and_every_item_a_name_of_its_own() {
        let all = items(Shapes::SMALL, &Place::cpu());
        let timed: BTreeSet<&str> = all.iter().map(|i| i.op).collect();
        let ops: BTreeSet<&str> = registry::all().iter().map(|c| c.op).collect();
        let forgotten: Vec<_> = ops.difference(&timed).collect();
        assert!(forgotten.is_empty(), "ops that `bench kernels` does not time: {forgotten:?}");
        let names: BTreeSet<_> = all.iter().map(|i| (&i.what, &i.shape)).collect();
        assert_eq!(names.len(), all.len());
        assert!(all.iter().all(|i| i.work.bytes > 0));
    }

    #[test]
    fn the_floors_of_known_kernels() {
        let all = items(Shapes::LLAVA, &Place { dtype: candle_core::DType::BF16, ..Place::cpu() });
        let work = |what: &str| all.iter().find(|i| i.what == what).unwrap_or_else(|| panic!("{what}")).work;
        let (rows, d, m) = (16_384, 4096, 11_008);
        // Two numbers of each row are the norm's statistics, in f32.
        assert_eq!(work("rms_norm of a sum, forward").bytes, rows * d * 4 * 2 + d * 2 + rows * 2 * 4);
        assert_eq!(work("swiglu, backward, y rebuilt").bytes, rows * m * 6 * 2);
        // 8 sequences of 2048, half of each square and its diagonal, 32 heads of 128, two products.
        let pairs = 8 * 2048 * 2049 / 2;
        assert_eq!(work("attention, causal, forward").flops, 4 * pairs * d);
        assert_eq!(work("attention, causal, backward").flops, 10 * pairs * d);
        assert_eq!(work("gemm, x·Wᵀ, hidden to mlp").flops, 2 * rows * d * m);
        // Weight, gradient, two moments read; three of them and the bf16 copy written; the gradient read for the norm.
        let lora = 32 * 128 * (4 * (2 * d) + 3 * (d + m));
        assert_eq!(work("AdamW, f32 values").bytes, lora * (16 + 12 + 2 + 4));
        assert_eq!(work("AdamW, bf16, 8-bit moments").bytes, lora * (2 + 4 + 2 + 4 + 4));
    }
}
