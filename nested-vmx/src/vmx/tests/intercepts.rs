//! What L1 may intercept.
