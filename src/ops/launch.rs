//! Runs the kernels of `kernels/` on what can run them: a GPU (`ops::cuda`), or an [`Emulator`] (the tests compile them for the
//! CPU). An op asks `path` how it is to run, and describes its kernel's launch for whatever runs it.

use super::Real;
use crate::bail;
use crate::error::Result;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Tensor};
use half::bf16;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// How an op runs on its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// By our kernels, in f32 or bf16.
    Kernel,
    /// By the reference on the CPU, in f32 or f64.
    Reference,
    /// By the reference on bf16 operands that are widened to f32; the result is rounded back.
    Widened,
}

/// How an op on `x` runs; `op` is for the message.
pub(crate) fn path(op: &str, x: &Tensor) -> Result<Path> {
    Ok(match (x.device(), x.dtype()) {
        (Device::Cpu, DType::F32 | DType::BF16) if emulating() => Path::Kernel,
        (Device::Cpu, DType::F32 | DType::F64) => Path::Reference,
        (Device::Cpu, DType::BF16) => Path::Widened,
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), DType::F32 | DType::BF16) => Path::Kernel,
        (device, dtype) => {
            bail!("{op}: {dtype:?} on {:?} is not supported", device.location();
                "f32 and bf16 run everywhere, f64 on the CPU")
        }
    })
}

/// To f32, if it is bf16.
pub(crate) fn widen(x: &Tensor) -> Result<Tensor> {
    Ok(if x.dtype() == DType::BF16 { x.to_dtype(DType::F32)? } else { x.clone() })
}

/// Rounds to bf16.
pub(crate) fn narrow(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::BF16)?)
}

/// Blocks and threads of a launch, and bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads.
    pub(crate) fn line(blocks: usize, threads: usize) -> Self {
        Self { grid: [blocks as u32, 1, 1], block: [threads as u32, 1, 1], shared: 0 }
    }

    /// Blocks of 256 threads for `n` elements of which a thread takes `each`.
    pub(crate) fn flat(n: usize, each: usize) -> Self {
        Self::line(n.div_ceil(256 * each), 256)
    }

    /// Blocks of 256 threads for `n` rows of `d` elements, of which a thread takes `v` at a time.
    pub(crate) fn rows(n: usize, d: usize, v: usize) -> Self {
        let packs = d.div_ceil(v).max(1);
        let x =
            if packs <= 32 { packs.next_power_of_two() } else { packs.div_ceil(4).next_power_of_two().clamp(32, 256) };
        let y = 256 / x;
        Self { grid: [n.div_ceil(y) as u32, 1, 1], block: [x as u32, y as u32, 1], shared: 0 }
    }
}

/// One argument of a kernel, in the order of its parameters.
#[derive(Clone, Copy)]
pub(crate) enum Arg<'a> {
    /// A tensor that is read.
    In(&'a Tensor),
    /// A tensor that is written (and may be read).
    Out(&'a Tensor),
    /// A null pointer.
    Null,
    I32(i32),
    U32(u32),
    F32(f32),
    F64(f64),
    U64(u64),
}

impl<'a> Arg<'a> {
    /// A tensor that is read, or a null pointer.
    pub(crate) fn maybe(t: Option<&'a Tensor>) -> Self {
        t.map_or(Self::Null, Self::In)
    }

    /// A length or index.
    pub(crate) fn len(n: usize) -> Result<Self> {
        match i32::try_from(n) {
            Ok(n) => Ok(Self::I32(n)),
            Err(_) => bail!("a kernel counts to 2³¹ − 1, not to {n}"; "take a smaller micro-batch"),
        }
    }

    /// A number of elements, `size_t` in a kernel.
    pub(crate) fn size(n: usize) -> Self {
        Self::U64(n as u64)
    }

    /// Where a tensor lies.
    #[cfg(feature = "cuda")]
    fn device(&self) -> Option<&'a Device> {
        match self {
            Self::In(t) | Self::Out(t) => Some(t.device()),
            _ => None,
        }
    }

    pub(crate) fn flag(b: bool) -> Self {
        Self::I32(i32::from(b))
    }
}

