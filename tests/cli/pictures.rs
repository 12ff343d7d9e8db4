//! What a picture's layout and metadata, and a processor's settings, do to pixels.
