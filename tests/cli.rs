//! The commands, end to end: the binary itself on the golden model, as a user runs it.

mod cli {
    mod adapters;
    mod anyres;
    mod bad_input;
    mod bench;
    mod check;
    mod folder;
    mod hand_over;
    mod hub;
    mod learning;
    mod output;
    mod projectors;
    mod recipes;
    mod resolution;
    mod resume;
    mod signals;
    mod sources;
    mod types;
}
