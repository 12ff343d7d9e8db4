//! Schedules, pairs and figures that would silently be others than the user thinks.
