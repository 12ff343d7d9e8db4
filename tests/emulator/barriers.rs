//! The emulator finds a barrier that is missing in the project's own kernels.

use super::emulator::{OnCpu, Order, planted};
use super::run;
use adfreeze::ops::registry::all;
use candle_core::DType;
use std::path::Path;

const BLOCK: &str = "__syncthreads();";
const WARP: &str = "__syncwarp();";

/// What is wrong with the first bf16 case that fails, of ops whose names begin with one of `ops`.
fn first_fault(folder: &Path, ops: &[&str]) -> Option<String> {
    let cases = all().into_iter().filter(|c| ops.iter().any(|o| c.op.starts_with(o)));
    cases.filter_map(|c| run(&c, DType::BF16, folder).err()).next()
}

/// Once `attention_forward` had no barrier behind its last copies: where a block's queries see no key, a warp passed its results
/// through rows of Q into which other warps' copies had yet to come. Every order of whole rounds let it pass.
#[test]
fn a_missing_barrier_behind_asynchronous_copies_is_found() {
    let barrier = format!("{BLOCK}  // where these queries see no key, other warps' copies of Q come here");
    let old = planted("attention_forward.cu", &barrier, 0).expect("the barrier is there");
    let case = all().into_iter().find(|c| c.label == "a block of queries that sees nothing heads 2/1 of 64").unwrap();
    let e = run(&case, DType::BF16, &old).unwrap_err();
    assert!(e.contains("Skewed"), "{e}");
    run(&case, DType::BF16, &OnCpu::new(Order::Forward).folder).unwrap();
}

#[test]
#[ignore = "compiles the kernels once for each of their barriers, which takes minutes"]
fn every_missing_barrier_is_found() {
    let mut missed = Vec::new();
    for (file, barrier, ops) in [
        ("attention.cuh", BLOCK, &["attention"][..]),
        ("attention.cuh", WARP, &["attention"]),
        ("attention_forward.cu", BLOCK, &["attention"]),
        ("attention_backward.cu", BLOCK, &["attention"]),
        ("common.cuh", BLOCK, &["norm", "rms", "layer", "cross"]),
        ("cross_entropy.cu", BLOCK, &["cross_entropy"]),
        ("elementwise.cu", BLOCK, &[""]),
        ("norm.cu", BLOCK, &["norm", "rms", "layer"]),
        ("lora.cu", BLOCK, &["lora"]),
    ] {
        for nth in 0.. {
            let Some(folder) = planted(file, barrier, nth) else { break };
            let fault = first_fault(&folder, ops);
            println!("{file}, {barrier} {nth}: {}", fault.as_deref().unwrap_or("passes"));
            missed.extend(fault.is_none().then(|| format!("{file}, {barrier} {nth}")));
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
