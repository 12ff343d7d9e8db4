//! The optimizer: which parameter belongs to which group ([`groups`]), how the learning rate runs over the steps
//! ([`schedule`]) and the layers ([`Groups::decay_layers`]), and the step with its state ([`adamw`]); [`verify`] holds its forms on other devices to the CPU's.

pub mod adamw;
pub mod groups;
pub mod schedule;
pub mod verify;

pub use adamw::{AdamW, GroupReport, StepReport};
pub use groups::Groups;
pub use schedule::Schedule;
