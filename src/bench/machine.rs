//! The machine: what it is called, how fast it copies, and how fast it multiplies large matrices in the type of computation.

use super::noise::Noise;
use super::timer::{Clock, Effort, Times};
use super::{scaled, type_name};
use crate::error::Result;
use crate::model::init::Place;
use crate::ops::matmul::{Mat, matmul};
use candle_core::{DType, Device, Tensor};
use memmap2::MmapMut;
use rayon::prelude::*;
use serde::Serialize;
use std::fs;

/// What a process can expect of the machine: the first record of every bench.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    what: &'static str,
    version: &'static str,
    /// What computes.
    pub device: String,
    /// Type of weights and activations.
    pub dtype: &'static str,
    /// What was copied.
    pub copied_bytes: u64,
    /// Bytes read and written a second by a copy.
    pub copy_bytes_per_s: f64,
    /// Edge of the square matrices that were multiplied.
    pub matmul_edge: usize,
    /// FLOPs a second of their product.
    pub matmul_flops_per_s: f64,
}

impl Machine {
    /// Measures both rates.
    pub fn measure(place: &Place, clock: &Clock) -> Result<Self> {
        let gpu = !place.device.is_cpu();
        // Far larger than caches.
        let copied_bytes: usize = if gpu { 1 << 30 } else { 1 << 27 };
        let effort = Effort { seconds: if gpu { 0.3 } else { 0.2 }, least: 3, most: 50 };
        let copy = copy_times(&place.device, copied_bytes, clock, effort)?;
        let edge = if gpu { 8192 } else { 1024 };
        let mut noise = Noise::new(place);
        let [a, b] = [noise.normal("a", &[edge, edge], 1.0)?, noise.normal("b", &[edge, edge], 1.0)?];
        let product = clock.measure(effort, &mut || matmul(Mat::N(&a), Mat::N(&b)).map(drop))?;
        Ok(Self {
            what: "machine",
            version: env!("CARGO_PKG_VERSION"),
            device: device_name(&place.device)?,
            dtype: type_name(place.dtype),
            copied_bytes: copied_bytes as u64,
            copy_bytes_per_s: 2.0 * copied_bytes as f64 / copy.median,
            matmul_edge: edge,
            matmul_flops_per_s: 2.0 * (edge as f64).powi(3) / product.median,
        })
    }

    /// For people.
    pub(super) fn lines(&self) -> String {
        format!(
            "adfreeze {} on {}, {}: copies {}B/s, multiplies {}FLOP/s ({e} × {e} × {e})",
            self.version,
            self.device,
            self.dtype,
            scaled(self.copy_bytes_per_s),
            scaled(self.matmul_flops_per_s),
            e = self.matmul_edge
        )
    }
}

/// Times of copying `bytes` from one buffer to another, by all that the device has for it.
fn copy_times(device: &Device, bytes: usize, clock: &Clock, effort: Effort) -> Result<Times> {
    if !device.is_cpu() {
        let from = Tensor::ones(bytes / 4, DType::F32, device)?;
        return clock.measure(effort, &mut || Ok(from.copy().map(drop)?));
    }
    // Pages of their own, which are no part of any later step's memory.
    let [mut from, mut to] = [MmapMut::map_anon(bytes)?, MmapMut::map_anon(bytes)?];
    for pages in [&mut from, &mut to] {
        pages.fill(1);
    }
    let part = bytes.div_ceil(rayon::current_num_threads()).max(1);
    clock.measure(effort, &mut || {
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })
}

/// What a device is called, with the threads that compute on it if it is the CPU.
fn device_name(device: &Device) -> Result<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::ops::cuda::meter::name(device);
    }
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name.trim());
    let (model, threads) = (model.unwrap_or("CPU"), rayon::current_num_threads());
    Ok(if device.is_cpu() { format!("{model} ({threads} threads)") } else { format!("{:?}", device.location()) })
}
