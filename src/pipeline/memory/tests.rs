use super::*;

#[test]
fn a_step_that_cannot_fit_is_refused_with_its_bytes() {
    assert!(hopeless(8_000_000_000, 2_000_000_000).is_ok());
    let report = hopeless(9_000_000_000_000, 2_000_000_000).unwrap_err().report();
    assert!(
        report.contains("about 9.00 TB of memory, and 2.00 GB are free") && report.contains("batch.micro"),
        "{report}"
    );
}
