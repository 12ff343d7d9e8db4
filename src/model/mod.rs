//! The model as a chain of segments with explicit backward, its parameters, and its weights on disk.
//!
//! candle's autograd keeps every activation, computes gradients of frozen weights and cannot sum in place; the trunk
//! therefore runs forward and backward by hand ([`segment`]), small trainable modules as islands ([`island`]).

pub mod backbone;
pub mod block;
pub mod build;
pub mod config;
pub mod container;
pub mod dora;
pub mod init;
pub mod insert;
pub mod island;
pub mod language;
pub mod layers;
pub mod linear;
pub mod norm;
pub mod params;
pub mod projector;
pub mod role;
pub mod segment;
pub mod vision;
pub mod visual;
pub mod vlm;
pub mod watch;
pub mod weights;
