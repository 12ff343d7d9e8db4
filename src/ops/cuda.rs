//! NVIDIA GPUs: opening one, launching our kernels on it, and matrix products by cuBLAS. Everything runs on one stream that the
//! device owns, in the order in which it is asked for, whichever of the host's threads asks.

mod gemm;
pub(crate) mod libraries;
pub mod meter;

pub(super) use gemm::gemm;

use super::launch::{Arg, Grid};
use crate::bail;
use crate::error::{Context, Error, Result};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, DevicePtr, DriverError, LaunchConfig, PushKernelArg, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};
use half::bf16;
use libraries::Library;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex};

/// Machine code of each file under `kernels/`, by its name without ending.
static MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The toolkit that this binary was built with, as (major, minor).
pub const BUILT_WITH: (i32, i32) = include!(concat!(env!("OUT_DIR"), "/version.rs"));

/// Opens the GPU `ordinal`. Errors tell apart: no driver, one that is too old, no such GPU, one that is too old, a missing
/// library; they say what was looked for and where.
pub fn open(ordinal: usize) -> Result<Device> {
    libraries::require(Library::Driver)?;
    result::init().map_err(|e| told("the CUDA driver does not start", e))?;
    let version = driver_version()?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    // candle's kernels are PTX, which a driver older than the toolkit refuses, even of the same major version.
    if (major, minor) < BUILT_WITH {
        bail!("the driver speaks CUDA {major}.{minor}, this binary was built with CUDA {}.{}", BUILT_WITH.0, BUILT_WITH.1;
            "update the driver, or build with a toolkit of CUDA {major}.{minor} or before")
    }
    let names = names()?;
    if ordinal >= names.len() {
        let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        bail!("there is no GPU {ordinal}: the driver shows {there}"; "look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    }
    let (major, minor) = capability(ordinal)?;
    if major < 8 {
        bail!("GPU {ordinal} ({}) has compute capability {major}.{minor}", names[ordinal]; "adfreeze needs 8.0 (A100) or later")
    }
    libraries::require(Library::Blas)?;
    libraries::require(Library::Random)?;
    let device =
        Device::new_cuda_with_stream(ordinal).with_context(|| format!("GPU {ordinal} ({})", names[ordinal]))?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: all work on this device goes to its one stream, also that of other threads (checksums of frozen weights), so the
    // stream's order alone keeps memory alive and writes apart; events would only cost time. Every read by the host is waited
    // for (`launch::host`). A library that brings a stream of its own must be ordered behind and before ours by events.
    unsafe { cuda.disable_event_tracking() };
    gemm::sum_in_f32(cuda)?;
    keep_freed_memory(ordinal)?;
    Ok(device)
}

/// Is the driver's library on this machine?
pub fn driver_present() -> bool {
    libraries::require(Library::Driver).is_ok()
}

/// Names of the GPUs that the driver shows.
fn names() -> Result<Vec<String>> {
    let failed = |e| told("the GPUs cannot be counted", e);
    let n = result::device::get_count().map_err(failed)?;
    (0..n).map(|i| result::device::get_name(result::device::get(i).map_err(failed)?).map_err(failed)).collect()
}

/// Free memory of a GPU in bytes: what the driver has left, and what the pool keeps of what was freed.
pub fn free_memory(device: &CudaDevice) -> Result<u64> {
    let failed = |e| told("the GPU's free memory", e);
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(failed)?;
    let (free, _) = result::mem_get_info().map_err(failed)?;
    let pool = pool(stream.context().ordinal()).map_err(failed)?;
    let number = |what| {
        let mut value = 0u64;
        // SAFETY: `pool` comes from the driver, which writes a 64-bit number.
        unsafe { sys::cuMemPoolGetAttribute(pool, what, (&raw mut value).cast()) }.result().map(|()| value)
    };
    use sys::CUmemPool_attribute_enum as Attribute;
    let reserved = number(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT).map_err(failed)?;
    let used = number(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT).map_err(failed)?;
    Ok(free as u64 + reserved.saturating_sub(used))
}

fn told(what: &str, e: DriverError) -> Error {
    Error::new(format!("{what}: {e}"))
}

fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| told("the driver's version", e))?;
    Ok(version)
}

