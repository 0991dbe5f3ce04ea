//! Guest RAM: the one place that touches guest memory.
