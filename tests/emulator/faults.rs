//! The emulator finds what it is there for: kernels with planted faults, each caught, and the right one not.

use super::emulator::{ORDERS, OnCpu, Order};
use adfreeze::ops::launch::{Emulator, Grid, HostArg};
use std::path::Path;

const ROWS: usize = 3;
const D: usize = 130;

/// The row sums that a kernel computes, or what the emulator has against it.
fn run(kernel: &str, order: Order) -> Result<Vec<f32>, String> {
    let on_cpu = OnCpu { order, folder: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator") };
    let mut x: Vec<f32> = (0..ROWS * D).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
    let mut y = [f32::NAN; ROWS];
    let memory = |v: &mut [f32], written| HostArg::Memory {
        at: v.as_mut_ptr().cast(),
        bytes: size_of_val(v),
        offset: 0,
        written,
    };
    let mut d = [0; 8];
    d[..4].copy_from_slice(&(D as i32).to_ne_bytes());
    let args = [memory(&mut x, false), memory(&mut y, true), HostArg::Scalar(d)];
    let grid = Grid { grid: [ROWS as u32, 1, 1], block: [128, 1, 1], shared: 0 };
    on_cpu.launch("faults", kernel, grid, &args).map_err(|e| e.to_string())?;
    Ok(y.to_vec())
}

fn expected() -> Vec<f32> {
    (0..ROWS).map(|r| (0..D).map(|i| (((r * D + i) * 37) % 101) as f32 - 50.0).sum()).collect()
}

#[test]
fn the_right_kernel_passes_in_every_order() {
    for order in ORDERS {
        assert_eq!(run("row_sum_none", order).unwrap(), expected(), "{order:?}");
    }
}

#[test]
fn every_planted_fault_is_caught() {
    for (kernel, says) in [
        ("row_sum_no_barrier", None),
        ("row_sum_lane_0_writes", None),
        ("row_sum_wrong_index", None),
        ("row_sum_gap", None),
        ("row_sum_writes_outside", Some("a write outside a tensor")),
        ("row_sum_writes_input", Some("a write to a tensor that is only read")),
        ("row_sum_shared_outside", Some("a write outside a shared array")),
        ("row_sum_unaligned", Some("not a multiple of 16")),
        ("row_sum_lost_threads", Some("others never reach")),
    ] {
        let results = ORDERS.map(|order| run(kernel, order));
        match says {
            Some(says) => {
                let told = results.iter().all(|r| r.as_ref().is_err_and(|e| e.contains(says)));
                assert!(told, "{kernel}: {results:?}");
            }
            // Wrong values in one order at least; NaN is not equal to anything.
            None => assert!(results.iter().any(|r| r != &Ok(expected())), "{kernel}: {results:?}"),
        }
    }
}
