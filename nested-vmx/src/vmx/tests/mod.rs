//! The rules of semantics.md on the processor, and the mistakes others made. The bench is an L1 whose L2 shares its
//! page tables, descriptor tables and code.

mod bench;
mod boundaries;
mod fuzz;
mod icr;
mod instructions;
mod intercepts;
mod mistakes;
mod property;
mod rules;
mod rules_document;
mod saved_state;
mod transitions;
mod translations;
