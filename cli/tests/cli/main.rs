//! nestctl as its users run it: the real binary.

mod binaries;
mod commands;
mod demo;
mod help;
mod rig;
mod run;
