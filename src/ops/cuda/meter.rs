//! What a measurement asks of a GPU: its name, the time between two places in candle's stream, and the most memory that was
//! in use.

use super::{pool, told};
use crate::error::Result;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, result, sys};
use sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH as HIGHEST;

/// The GPU's name, as the driver tells it.
pub fn name(device: &CudaDevice) -> Result<String> {
    let failed = |e| told("the GPU's name", e);
    let ordinal = device.cuda_stream().context().ordinal();
    result::device::get_name(result::device::get(ordinal as i32).map_err(failed)?).map_err(failed)
}

/// A place in candle's stream, whose time the GPU notes as it comes by.
pub struct Event(CudaEvent);

impl Event {
    /// Behind all that was asked for so far.
    pub fn record(device: &CudaDevice) -> Result<Self> {
        let timed = sys::CUevent_flags_enum::CU_EVENT_DEFAULT;
        device.cuda_stream().record_event(Some(timed)).map(Self).map_err(|e| told("an event", e))
    }

    /// Seconds from here to a later event; waits until the GPU has come by both.
    pub fn seconds_until(&self, end: &Self) -> Result<f64> {
        let ms = self.0.elapsed_ms(&end.0).map_err(|e| told("the time between two events", e))?;
        Ok(f64::from(ms) / 1e3)
    }
}

/// Bytes of the pool that were in use at most since [`reset_peak`].
pub fn peak_memory(device: &CudaDevice) -> Result<u64> {
    let failed = |e| told("the GPU's peak memory", e);
    let (pool, mut bytes) = (pool(device.cuda_stream().context().ordinal()).map_err(failed)?, 0u64);
    // SAFETY: `pool` comes from the driver, which writes a 64-bit number.
    unsafe { sys::cuMemPoolGetAttribute(pool, HIGHEST, (&raw mut bytes).cast()) }.result().map_err(failed)?;
    Ok(bytes)
}

/// Lets [`peak_memory`] count from what is in use now.
pub fn reset_peak(device: &CudaDevice) -> Result<()> {
    let failed = |e| told("the GPU's peak memory", e);
    let (pool, mut zero) = (pool(device.cuda_stream().context().ordinal()).map_err(failed)?, 0u64);
    // SAFETY: `pool` comes from the driver, which reads a 64-bit number; 0 is the one that it takes.
    unsafe { sys::cuMemPoolSetAttribute(pool, HIGHEST, (&raw mut zero).cast()) }.result().map_err(failed)
}
