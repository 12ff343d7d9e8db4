//! The emulator finds a barrier that is missing in the project's own kernels.

use super::emulator::{OnCpu, Order, planted};
use super::run;
use adfreeze::ops::registry::all;
use candle_core::DType;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const BLOCK: &str = "__syncthreads();";
const WARP: &str = "__syncwarp();";

/// What is wrong with the first bf16 case that fails, of ops whose names begin with one of `ops`.
fn first_fault(folder: &Path, ops: &[&str]) -> Option<String> {
    let cases = all().into_iter().filter(|c| ops.iter().any(|o| c.op.starts_with(o)));
    cases.filter_map(|c| run(&c, DType::BF16, folder).err()).next()
}

/// Where a block's queries see no key, or its keys no query, only the barrier behind the last copies stands between them and the
/// rows of shared memory through which warps pass their results. `attention_forward` once had none, and every order of whole
/// rounds let it pass.
#[test]
fn a_missing_barrier_behind_asynchronous_copies_is_found() {
    for (file, comment, label) in [
        (
            "attention_forward.cu",
            "where these queries see no key, other warps' copies of Q come here",
            "a block of queries that sees nothing heads 2/1 of 64",
        ),
        (
            "attention_backward.cu",
            "where no query sees these keys, the copies of K and V come here",
            "blocks of keys that no query sees heads 2/1 of 64",
        ),
    ] {
        let old = planted(file, &format!("{BLOCK}  // {comment}"), 0).expect("the barrier is there");
        let case = all().into_iter().find(|c| c.label == label).unwrap();
        let e = run(&case, DType::BF16, &old).unwrap_err();
        // The other one shows in rounds, too.
        assert!(file != "attention_forward.cu" || e.contains("Skewed"), "{e}");
        run(&case, DType::BF16, &OnCpu::new(Order::Forward).folder).unwrap();
    }
}

/// The barrier that the process that runs `without_one_barrier` takes out: file, text, which of them, ops, tab-separated.
const TAKEN_OUT: &str = "ADFREEZE_TAKEN_OUT";

#[test]
#[ignore = "a part of every_missing_barrier_is_found, which runs it in a process of its own"]
fn without_one_barrier() {
    let Ok(taken) = std::env::var(TAKEN_OUT) else { return };
    let [file, barrier, nth, ops] = taken.split('\t').collect::<Vec<_>>()[..] else { panic!("{taken}") };
    let folder = planted(file, barrier, nth.parse().unwrap()).expect("the barrier is there");
    let ops: Vec<&str> = ops.split(' ').collect();
    let fault = if file == "adamw.cu" { super::adamw::fault(&folder) } else { first_fault(&folder, &ops) };
    // Past the harness, which would keep the words for itself.
    std::fs::write(folder.join("fault.txt"), fault.as_deref().unwrap_or_default()).unwrap();
    assert!(fault.is_none(), "found");
}

/// What happens without a barrier, `None` if nothing does. Without it a kernel may read an address that is not yet there, or count
/// to a number that is not: the process that tries it crashes or goes on without end, and has found it.
fn without(file: &str, barrier: &str, nth: usize, ops: &str) -> Option<String> {
    let folder = planted(file, barrier, nth).expect("the barrier is there");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "barriers::without_one_barrier", "--ignored"])
        .env(TAKEN_OUT, [file, barrier, &nth.to_string(), ops].join("\t"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LONGEST {
            child.kill().unwrap();
            child.wait().unwrap();
            return Some(format!("still runs after {LONGEST:?}"));
        }
        sleep(Duration::from_millis(20));
    };
    match status.code() {
        Some(0) => None,
        Some(_) => Some(std::fs::read_to_string(folder.join("fault.txt")).unwrap_or_else(|_| status.to_string())),
        None => Some(status.to_string()),
    }
}

/// Ten times what a trial in which nothing is found takes on a slow machine.
const LONGEST: Duration = Duration::from_secs(1800);

#[test]
#[ignore = "compiles the kernels once for each of their barriers, which takes minutes"]
fn every_missing_barrier_is_found() {
    let mut trials = Vec::new();
    for (file, barrier, ops) in [
        ("attention.cuh", BLOCK, "attention"),
        ("attention.cuh", WARP, "attention"),
        ("attention_forward.cu", BLOCK, "attention"),
        ("attention_backward.cu", BLOCK, "attention"),
        ("common.cuh", BLOCK, "norm rms layer cross"),
        ("cross_entropy.cu", BLOCK, "cross_entropy"),
        ("elementwise.cu", BLOCK, ""),
        ("norm.cu", BLOCK, "norm rms layer"),
        ("lora.cu", BLOCK, "lora"),
        ("adamw.cu", BLOCK, ""),
    ] {
        let there = std::fs::read_to_string(OnCpu::new(Order::Forward).folder.join(file)).unwrap();
        trials.extend((0..there.matches(barrier).count()).map(|nth| (file, barrier, nth, ops)));
    }
    let (next, missed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((file, barrier, nth, ops)) = trials.get(next.fetch_add(1, Ordering::Relaxed)) {
            let fault = without(file, barrier, *nth, ops);
            println!("{file}, {barrier} {nth}: {}", fault.as_deref().unwrap_or("passes"));
            if fault.is_none() {
                missed.lock().unwrap().push(format!("{file}, {barrier} {nth}"));
            }
        }
    };
    std::thread::scope(|s| (0..2).for_each(|_| drop(s.spawn(work))));
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "{missed:?}");
}
