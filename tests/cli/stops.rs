//! Every end of a run: broken input at a step, signals, full disks; what was done is kept.
