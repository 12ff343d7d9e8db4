//! What the user writes.
pub mod merge;
pub mod pattern;
pub mod schema;
pub mod vars;
