//! With the feature `cuda`: every kernel of `kernels/` compiled by nvcc into one file of machine code, and a table of them
//! that `ops::cuda` includes. With `flash-attn`: the list of widths that candle-flash-attn was compiled for. In any case: what `--version`
//! says.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::thread;

/// Machine code for A100 and its kind, and for H100 and H200; newer GPUs compile the PTX when they load it.
const ARCHITECTURES: [&str; 2] =
    ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"];

/// Where a CUDA toolkit may be said to be.
const HOMES: [&str; 3] = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];

/// Widths of a head that candle-flash-attn computes without padding and adfreeze hands to it, and the variable that asks for
/// fewer of them.
const ALL_WIDTHS: [&str; 4] = ["32", "64", "96", "128"];
const WIDTHS: &str = "ADFREEZE_FLASH_HEAD_DIMS";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        say_version("");
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=kernels");
    for name in HOMES.iter().chain(&["NVCC", "PATH"]) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match cuda().and_then(|()| flash_widths()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn cuda() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let nvcc = nvcc()?;
    let small = knows_compression(&nvcc);
    let (major, minor) = release(&nvcc)?;
    write(&out.join("version.rs"), &format!("({major}, {minor})"))?;
    say_version(&format!(" (CUDA {major}.{minor})"));
    link_runtime(&nvcc);
    let files = kernels(&root.join("kernels"))?;
    // Two at a time: more would take the cores from the rest of the build.
    for pair in files.chunks(2) {
        thread::scope(|s| {
            let jobs: Vec<_> = pair.iter().map(|file| s.spawn(|| compile(&nvcc, file, &out, small))).collect();
            jobs.into_iter().try_for_each(|j| j.join().map_err(|_| "nvcc's thread stopped".to_string())?)
        })?;
    }
    let mut table = String::from("&[\n");
    for file in &files {
        let code = fatbin(file, &out);
        table += &format!("    ({:?}, include_bytes!({:?})),\n", stem(file), code.display().to_string());
    }
    table += "]\n";
    write(&out.join("modules.rs"), &table)
}

/// The widths of a head that `tools/nvcc_partly.sh` lets candle-flash-attn's kernels have, for `ops::attention`.
fn flash_widths() -> Result<(), String> {
    if env::var_os("CARGO_FEATURE_FLASH_ATTN").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-env-changed={WIDTHS}");
    // Its own build keeps machine code for one GPU, and its launches do not see that another one cannot run it.
    let nvcc = env::var_os("NVCC").map(PathBuf::from).unwrap_or_default();
    if stem(&nvcc) != "nvcc_partly" {
        return Err(format!(
            "the feature `flash-attn` is built by tools/nvcc_partly.sh, but NVCC is {:?}\n\nhint: set NVCC to that script's full path, and CUDA_HOME to the toolkit's folder",
            nvcc.display().to_string()
        ));
    }
    let asked = env::var(WIDTHS).unwrap_or_else(|_| ALL_WIDTHS.join(" "));
    let widths: Vec<&str> = asked.split_whitespace().collect();
    match widths.iter().find(|w| !ALL_WIDTHS.contains(w)) {
        Some(other) => Err(format!("{WIDTHS}: {other} is not among {}", ALL_WIDTHS.join(" "))),
        None => {
            write(&PathBuf::from(variable("OUT_DIR")?).join("flash_widths.rs"), &format!("&[{}]", widths.join(", ")))
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// What `--version` says: the package's, and what else there is to know.
fn say_version(more: &str) {
    println!("cargo::rustc-env=ADFREEZE_VERSION={}{more}", env!("CARGO_PKG_VERSION"));
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("{name}: {e}"))
}

/// The compiler: $NVCC, a toolkit's, or the one in PATH.
fn nvcc() -> Result<PathBuf, String> {
    let mut tried = Vec::new();
    let homes = HOMES.iter().filter_map(env::var_os).map(|h| PathBuf::from(h).join("bin/nvcc"));
    let usual = ["/usr/local/cuda/bin/nvcc", "nvcc"].map(PathBuf::from);
    for path in env::var_os("NVCC").map(PathBuf::from).into_iter().chain(homes).chain(usual) {
        if Command::new(&path).arg("--version").output().is_ok_and(|o| o.status.success()) {
            return Ok(path);
        }
        tried.push(path.display().to_string());
    }
    Err(format!(
        "no CUDA compiler: tried {}\n\nhint: install a CUDA toolkit (12 or 13) and set CUDA_HOME to its folder, or build without `--features cuda`",
        tried.join(", ")
    ))
}

/// The toolkit's version, from a line such as `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(nvcc: &Path) -> Result<(u32, u32), String> {
    let output = Command::new(nvcc).arg("--version").output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("release ").nth(1).and_then(|rest| rest.split(',').next()?.split_once('.'));
    let number = |s: &str| s.trim().parse().ok();
    version
        .and_then(|(major, minor)| Some((number(major)?, number(minor)?)))
        .ok_or_else(|| format!("{} --version names no release:\n{text}", nvcc.display()))
}

/// The runtime that candle's kernels call is linked in its static form, which every toolkit has: ahead of the shared one that
/// candle asks for, which then is not needed where the binary starts.
fn link_runtime(nvcc: &Path) {
    let homes = HOMES.iter().filter_map(env::var_os).map(PathBuf::from);
    let beside = nvcc.canonicalize().ok().and_then(|p| Some(p.parent()?.parent()?.to_path_buf()));
    let folders = homes.chain(beside).chain([PathBuf::from("/usr/local/cuda")]);
    let mut libraries = folders.flat_map(|h| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|l| h.join(l)));
    match libraries.find(|l| l.join("libcudart_static.a").is_file()) {
        Some(folder) => {
            println!("cargo::rustc-link-search=native={}", folder.display());
            println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=cudart_static");
        }
        None => println!(
            "cargo::warning=no libcudart_static.a beside {} or in CUDA_HOME: the binary will need the shared library to start",
            nvcc.display()
        ),
    }
}

/// nvcc 12.8 and later pack machine code tighter on request.
fn knows_compression(nvcc: &Path) -> bool {
    let help = Command::new(nvcc).arg("--help").output();
    help.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("--compress-mode"))
}

fn kernels(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| format!("{}: {e}", dir.display()))?.path();
        if path.extension().is_some_and(|e| e == "cu") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn fatbin(file: &Path, out: &Path) -> PathBuf {
    out.join(stem(file)).with_extension("fatbin")
}

fn compile(nvcc: &Path, file: &Path, out: &Path, small: bool) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--fatbin"]).args(ARCHITECTURES);
    if small {
        command.arg("--compress-mode=size");
    }
    command.arg("-o").arg(fatbin(file, out)).arg(file);
    let told = |o: &Output| format!("{}{}", String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
    match command.output() {
        Ok(o) if o.status.success() => Ok(()),
        Ok(o) => Err(format!("nvcc could not compile {}:\n{}", file.display(), told(&o))),
        Err(e) => Err(format!("{}: {e}", nvcc.display())),
    }
}
