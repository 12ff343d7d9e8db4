//! What a run's folder holds: nobody else's files are touched, damage is noticed, changes are named.