fn capability(ordinal: usize) -> Result<(i32, i32)> {
    use sys::CUdevice_attribute_enum as Attribute;
    let failed = |e| told("the GPU's compute capability", e);
    let device = result::device::get(ordinal as i32).map_err(failed)?;
    // SAFETY: `device` comes from the driver.
    let get = |what| unsafe { result::device::get_attribute(device, what) }.map_err(failed);
    Ok((
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// Freed memory stays in the pool that allocations come from: handing it back to the system stalls the stream.
fn keep_freed_memory(ordinal: usize) -> Result<()> {
    let failed = |e| told("the memory pool", e);
    let pool = pool(ordinal).map_err(failed)?;
    let mut keep = u64::MAX;
    let what = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: `pool` comes from the driver, which reads a 64-bit number.
    unsafe { sys::cuMemPoolSetAttribute(pool, what, (&raw mut keep).cast()) }.result().map_err(failed)
}

/// The pool that a GPU's allocations come from.
fn pool(ordinal: usize) -> std::result::Result<sys::CUmemoryPool, DriverError> {
    let device = result::device::get(ordinal as i32)?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: `device` comes from the driver, which writes a handle.
    unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device) }.result()?;
    Ok(pool)
}

/// What was loaded, by GPU and name.
#[derive(Default)]
struct Loaded {
    modules: BTreeMap<(usize, String), Arc<CudaModule>>,
    /// Each with the bytes of dynamic shared memory that it was allowed.
    functions: BTreeMap<(usize, String), (CudaFunction, u32)>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

fn function(device: &CudaDevice, module: &str, kernel: &str, shared: u32) -> Result<CudaFunction> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let failed = |e| told(kernel, e);
    let mut loaded = LOADED.lock().map_err(|_| Error::new("a thread stopped while it loaded a kernel"))?;
    let (key, file) = ((context.ordinal(), kernel.to_string()), (context.ordinal(), module.to_string()));
    if !loaded.functions.contains_key(&key) {
        if !loaded.modules.contains_key(&file) {
            let Some((_, code)) = MODULES.iter().find(|(name, _)| *name == module) else {
                bail!("{kernel}: this binary has no kernels called {module}")
            };
            let module = context.load_module(Ptx::from_binary(code.to_vec())).map_err(failed)?;
            loaded.modules.insert(file.clone(), module);
        }
        let function = loaded.modules[&file].load_function(kernel).map_err(failed)?;
        loaded.functions.insert(key.clone(), (function, 0));
    }
    let Some((function, allowed)) = loaded.functions.get_mut(&key) else { bail!("{kernel} was not loaded") };
    if shared > *allowed {
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
        function.set_attribute(MAX_SHARED, shared as i32).map_err(failed)?;
        *allowed = shared;
    }
    Ok(function.clone())
}

/// An argument as the driver takes it: the address of its value.
enum Value {
    U64(u64),
    U32(u32),
    I32(i32),
    F32(f32),
    F64(f64),
}

/// Launches a kernel; all tensors must be contiguous and on `device`.
pub(super) fn launch(device: &CudaDevice, module: &str, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
    let mut values = Vec::with_capacity(args.len());
    for (i, arg) in args.iter().enumerate() {
        values.push(match arg {
            Arg::In(t) | Arg::Out(t) => {
                Value::U64(address(t, device).with_context(|| format!("{kernel}, argument {i}"))?)
            }
            Arg::Null => Value::U64(0),
            Arg::I32(v) => Value::I32(*v),
            Arg::U32(v) => Value::U32(*v),
            Arg::F32(v) => Value::F32(*v),
            Arg::F64(v) => Value::F64(*v),
            Arg::U64(v) => Value::U64(*v),
        });
    }
    let function = function(device, module, kernel, grid.shared)?;
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for v in &values {
        match v {
            Value::U64(v) => builder.arg(v),
            Value::U32(v) => builder.arg(v),
            Value::I32(v) => builder.arg(v),
            Value::F32(v) => builder.arg(v),
            Value::F64(v) => builder.arg(v),
        };
    }
    let [gx, gy, gz] = grid.grid;
    let [bx, by, bz] = grid.block;
    let config = LaunchConfig { grid_dim: (gx, gy, gz), block_dim: (bx, by, bz), shared_mem_bytes: grid.shared };
    // SAFETY: the arguments are those of the kernel's header, as the emulator has checked them in the tests; the tensors
    // outlive the launch in stream order.
    unsafe { builder.launch(config) }.map_err(|e| told(kernel, e))?;
    Ok(())
}

/// Where a contiguous tensor's first element lies on `device`.
pub(super) fn address(t: &Tensor, device: &CudaDevice) -> Result<u64> {
    let Some((begin, _)) = t.layout().contiguous_offsets() else {
        bail!("a kernel needs contiguous tensors; this one has {:?}", t.layout())
    };
    let (storage, _) = t.storage_and_layout();
    let Storage::Cuda(s) = &*storage else {
        bail!("a tensor {:?} is on {:?}, not on the GPU", t.dims(), t.device().location())
    };
    if !s.device.same_device(device) {
        bail!("a tensor {:?} is on another GPU", t.dims())
    }
    let stream = device.cuda_stream();
    let base = match &s.slice {
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F64(s) => s.device_ptr(&stream).0,
        _ => bail!("kernels take f32, bf16, f64, u32, i64 and u8, not {:?}", t.dtype()),
    };
    Ok(base + (begin * t.dtype().size_in_bytes()) as u64)
}

/// A tensor that a kernel overwrites entirely. With `ADFREEZE_POISON` set it starts as NaN, so that a gap shows.
pub(super) fn empty(device: &CudaDevice, dtype: DType, shape: Shape) -> Result<Tensor> {
    static POISON: LazyLock<bool> = LazyLock::new(|| std::env::var_os("ADFREEZE_POISON").is_some());
    let n = shape.elem_count().max(1);
    // SAFETY: what is here is overwritten before it is read; any bits are a number of these types.
    let storage = unsafe {
        match dtype {
            DType::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device.clone()),
            DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(n)?, device.clone()),
            DType::U32 => CudaStorage::wrap_cuda_slice(device.alloc::<u32>(n)?, device.clone()),
            DType::F64 => CudaStorage::wrap_cuda_slice(device.alloc::<f64>(n)?, device.clone()),
            other => bail!("kernels write f32, bf16, u32 and f64, not {other:?}"),
        }
    };
    let t = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
    if *POISON {
        let at = address(&t, device)?;
        // SAFETY: the allocation holds `n` elements.
        unsafe { result::memset_d8_async(at, 0xff, n * dtype.size_in_bytes(), device.cuda_stream().cu_stream()) }
            .map_err(|e| told("poison", e))?;
    }
    Ok(t)
}
