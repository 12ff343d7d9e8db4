//! The binary: arguments → command → exit code.

use std::process::ExitCode;

/// Freed memory is kept: elementwise ops on fresh pages are bound by page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    adfreeze::cli::main()
}
