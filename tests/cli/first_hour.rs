//! What a newcomer meets: words, suggestions, and what to do next.
