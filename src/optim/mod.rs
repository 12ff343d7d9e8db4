//! The optimizer: which parameter belongs to which group ([`groups`]), how the learning rate runs ([`schedule`]), and the
//! step with its state ([`adamw`]).

pub mod adamw;
pub mod groups;
pub mod schedule;

pub use adamw::{AdamW, GroupReport, StepReport};
pub use groups::Groups;
pub use schedule::Schedule;
