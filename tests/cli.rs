//! The commands, end to end: the binary itself on the golden model, as a user runs it.

mod cli {
    mod adapters;
    mod anyres;
    mod bad_input;
    mod bench;
    mod chat;
    mod check;
    mod compat;
    mod first_hour;
    mod folder;
    mod forms;
    mod hand_over;
    mod hostile;
    mod hub;
    mod language;
    mod learning;
    mod output;
    mod pictures;
    mod projectors;
    mod rates;
    mod recipes;
    mod resolution;
    mod resume;
    mod run_folder;
    mod signals;
    mod sources;
    mod stops;
    mod types;
}
