//! CUDA's libraries, opened at the first call. candle links them; then a binary would not start where there is no driver, as
//! on a cluster's login node. So every function of theirs that candle calls is defined here as a jump through a slot, which at
//! first leads to [`adfreeze_resolve`]: this opens the library, finds the function and fills the slot. Without the library the call
//! returns the library's error code for it.
//!
//! On x86-64 Linux; elsewhere the libraries are linked as candle does it.

use crate::bail;
use crate::error::Result;

/// What is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Library {
    Driver,
    Blas,
    Random,
}

impl Library {
    /// What a user knows it as.
    fn title(self) -> &'static str {
        match self {
            Self::Driver => "the NVIDIA driver's library",
            Self::Blas => "cuBLAS",
            Self::Random => "cuRAND",
        }
    }
}

/// An error that says what was looked for, where, and what the loader said, if the library cannot be opened.
pub(crate) fn require(library: Library) -> Result<()> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Err(story) = jumps::opened(library) {
        let hint = match library {
            Library::Driver => "is this a machine with a GPU? Install the driver; --device cpu computes without one",
            _ => {
                "install the CUDA toolkit, or name the folder that holds the library in ADFREEZE_CUDA_LIBS or LD_LIBRARY_PATH"
            }
        };
        bail!("{} cannot be opened:\n  {}", library.title(), story.join("\n  "); "{hint}")
    }
    Ok(())
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod jumps {
    use super::Library;
    use libloading::os::unix::{Library as Opened, RTLD_GLOBAL, RTLD_NOW};
    use std::ffi::{CStr, c_char, c_void};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicPtr, Ordering};

    /// In the order of their numbers in the slots.
    const ALL: [Library; 3] = [Library::Driver, Library::Blas, Library::Random];

    impl Library {
        /// File names, the version that this binary was built for first.
        fn files(self) -> [String; 2] {
            let versioned = |name: &str, version: &str| [format!("lib{name}.so.{version}"), format!("lib{name}.so")];
            match self {
                Self::Driver => versioned("cuda", "1"),
                Self::Blas => versioned("cublas", &crate::ops::cuda::BUILT_WITH.0.to_string()),
                Self::Random => versioned("curand", "10"),
            }
        }

        /// What a call into a library that is not there returns.
        fn absent(self) -> *const c_void {
            /// `CUDA_ERROR_NO_DEVICE`.
            extern "C" fn no_device() -> i32 {
                100
            }
            /// `CUBLAS_STATUS_NOT_INITIALIZED`.
            extern "C" fn not_initialised() -> i32 {
                1
            }
            /// `CURAND_STATUS_INITIALIZATION_FAILED`.
            extern "C" fn failed() -> i32 {
                203
            }
            match self {
                Self::Driver => no_device as *const c_void,
                Self::Random => failed as *const c_void,
                Self::Blas => not_initialised as *const c_void,
            }
        }
    }

    /// One function: where its jump leads, its name, its library's number. The assembly below lays it out.
    #[repr(C)]
    struct Slot {
        target: AtomicPtr<c_void>,
        name: *const c_char,
        library: u64,
    }

    /// The library, or what was tried in vain.
    pub(super) fn opened(library: Library) -> Result<&'static Opened, &'static [String]> {
        static OPENED: [OnceLock<Result<Opened, Vec<String>>>; 3] = [const { OnceLock::new() }; 3];
        OPENED[library as usize].get_or_init(|| open(library)).as_ref().map_err(Vec::as_slice)
    }

    fn open(library: Library) -> Result<Opened, Vec<String>> {
        let mut story = Vec::new();
        for folder in folders() {
            for file in library.files() {
                let path = folder.as_ref().map_or_else(|| PathBuf::from(&file), |f| f.join(&file));
                if folder.is_some() && !path.exists() {
                    story.push(format!("{}: not there", path.display()));
                    continue;
                }
                // SAFETY: CUDA's libraries may be initialised on any thread.
                match unsafe { Opened::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                    Ok(opened) => return Ok(opened),
                    Err(e) => {
                        let why = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
                        story.push(format!("{why} (dlopen {})", path.display()));
                    }
                }
            }
        }
        Err(story)
    }

    /// Where libraries may lie; `None`: where the loader looks.
    fn folders() -> Vec<Option<PathBuf>> {
        let own = std::env::var_os("ADFREEZE_CUDA_LIBS");
        let own = own.iter().flat_map(std::env::split_paths).collect::<Vec<_>>();
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
        let toolkits = homes.chain([PathBuf::from("/usr/local/cuda")]).flat_map(|h| [h.join("lib64"), h.join("lib")]);
        own.into_iter().map(Some).chain([None]).chain(toolkits.map(Some)).collect()
    }

    /// Called by a jump that leads nowhere yet: finds its function, and never panics.
    ///
    /// # Safety
    /// `slot` is one of the slots below.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn adfreeze_resolve(slot: *const Slot) -> *const c_void {
        // SAFETY: the caller's promise; the name ends with a zero.
        let (slot, name) = unsafe { (&*slot, CStr::from_ptr((*slot).name)) };
        let Some(library) = ALL.get(slot.library as usize).copied() else { return Library::Driver.absent() };
        // SAFETY: the address is only handed on; whoever calls it declares its type.
        let found = opened(library).ok().and_then(|l| unsafe { l.get::<*const c_void>(name.to_bytes_with_nul()) }.ok());
        let target = found.map_or(library.absent(), |f| f.as_raw_ptr().cast_const());
        slot.target.store(target.cast_mut(), Ordering::Release);
        target
    }

    macro_rules! jumps {
        ($($library:literal: $($name:ident)*;)*) => {
            std::arch::global_asm!(
                ".text",
                ".p2align 4",
                // All registers that may hold arguments survive; the slot comes in r11.
                "adfreeze_find:",
                "push %rdi", "push %rsi", "push %rdx", "push %rcx", "push %r8", "push %r9", "push %rax", "push %r10",
                "sub $136, %rsp",
                "movups %xmm0, (%rsp)", "movups %xmm1, 16(%rsp)", "movups %xmm2, 32(%rsp)", "movups %xmm3, 48(%rsp)",
                "movups %xmm4, 64(%rsp)", "movups %xmm5, 80(%rsp)", "movups %xmm6, 96(%rsp)", "movups %xmm7, 112(%rsp)",
                "mov %r11, %rdi",
                "call {resolve}",
                "mov %rax, %r11",
                "movups (%rsp), %xmm0", "movups 16(%rsp), %xmm1", "movups 32(%rsp), %xmm2", "movups 48(%rsp), %xmm3",
                "movups 64(%rsp), %xmm4", "movups 80(%rsp), %xmm5", "movups 96(%rsp), %xmm6", "movups 112(%rsp), %xmm7",
                "add $136, %rsp",
                "pop %r10", "pop %rax", "pop %r9", "pop %r8", "pop %rcx", "pop %rdx", "pop %rsi", "pop %rdi",
                "jmp *%r11",
                $($(
                    concat!(".globl ", stringify!($name)),
                    concat!(".type ", stringify!($name), ", @function"),
                    concat!(stringify!($name), ": jmp *adfreeze_slot_", stringify!($name), "(%rip)"),
                    concat!("adfreeze_first_", stringify!($name), ": lea adfreeze_slot_", stringify!($name), "(%rip), %r11"),
                    "jmp adfreeze_find",
                    ".section .data.adfreeze_slots, \"aw\", @progbits",
                    ".p2align 3",
                    concat!("adfreeze_slot_", stringify!($name), ": .quad adfreeze_first_", stringify!($name),
                        ", adfreeze_name_", stringify!($name), ", ", $library),
                    ".section .rodata.adfreeze_names, \"a\", @progbits",
                    concat!("adfreeze_name_", stringify!($name), ": .asciz \"", stringify!($name), "\""),
                    ".text",
                )*)*
                resolve = sym adfreeze_resolve,
                options(att_syntax)
            );
        };
    }

    // What candle 0.11 and its cudarc call. A function that is missing here shows when the binary is linked against
    // nothing else, as CI does it.
    jumps! {
        0: cuCtxDestroy_v2 cuCtxGetCurrent cuCtxSetCurrent cuCtxSynchronize cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount
            cuDeviceGetDefaultMemPool cuDeviceGetName cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxRetain
            cuDriverGetVersion cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventRecord
            cuEventSynchronize cuFuncSetAttribute cuGetErrorString cuInit cuLaunchKernel cuMemAllocAsync cuMemAlloc_v2
            cuMemFreeAsync cuMemFree_v2 cuMemGetInfo_v2 cuMemPoolGetAttribute cuMemPoolSetAttribute cuMemcpyDtoDAsync_v2
            cuMemcpyDtoHAsync_v2 cuMemcpyHtoDAsync_v2 cuMemcpyPeerAsync cuMemsetD8Async cuModuleGetFunction cuModuleLoad
            cuModuleLoadData cuModuleUnload cuStreamCreate cuStreamDestroy_v2 cuStreamIsCapturing cuStreamSynchronize cuStreamWaitEvent;
        1: cublasCreate_v2 cublasDestroy_v2 cublasDgemmStridedBatched cublasGemmStridedBatchedEx
            cublasSetMathMode cublasSetStream_v2;
        2: curandCreateGenerator curandDestroyGenerator curandSetPseudoRandomGeneratorSeed curandSetStream;
    }
}
