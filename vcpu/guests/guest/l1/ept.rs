//! L2's address space: its own memory from 0, and the local APIC's page. Nothing of L1.

use rt::apic::{Mode, XAPIC_PAGE_GPA};

use crate::memory::{L2_BASE_HPA, L2_SIZE, Page};

const READ_WRITE_EXECUTE: u64 = 7;
const READ_WRITE: u64 = 3;
const WRITE_BACK: u64 = 6 << 3;
const UNCACHEABLE: u64 = 0;
const LARGE: u64 = 1 << 7;

const PAGE_2M: u64 = 2 << 20;

static PML4: Page = Page::zero();
static PDPT: Page = Page::zero();
static MEMORY_PD: Page = Page::zero();
static APIC_PD: Page = Page::zero();
static APIC_PT: Page = Page::zero();

pub fn build(mode: Mode) {
    PML4.set(0, PDPT.hpa() | READ_WRITE_EXECUTE);
    PDPT.set(0, MEMORY_PD.hpa() | READ_WRITE_EXECUTE);
    for index in 0..L2_SIZE / PAGE_2M {
        MEMORY_PD.set(index as usize, (L2_BASE_HPA + index * PAGE_2M) | LARGE | WRITE_BACK | READ_WRITE_EXECUTE);
    }
    // L2 writes the ICR of the real local APIC: no APIC-access page, no exit. In x2APIC mode the page is closed.
    if mode == Mode::XApic {
        let index = |shift: u32| (XAPIC_PAGE_GPA >> shift & 511) as usize;
        PDPT.set(index(30), APIC_PD.hpa() | READ_WRITE_EXECUTE);
        APIC_PD.set(index(21), APIC_PT.hpa() | READ_WRITE_EXECUTE);
        APIC_PT.set(index(12), XAPIC_PAGE_GPA | UNCACHEABLE | READ_WRITE);
    }
}

/// 4 levels, tables in write-back memory.
pub fn pointer() -> u64 {
    PML4.hpa() | 3 << 3 | 6
}
