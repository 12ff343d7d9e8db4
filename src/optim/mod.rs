//! The optimizer: which parameter belongs to which group ([`groups`]), how the learning rate runs ([`schedule`]),
//! the global norm and its clipping ([`clip`]), and the update itself ([`adamw`]).

pub mod adamw;
pub mod clip;
pub mod groups;
mod inplace;
pub mod schedule;

pub use adamw::{AdamW, GroupReport, StepReport};
pub use groups::Groups;
pub use schedule::Schedule;
