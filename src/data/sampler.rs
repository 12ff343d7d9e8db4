//! The order of items by step.
//!
//! Epochs follow each other in one endless stream, and step s takes the items `[s·global, (s+1)·global)` of it: the last
//! batch of an epoch is filled from the next. Orders are drawn from a counter keyed by (seed, stage, epoch), so the
//! batch of any step is known without the steps before it.

use super::dataset::{Dataset, Item};
use crate::bail;
use crate::error::Result;
use crate::ops::random::Key;
use crate::spec::{Batch, GroupBy};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Global batches that are sorted by length together: long enough to give even batches, short enough to stay random.
const WINDOW: usize = 50;

/// Epochs whose order is kept.
const KEPT: usize = 4;

/// Which items every global batch of a stage has.
#[derive(Debug)]
pub struct Plan {
    items: Vec<Shape>,
    global: usize,
    total_steps: usize,
    group_by: GroupBy,
    key: Key,
    orders: Mutex<BTreeMap<usize, Arc<Vec<usize>>>>,
}

/// What grouping looks at.
#[derive(Debug, Clone, Copy)]
struct Shape {
    len: usize,
    has_image: bool,
}

impl Plan {
    /// The order of `total_steps` global batches.
    ///
    /// # Errors
    /// An empty dataset or batch.
    pub fn new(ds: &Dataset, batch: &Batch, seed: u64, stage: &str, total_steps: usize) -> Result<Self> {
        if ds.items.is_empty() {
            bail!("stage {stage} has no samples"; "check `path` and `limit` of its data");
        }
        if batch.global == 0 {
            bail!("stage.{stage}.batch.global is 0"; "a step needs one sample at least");
        }
        let shape = |item: &Item| Shape { len: item.len(), has_image: !item.images().is_empty() };
        Ok(Self {
            items: ds.items.iter().map(shape).collect(),
            global: batch.global,
            total_steps,
            group_by: batch.group_by,
            key: Key::new(seed, "order").child(stage),
            orders: Mutex::default(),
        })
    }

    /// Steps that `epochs` passes over `items` samples take.
    pub fn steps_for(items: usize, epochs: f64, global: usize) -> usize {
        (epochs * items as f64 / global as f64).ceil() as usize
    }

    /// Samples of a step.
    pub fn global(&self) -> usize {
        self.global
    }

    /// Steps of the stage.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    /// The items of the global batch of a step, counted from 0.
    pub fn step(&self, step: usize) -> Vec<usize> {
        let n = self.items.len();
        let stream = step * self.global..(step + 1) * self.global;
        let epochs = stream.start / n..=(stream.end - 1) / n;
        let part = |epoch: usize| {
            let of = |at: usize| at.clamp(epoch * n, (epoch + 1) * n) - epoch * n;
            self.order(epoch)[of(stream.start)..of(stream.end)].to_vec()
        };
        epochs.flat_map(part).collect()
    }

    /// The order of an epoch.
    fn order(&self, epoch: usize) -> Arc<Vec<usize>> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = orders.get(&epoch) {
            return order.clone();
        }
        let order = Arc::new(self.draw(epoch));
        if orders.len() >= KEPT {
            orders.pop_first();
        }
        orders.insert(epoch, order.clone());
        order
    }

    fn draw(&self, epoch: usize) -> Vec<usize> {
        let n = self.items.len();
        let mut order: Vec<usize> = (0..n).collect();
        if self.group_by == GroupBy::Sequential {
            return order;
        }
        let key = self.key.index(epoch as u64);
        shuffle(&mut order, key);
        if self.group_by == GroupBy::ModalityLength {
            // The first items fill the last batch of the epoch before; from there on batches are whole.
            let begun = (self.global - epoch * n % self.global) % self.global;
            if begun < n {
                let grouped = self.group(&order[begun..], key.child("batches"));
                order.truncate(begun);
                order.extend(grouped);
            }
        }
        order
    }

    /// Batches of one modality and of like lengths in random order; what fills no batch comes last.
    fn group(&self, order: &[usize], key: Key) -> Vec<usize> {
        let mut batches: Vec<Vec<usize>> = vec![];
        let mut rest = vec![];
        for has_image in [true, false] {
            let mut same: Vec<usize> =
                order.iter().copied().filter(|&i| self.items[i].has_image == has_image).collect();
            for window in same.chunks_mut(self.global * WINDOW) {
                window.sort_by_key(|&i| std::cmp::Reverse(self.items[i].len));
            }
            let chunks = same.chunks_exact(self.global);
            rest.extend_from_slice(chunks.remainder());
            batches.extend(chunks.map(<[usize]>::to_vec));
        }
        shuffle(&mut batches, key);
        batches.push(rest);
        batches.concat()
    }
}

/// Fisher–Yates; position i draws from counter i.
fn shuffle<T>(items: &mut [T], key: Key) {
    for i in (1..items.len()).rev() {
        let [a, b, ..] = key.words(i as u64);
        let word = u128::from(a) << 32 | u128::from(b);
        items.swap(i, ((word * (i as u128 + 1)) >> 64) as usize);
    }
}

