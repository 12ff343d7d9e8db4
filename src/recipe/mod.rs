//! From the text that the user writes to a [`Recipe`](crate::spec::Recipe): `extends`, `[defaults]`, `--set` and `${VAR}` ([`load()`]),
//! errors that say where and what to write instead, and the rules that no type can state ([`validate()`]).

mod explain;
mod limits;
mod load;
mod merge;
mod validate;
mod vars;

pub use explain::{model_key, stage_key};
pub use load::{load, load_with, to_toml};
pub use validate::validate;
