//! The kernels of `kernels/`, compiled for the CPU and run one fiber a thread (`kernels/cuda_on_cpu/cuda.h`).
//!
//! Every tensor is copied between guards before a launch and back after it; a write outside, a write to an input, a
//! barrier that some threads miss and the like are errors.

use adfreeze::bail;
use adfreeze::error::{Error, Result};
use adfreeze::ops::launch::{Emulator, Grid, HostArg};
use libloading::{Library, Symbol};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_char, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// In which order threads that can run are picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Forward,
    Reverse,
    Shuffled(u32),
    /// Warps at speeds of their own, asynchronous copies that land sooner or later: `kernels/cuda_on_cpu/cuda.h`.
    Skewed(u32),
}

/// The orders in which every kernel must give the same bits.
pub const ORDERS: [Order; 6] =
    [Order::Forward, Order::Reverse, Order::Shuffled(1), Order::Skewed(1), Order::Skewed(2), Order::Skewed(3)];

/// Those, and with `ADFREEZE_SEEDS=n` n more that are skewed: a race may show in few of them.
pub fn orders() -> impl Iterator<Item = Order> {
    let more = std::env::var("ADFREEZE_SEEDS").map_or(0, |n| n.parse().expect("ADFREEZE_SEEDS is a number"));
    ORDERS.into_iter().chain((4..4 + more).map(Order::Skewed))
}

/// Kernels on the CPU, with threads in one order.
pub struct OnCpu {
    pub order: Order,
    /// Folder of the `.cu` files.
    pub folder: PathBuf,
}

impl OnCpu {
    /// The project's kernels.
    pub fn new(order: Order) -> Self {
        Self { order, folder: Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels") }
    }
}

/// The project's kernels with a fault in one file: the `nth` (from 0) `without` is missing. None if there are fewer.
pub fn planted(file: &str, without: &str, nth: usize) -> Option<PathBuf> {
    let kernels = OnCpu::new(Order::Forward).folder;
    let text = std::fs::read_to_string(kernels.join(file)).unwrap();
    let at = text.match_indices(without).nth(nth)?.0;
    let text = [&text[..at], &text[at + without.len()..]].concat();
    let mut hash = DefaultHasher::new();
    text.hash(&mut hash);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("planted-{:016x}", hash.finish()));
    std::fs::create_dir_all(&folder).unwrap();
    for path in std::fs::read_dir(&kernels).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(folder.join(file), text).unwrap();
    Some(folder)
}

static LAUNCHED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Every kernel that was launched so far.
pub fn launched() -> BTreeSet<String> {
    LAUNCHED.lock().unwrap().clone()
}

/// Every kernel of the `.cu` files in a folder but those of `others`, read off the compiled libraries.
pub fn kernels_of(folder: &Path, others: &[&str]) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut all = BTreeSet::new();
    let other = |p: &Path| others.iter().any(|o| p.file_stem().is_some_and(|s| s == *o));
    for source in files.filter(|p| p.extension().is_some_and(|e| e == "cu") && !other(p)) {
        library(&source).unwrap();
        let symbols = Command::new("nm").args(["-D", "--defined-only"]).arg(built(&source)).output().unwrap();
        assert!(symbols.status.success(), "nm (binutils) is needed");
        let text = String::from_utf8(symbols.stdout).unwrap();
        all.extend(text.split_whitespace().filter_map(|w| w.strip_prefix("emulate_")).map(String::from));
    }
    all
}

#[repr(C)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    order: u32,
    seed: u32,
}

type Entry = unsafe extern "C" fn(*const Launch, *mut *mut c_void) -> *const c_char;

impl Emulator for OnCpu {
    fn launch(&self, module: &str, kernel: &str, grid: Grid, args: &[HostArg]) -> Result<()> {
        let library = library(&self.folder.join(format!("{module}.cu")))?;
        let (order, seed) = match self.order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Shuffled(seed) => (2, seed),
            Order::Skewed(seed) => (3, seed),
        };
        LAUNCHED.lock().unwrap().insert(kernel.to_string());
        let launch = Launch { grid: grid.grid, block: grid.block, shared: grid.shared, order, seed };
        let mut arenas: Vec<Arena> = Vec::new();
        let mut values: Vec<[u8; 8]> = args.iter().map(|a| value(a, &mut arenas)).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| v.as_mut_ptr().cast()).collect();
        // SAFETY: the library was compiled from the kernels, whose entries have this type; its pointers reach the
        // arenas, which outlive the call.
        let message = unsafe {
            let entry: Symbol<Entry> = match library.get(format!("emulate_{kernel}").as_bytes()) {
                Ok(entry) => entry,
                Err(e) => bail!("{module}.cu has no kernel {kernel}: {e}"),
            };
            let message = entry(&launch, pointers.as_mut_ptr());
            (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
        };
        if let Some(message) = message {
            bail!("{kernel}: {message}")
        }
        arenas.iter().try_for_each(|a| a.put_back(kernel))
    }
}

