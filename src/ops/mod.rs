//! (being built)

pub mod philox;
