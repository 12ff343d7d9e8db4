//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.
