//! The model: shapes ([`config`]) and weights on disk ([`weights`]).

pub mod config;
pub mod weights;