/// Room around a tensor's copy; a kernel that reads there finds NaN.
const GUARD: usize = 256;

/// A tensor's bytes between guards.
struct Arena {
    bytes: Vec<u8>,
    begin: usize,
    len: usize,
    home: *mut u8,
    written: bool,
}

impl Arena {
    fn new(home: *mut u8, len: usize, offset: usize, written: bool) -> Self {
        let mut bytes = vec![0xFF; len + 4 * GUARD];
        // At the same distance from a multiple of GUARD as on a GPU, whose allocations begin at one.
        let begin = bytes.as_ptr().align_offset(GUARD) + GUARD + offset % GUARD;
        // SAFETY: `home` has `len` bytes.
        bytes[begin..begin + len].copy_from_slice(unsafe { std::slice::from_raw_parts(home, len) });
        Self { bytes, begin, len, home, written }
    }

    fn put_back(&self, kernel: &str) -> Result<()> {
        let (before, rest) = self.bytes.split_at(self.begin);
        let (data, after) = rest.split_at(self.len);
        if before.iter().chain(after).any(|b| *b != 0xFF) {
            bail!("{kernel}: a write outside a tensor of {} bytes", self.len)
        }
        // SAFETY: as in `new`.
        let home = unsafe { std::slice::from_raw_parts_mut(self.home, self.len) };
        if self.written {
            home.copy_from_slice(data);
        } else if home != data {
            bail!("{kernel}: a write to a tensor that is only read")
        }
        Ok(())
    }
}

/// An argument's bytes; memory goes to an arena, the same memory to the same one.
fn value(arg: &HostArg, arenas: &mut Vec<Arena>) -> [u8; 8] {
    match *arg {
        HostArg::Null => [0; 8],
        HostArg::Scalar(bytes) => bytes,
        HostArg::Memory { at, bytes, offset, written } => {
            let known = arenas.iter().position(|a| a.home == at && a.len == bytes);
            let i = known.unwrap_or_else(|| {
                arenas.push(Arena::new(at, bytes, offset, written));
                arenas.len() - 1
            });
            arenas[i].written |= written;
            let address = arenas[i].bytes.as_ptr() as usize + arenas[i].begin;
            address.to_ne_bytes()
        }
    }
}

/// Where the compiled form of a `.cu` file goes: named by everything that it is made of.
fn built(source: &Path) -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let shared = files(&kernels).chain(files(source.parent().unwrap()));
    let mut texts: Vec<PathBuf> = shared.filter(|p| p.extension().is_some_and(|e| e == "cuh")).collect();
    texts.sort();
    texts.extend([kernels.join(HEADER), source.to_path_buf()]);
    let mut hash = DefaultHasher::new();
    for text in &texts {
        std::fs::read(text).unwrap().hash(&mut hash);
    }
    let stem = source.file_stem().unwrap().to_string_lossy();
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{stem}-{:016x}.so", hash.finish()))
}

const HEADER: &str = "cuda_on_cpu/cuda.h";

/// The compiled form of a `.cu` file, made once and again when a source has changed.
fn library(source: &Path) -> Result<Arc<Library>> {
    static LIBRARIES: Mutex<BTreeMap<PathBuf, Arc<Library>>> = Mutex::new(BTreeMap::new());
    let mut libraries = LIBRARIES.lock().unwrap();
    if let Some(l) = libraries.get(source) {
        return Ok(l.clone());
    }
    let out = built(source);
    if !out.exists() {
        compile(source, &out)?;
    }
    // SAFETY: the library has no initialisers beyond those of its own state.
    let library = unsafe { Library::new(&out) }.map_err(|e| Error::new(format!("{}: {e}", out.display())))?;
    Ok(libraries.entry(source.to_path_buf()).or_insert(Arc::new(library)).clone())
}

fn compile(source: &Path, out: &Path) -> Result<()> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let fresh = out.with_extension(format!("{}.tmp", std::process::id()));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++", "-include"]);
    command.arg(kernels.join(HEADER)).arg("-I").arg(&kernels).arg(source).arg("-o").arg(&fresh);
    match command.output() {
        Ok(d) if d.status.success() => {
            std::fs::rename(&fresh, out).unwrap();
            Ok(())
        }
        Ok(d) => bail!("{compiler} refuses {}:\n{}", source.display(), String::from_utf8_lossy(&d.stderr)),
        Err(e) => bail!("{compiler} cannot be run: {e}"; "install a C++ compiler, or name one in CXX"),
    }
}
