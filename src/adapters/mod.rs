//! What is grafted onto a backbone. The backbone's own weights stay as they are.

pub mod lora;