/// The batches of an evaluation: `micro` items each, in order.
pub fn in_order(items: usize, micro: usize) -> impl Iterator<Item = Range<usize>> {
    (0..items).step_by(micro.max(1)).map(move |at| at..(at + micro.max(1)).min(items))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::Sample;
    use crate::data::image::ImageRef;
    use crate::spec::{Alpha, Resize};

    /// Items of the lengths 1, 2, 3, …; every third one without a picture.
    fn dataset(n: usize) -> Dataset {
        let image = ImageRef { path: "a.png".into(), resize: Resize::Crop, alpha: Alpha::Drop, size: 8, tiles: None };
        let item = |i: usize| {
            Item::Sample(Sample {
                id: i.to_string(),
                ids: vec![1; i + 1],
                labels: vec![1; i + 1],
                images: if i.is_multiple_of(3) { vec![] } else { vec![image.clone()] },
                category: None,
                absent: vec![],
            })
        };
        Dataset { items: (0..n).map(item).collect() }
    }

    fn plan(n: usize, global: usize, group_by: GroupBy, seed: u64, stage: &str) -> Plan {
        Plan::new(&dataset(n), &Batch { global, micro: None, group_by }, seed, stage, 10).unwrap()
    }

    fn stream(p: &Plan, steps: usize) -> Vec<usize> {
        (0..steps).flat_map(|s| p.step(s)).collect()
    }

    #[test]
    fn every_epoch_has_every_item_once() {
        for group_by in [GroupBy::None, GroupBy::ModalityLength, GroupBy::Sequential] {
            for (n, global) in [(10, 4), (7, 7), (5, 12), (1, 3), (23, 2)] {
                let all = stream(&plan(n, global, group_by, 1, "s"), 3 * n);
                for epoch in all.chunks_exact(n) {
                    let mut sorted = epoch.to_vec();
                    sorted.sort_unstable();
                    assert_eq!(sorted, (0..n).collect::<Vec<_>>(), "{group_by:?} {n} {global}");
                }
            }
        }
    }

    #[test]
    fn a_step_does_not_depend_on_what_ran_before() {
        for group_by in [GroupBy::None, GroupBy::ModalityLength] {
            let unbroken = stream(&plan(11, 4, group_by, 7, "sft"), 40);
            let resumed = plan(11, 4, group_by, 7, "sft");
            for s in [39, 3, 17, 0] {
                assert_eq!(resumed.step(s), unbroken[s * 4..s * 4 + 4]);
            }
        }
    }

    #[test]
    fn orders_differ_by_seed_stage_and_epoch() {
        let a = plan(50, 50, GroupBy::None, 1, "a");
        let orders = [
            a.step(0),
            a.step(1),
            plan(50, 50, GroupBy::None, 2, "a").step(0),
            plan(50, 50, GroupBy::None, 1, "b").step(0),
        ];
        for i in 0..4 {
            for j in 0..i {
                assert_ne!(orders[i], orders[j]);
            }
        }
    }

    #[test]
    fn shuffles_evenly() {
        let mut seen = [[0usize; 4]; 4];
        for e in 0..4000 {
            let mut v = [0, 1, 2, 3];
            shuffle(&mut v, Key::new(3, "t").index(e));
            v.iter().enumerate().for_each(|(at, &x)| seen[x][at] += 1);
        }
        assert!(seen.iter().flatten().all(|&n| (880..1120).contains(&n)), "{seen:?}");
    }

    #[test]
    fn groups_by_modality_and_length() {
        let (n, global) = (300, 8);
        let p = plan(n, global, GroupBy::ModalityLength, 5, "s");
        let (mut mixed, mut spread) = (0, 0);
        let steps = 3 * n / global;
        for s in 0..steps {
            let batch = p.step(s);
            let text = batch.iter().filter(|&&i| i % 3 == 0).count();
            mixed += usize::from(text != 0 && text != global);
            spread += batch.iter().max().unwrap() - batch.iter().min().unwrap();
        }
        assert!(mixed <= 6, "{mixed} of {steps} batches are mixed");
        assert!(spread / steps < 60, "mean spread of lengths {}", spread / steps);
        assert_ne!(p.step(0)[0], *p.step(0).iter().max().unwrap().max(&(n - 1)), "batches come in random order");
    }

    #[test]
    fn sequential_keeps_the_order_of_the_file() {
        assert_eq!(stream(&plan(3, 2, GroupBy::Sequential, 1, "s"), 3), [0, 1, 2, 0, 1, 2]);
        assert_eq!(Plan::steps_for(10, 1.0, 4), 3);
        assert_eq!(Plan::steps_for(10, 0.5, 4), 2);
        assert_eq!(in_order(5, 2).collect::<Vec<_>>(), [0..2, 2..4, 4..5]);
    }

    #[test]
    fn refuses_nothing_to_do() {
        let batch = Batch { global: 1, micro: None, group_by: GroupBy::None };
        assert!(Plan::new(&Dataset::default(), &batch, 1, "align", 1).unwrap_err().cause().contains("align"));
        let batch = Batch { global: 0, ..batch };
        assert!(Plan::new(&dataset(1), &batch, 1, "align", 1).is_err());
    }
}