/// What an emulator is handed for an argument.
#[derive(Debug, Clone, Copy)]
pub enum HostArg {
    /// A tensor's elements.
    Memory {
        /// The first one.
        at: *mut u8,
        /// Their size together.
        bytes: usize,
        /// Where they begin in their allocation, in bytes.
        offset: usize,
        /// May the kernel write?
        written: bool,
    },
    /// A null pointer.
    Null,
    /// A number, as its parameter holds it.
    Scalar([u8; 8]),
}

/// Runs a kernel on host memory.
pub trait Emulator {
    /// `module` is the file under `kernels/` without its ending.
    fn launch(&self, module: &str, kernel: &str, grid: Grid, args: &[HostArg]) -> Result<()>;
}

thread_local! {
    static EMULATOR: RefCell<Option<Rc<dyn Emulator>>> = const { RefCell::new(None) };
}

/// Runs `f` with the kernels of this thread's ops going to `emulator` instead of the CPU reference.
pub fn emulated<R>(emulator: Rc<dyn Emulator>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Rc<dyn Emulator>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            EMULATOR.set(self.0.take());
        }
    }
    let _restore = Restore(EMULATOR.replace(Some(emulator)));
    f()
}

fn emulating() -> bool {
    EMULATOR.with_borrow(Option::is_some)
}

/// The end of a kernel's name for tensors of these types: `f32`, `bf16`, or `f32_bf16` where they differ.
fn suffix(dtypes: [DType; 2]) -> Result<&'static str> {
    Ok(match dtypes {
        [DType::F32, DType::F32] => "f32",
        [DType::BF16, DType::BF16] => "bf16",
        [DType::F32, DType::BF16] => "f32_bf16",
        [DType::BF16, DType::F32] => "bf16_f32",
        [a, b] => bail!("there is no kernel for {a:?} and {b:?}"),
    })
}

/// Launches the form of `kernel` for `dtype`; all tensors must be contiguous and on one device.
pub(crate) fn launch(module: &str, kernel: &str, dtype: DType, grid: Grid, args: &[Arg]) -> Result<()> {
    launch_mixed(module, kernel, [dtype; 2], grid, args)
}

/// Launches the form of `kernel` for two types that meet.
pub(crate) fn launch_mixed(module: &str, kernel: &str, types: [DType; 2], grid: Grid, args: &[Arg]) -> Result<()> {
    launch_plain(module, &format!("{kernel}_{}", suffix(types)?), grid, args)
}

/// Launches a kernel that has one form only.
pub(crate) fn launch_plain(module: &str, kernel: &str, grid: Grid, args: &[Arg]) -> Result<()> {
    if grid.grid.contains(&0) {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if let Some(Device::Cuda(device)) = args.iter().find_map(Arg::device) {
        return super::cuda::launch(device, module, kernel, grid, args);
    }
    let Some(emulator) = EMULATOR.with_borrow(Clone::clone) else { bail!("{kernel}: nothing here runs kernels") };
    let host: Vec<HostArg> = args.iter().map(host_arg).collect::<Result<_>>()?;
    emulator.launch(module, kernel, grid, &host)
}

fn host_arg(arg: &Arg) -> Result<HostArg> {
    fn scalar<const N: usize>(b: [u8; N]) -> HostArg {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&b);
        HostArg::Scalar(bytes)
    }
    Ok(match arg {
        Arg::Null => HostArg::Null,
        Arg::I32(v) => scalar(v.to_ne_bytes()),
        Arg::U32(v) => scalar(v.to_ne_bytes()),
        Arg::F32(v) => scalar(v.to_ne_bytes()),
        Arg::F64(v) => scalar(v.to_ne_bytes()),
        Arg::U64(v) => scalar(v.to_ne_bytes()),
        Arg::In(t) => memory(t, false)?,
        Arg::Out(t) => memory(t, true)?,
    })
}

