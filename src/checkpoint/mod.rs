//! What a run leaves on disk: atomic files, safetensors, PEFT adapters, Hugging Face folders.

pub mod atomic;
pub mod hf;
pub mod peft;
pub mod safetensors;
