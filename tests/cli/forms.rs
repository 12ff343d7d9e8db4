//! Data files in other forms and encodings than ours.
