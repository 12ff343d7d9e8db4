//! Random draws of the built-in data: counter-based, so that item `i` of a stream never depends on any other item.

use crate::ops::philox::philox4x32;

/// What is being drawn. Each use has its own stream: changing one leaves the others as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Scene = 1,
    Pixels = 2,
    Questions = 3,
    Preferences = 4,
    Presence = 5,
    Absent = 6,
    Text = 7,
}

/// Draws for item `item` of `split` in one stream.
pub struct Rng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// Key: the seed. Counter: block number, stream and split, item number.
    pub fn new(seed: u64, stream: Stream, split: u32, item: usize) -> Self {
        let item = item as u64;
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, ((stream as u32) << 16) | split, item as u32, (item >> 32) as u32],
            block: [0; 4],
            used: 4,
        }
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32(self.key, self.counter);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A whole number in `0..n` (0 for `n = 0`); its bias is below n / 2³².
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.bits()) * n as u64) >> 32) as usize
    }

    /// A number in `[lo, hi)`, exact on every machine: 24 random bits, no transcendental function.
    pub fn range(&mut self, lo: f32, hi: f32) -> f32 {
        let unit = (self.bits() >> 8) as f32 / (1u32 << 24) as f32;
        lo + (hi - lo) * unit
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f32) -> bool {
        self.range(0.0, 1.0) < probability
    }

    /// One of these, or `None` if there are none.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> Option<T> {
        items.get(self.below(items.len())).copied()
    }

    /// Fisher–Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
