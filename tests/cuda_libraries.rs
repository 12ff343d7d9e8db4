//! Functions of CUDA's libraries are found at their first call (`src/ops/cuda/libraries.rs`): shown on machines without a GPU by a
//! made-up driver, built here with the C++ compiler.
#![cfg(all(feature = "cuda", target_arch = "x86_64", target_os = "linux"))]

use std::path::Path;
use std::process::Command;

/// `libcuda.so.1` of a driver that speaks CUDA `version` and shows GPUs each of whose attributes is `all`.
fn driver(dir: &Path, version: u32, gpus: u32, all: u32) {
    let source = dir.join("driver.cpp");
    let text = format!(
        r#"
        #include <cstring>
        extern "C" {{
        int cuInit(unsigned) {{ return 0; }}
        int cuDriverGetVersion(int* v) {{ *v = {version}; return 0; }}
        int cuDeviceGetCount(int* n) {{ *n = {gpus}; return 0; }}
        int cuDeviceGet(int* d, int i) {{ *d = i; return 0; }}
        int cuDeviceGetName(char* s, int n, int) {{ std::strncpy(s, "Made-up GPU", n); return 0; }}
        int cuDeviceGetAttribute(int* v, int, int) {{ *v = {all}; return 0; }}
        // Sixteen arguments in registers and on the stack, each with its own weight.
        unsigned long cuStreamIsCapturing(double a, double b, double c, double d, double e, double f, double g, double h,
            unsigned long i, unsigned long j, unsigned long k, unsigned long l, unsigned long m, unsigned long n,
            unsigned long o, unsigned long p) {{
            return (unsigned long)(a + 2*b + 3*c + 4*d + 5*e + 6*f + 7*g + 8*h) + 9*i + 10*j + 11*k + 12*l + 13*m + 14*n
                + 15*o + 16*p;
        }}
        }}"#
    );
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CXX").unwrap_or("c++".into());
    let built =
        Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(dir.join("libcuda.so.1")).arg(&source).status();
    assert!(built.unwrap().success());
}

/// What the binary says to `--device cuda:0` beside that driver.
fn told(dir: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adfreeze"));
    command.args(["generate", "--model", "nowhere", "--prompt", "x", "--device", "cuda:0"]);
    let out = command.env("ADFREEZE_CUDA_LIBS", dir).env_remove("CUDA_HOME").env_remove("CUDA_PATH").output().unwrap();
    assert!(!out.status.success());
    String::from_utf8(out.stderr).unwrap()
}

#[test]
fn what_keeps_a_gpu_from_being_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let expect = |what: &[&str]| {
        let told = told(dir.path());
        what.iter().for_each(|w| assert!(told.contains(w), "{w} in:\n{told}"));
    };
    let nowhere = dir.path().join("libcuda.so.1").display().to_string();
    if !Path::new("/dev/nvidiactl").exists() {
        expect(&["the NVIDIA driver's library cannot be opened", "libcuda.so.1", &format!("{nowhere}: not there")]);
    }
    driver(dir.path(), 11_040, 1, 9);
    expect(&["the driver speaks CUDA 11.4", "hint: update the driver"]);
    // One minor version before the toolkit's is too old as well.
    let (major, minor) = adfreeze::ops::cuda::BUILT_WITH;
    let built = (major * 1000 + minor * 10) as u32;
    driver(dir.path(), built - 10, 1, 9);
    expect(&["the driver speaks CUDA ", "this binary was built with CUDA "]);
    driver(dir.path(), built, 0, 9);
    expect(&["there is no GPU 0"]);
    driver(dir.path(), 99_000, 0, 9);
    expect(&["there is no GPU 0: the driver shows none", "CUDA_VISIBLE_DEVICES"]);
    driver(dir.path(), 99_000, 1, 7);
    expect(&["GPU 0 (Made-up GPU) has compute capability 7.7", "8.0"]);
}

/// In a process of its own, whose environment names the made-up driver from the start.
#[test]
fn a_first_call_keeps_every_argument() {
    let dir = tempfile::tempdir().unwrap();
    driver(dir.path(), 13_000, 1, 9);
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "the_first_call", "--ignored"]).env("ADFREEZE_CUDA_LIBS", dir.path());
    let out = again.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
#[ignore = "run by the test above, beside a made-up driver"]
fn the_first_call() {
    type Sixteen =
        unsafe extern "C" fn(f64, f64, f64, f64, f64, f64, f64, f64, u64, u64, u64, u64, u64, u64, u64, u64) -> u64;
    unsafe extern "C" {
        fn cuStreamIsCapturing();
    }
    // The jump is the crate's own.
    assert!(adfreeze::ops::cuda::driver_present());
    // SAFETY: the made-up driver defines it so.
    let f = unsafe { std::mem::transmute::<unsafe extern "C" fn(), Sixteen>(cuStreamIsCapturing) };
    for _ in 0..2 {
        // SAFETY: as above.
        let got = unsafe { f(1., 2., 3., 4., 5., 6., 7., 8., 9, 10, 11, 12, 13, 14, 15, 16) };
        assert_eq!(got, (1..=16).map(|i| i * i).sum::<u64>());
    }
}
