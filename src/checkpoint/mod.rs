//! What a run leaves on disk: atomic files and their checksums, safetensors, PEFT adapters, Hugging Face folders.

pub mod atomic;
pub mod hf;
pub mod peft;
pub mod safetensors;
pub mod sums;
