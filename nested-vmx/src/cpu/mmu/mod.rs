//! From linear addresses to RAM: the TLB, the page walk, EPT, and the accesses that miss the TLB.

mod ept;
mod slow;
pub mod tlb;
mod walk;

/// What an access wants, in page-fault error code bits (SDM 3, "Page-Fault Exceptions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub write: bool,
    pub fetch: bool,
    pub access: tlb::Access,
}

impl Wanted {
    pub fn user(self) -> bool {
        matches!(self.access, tlb::Access::User | tlb::Access::UserAligned)
    }
}
