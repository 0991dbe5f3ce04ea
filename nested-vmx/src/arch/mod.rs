//! Architectural definitions only: no behaviour.