/// Where a contiguous CPU tensor's elements lie.
fn memory(t: &Tensor, written: bool) -> Result<HostArg> {
    struct Address(AtomicPtr<u8>);
    impl InplaceOp1 for Address {
        fn name(&self) -> &'static str {
            "address"
        }
        fn cpu_fwd(&self, s: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            let at = match s {
                CpuStorage::F32(v) => v.as_mut_ptr().cast(),
                CpuStorage::BF16(v) => v.as_mut_ptr().cast(),
                CpuStorage::U32(v) => v.as_mut_ptr().cast(),
                CpuStorage::U8(v) => v.as_mut_ptr(),
                CpuStorage::I64(v) => v.as_mut_ptr().cast(),
                CpuStorage::F64(v) => v.as_mut_ptr().cast(),
                _ => candle_core::bail!("kernels take f32, bf16, f64, u32, i64 and u8"),
            };
            self.0.store(at, Ordering::Relaxed);
            Ok(())
        }
    }
    let Some((begin, end)) = t.layout().contiguous_offsets() else {
        bail!("a kernel needs contiguous tensors; one has {:?}", t.layout())
    };
    let address = Address(AtomicPtr::new(std::ptr::null_mut()));
    t.inplace_op1(&address)?;
    let (offset, bytes) = (begin * t.dtype().size_in_bytes(), (end - begin) * t.dtype().size_in_bytes());
    // SAFETY: `offset` lies in the tensor's storage.
    let at = unsafe { address.0.into_inner().add(offset) };
    Ok(HostArg::Memory { at, bytes, offset, written })
}

/// Where a contiguous tensor's first element lies, for a table that a kernel reads.
pub(crate) fn address(t: &Tensor) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = t.device() {
        return super::cuda::address(t, device);
    }
    match memory(t, false)? {
        HostArg::Memory { at, .. } => Ok(at as u64),
        _ => bail!("a tensor without memory"),
    }
}

/// A tensor beside `like` that a kernel overwrites entirely. On the CPU it starts as NaN, so that a gap shows.
pub(crate) fn empty(like: &Tensor, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let (n, device) = (shape.elem_count(), like.device());
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return super::cuda::empty(device, dtype, shape);
    }
    Ok(match dtype {
        DType::F32 => Tensor::from_vec(vec![f32::NAN; n], shape, device)?,
        DType::BF16 => Tensor::from_vec(vec![bf16::NAN; n], shape, device)?,
        DType::U32 => Tensor::from_vec(vec![u32::MAX; n], shape, device)?,
        DType::F64 => Tensor::from_vec(vec![f64::NAN; n], shape, device)?,
        other => bail!("kernels write f32, bf16, u32 and f64, not {other:?}"),
    })
}

/// Numbers of the host, on a device.
pub(crate) fn upload<T: candle_core::WithDType>(device: &Device, v: &[T], shape: impl Into<Shape>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(device), true) = (device, v.is_empty()) {
        // The driver gives no memory of no size.
        return super::cuda::empty(device, T::DTYPE, shape.into());
    }
    Ok(Tensor::from_slice(v, shape, device)?)
}

/// Can rows of `d` elements of these tensors be read [`pack`] elements at a time?
pub(crate) fn wide(d: usize, tensors: &[Option<&Tensor>]) -> bool {
    let v = pack(tensors);
    d.is_multiple_of(v) && tensors.iter().flatten().all(|t| t.layout().start_offset().is_multiple_of(v))
}

/// Elements of a 16-byte access to the tensor with the largest elements.
pub(crate) fn pack(tensors: &[Option<&Tensor>]) -> usize {
    16 / tensors.iter().flatten().map(|t| t.dtype().size_in_bytes()).max().unwrap_or(4)
}

/// A tensor on the host. All that comes from a GPU goes by here: a copy into memory that is not pinned may be under way when the
/// driver returns, so it is waited for before anyone looks at a byte.
pub(crate) fn host(t: &Tensor) -> Result<Tensor> {
    let there = t.to_device(&Device::Cpu)?;
    t.device().synchronize()?;
    Ok(there)
}

/// A tensor's numbers on the host.
pub(crate) fn download<T: Real>(t: &Tensor) -> Result<Vec<T>> {
    Ok(host(&t.to_dtype(T::DTYPE)?)?.flatten_all()?.to_vec1()?)
}
