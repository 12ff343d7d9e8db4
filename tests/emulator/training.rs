//! The reference curve of the self-test's training, made again.

use super::emulator::{OnCpu, Order};
use super::told;
use adfreeze::model::init::Place;
use adfreeze::ops::launch::emulated;
use adfreeze::pipeline::selftest::training::{Measured, Reference, Training};
use candle_core::DType;
use std::rc::Rc;

const TYPES: [(DType, &str); 2] = [(DType::F32, "f32"), (DType::BF16, "bf16")];

fn train(dtype: DType) -> Training {
    Training::run(Place { dtype, ..Place::cpu() }).unwrap_or_else(|e| panic!("{}", told(dtype.as_str(), &e)))
}

fn on_kernels(dtype: DType) -> Training {
    emulated(Rc::new(OnCpu::new(Order::Forward)), || train(dtype))
}

/// Writes the file that the binary holds: the curve in f64, and how far from it f32 and bf16 are at most, on the reference
/// ops and on the kernels.
#[test]
#[ignore = "writes src/pipeline/selftest/curve.toml"]
fn the_curve_is_made_again() {
    let curve = train(DType::F64).curves().unwrap();
    let mut measured = Measured::new();
    for (how, train) in [("reference", train as fn(DType) -> Training), ("kernels", on_kernels)] {
        for (dtype, name) in TYPES {
            for (stage, found) in train(dtype).curves().unwrap() {
                for d in found.deviations(&curve[&stage]).unwrap() {
                    println!("{name:<5} {how:<9} {stage:<5} {:<13} {:.2e}  {}", d.kind, d.off, d.told);
                    let kinds = measured.entry(name.to_string()).or_default().entry(stage.clone()).or_default();
                    let worst = kinds.entry(d.kind.to_string()).or_insert(0.0);
                    *worst = d.off.max(*worst);
                }
            }
        }
    }
    let head = "# Written by `cargo test --release --test kernels -- --ignored the_curve_is_made_again`.\n";
    let text = toml::to_string(&Reference { curve, measured }).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/pipeline/selftest/curve.toml");
    std::fs::write(path, format!("{head}{text}")).unwrap();
}
