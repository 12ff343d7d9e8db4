//! What the user writes: the structs ([`schema`]), how a file becomes one ([`load()`]: `extends`, `[defaults]`, `--set`,
//! `${VAR}`), the rules it must keep ([`validate()`]), and the patterns that select parameters ([`pattern`]).

mod explain;
mod limits;
mod load;
mod merge;
pub mod pattern;
pub mod schema;
mod validate;
mod vars;

pub use explain::{model_key, stage_key};
pub use load::{load, load_with, to_toml};
pub use validate::validate;
