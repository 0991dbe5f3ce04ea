//! The one trait through which a processor reaches the rest of the world.
//!
//! Only slow paths call it: RAM is reached through [`crate::mem::Ram`], so a virtual call here costs
//! nothing that a device access does not cost anyway, and the processor is compiled once.

use crate::event::{Event, EventKind};

/// A message from one local APIC to others: what an ICR write, a SELF IPI or an I/O APIC sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IpiMessage {
    pub delivery: Delivery,
    pub vector: u8,
    pub destination: Destination,
    /// Level-triggered fixed interrupt (I/O APIC), or INIT with level de-assert semantics.
    pub level: bool,
    /// The id of what caused it (an ICR write, an injection); 0: none.
    pub cause: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Delivery {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    /// INIT level de-assert: ignored by the receiver (R12).
    InitDeassert,
    StartUp,
    ExtInt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Destination {
    /// Only the sender.
    SelfOnly,
    AllIncludingSelf,
    AllExcludingSelf,
    /// As written to the ICR: 8 bits in xAPIC mode, 32 in x2APIC mode.
    Physical(u32),
    Logical(u32),
}

/// What the machine asks of the processor after a port or MMIO write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusFlow {
    Continue,
    /// Leave [`crate::cpu::Cpu::run`] after this instruction (debug exit, reset, power off).
    Stop,
}

pub trait Bus: Send {
    /// How many instructions the processor has retired, told before it accesses a port or MMIO: devices that count
    /// time are read at the time of the access. A bus without time ignores it.
    fn stand_at(&mut self, retired: u64) {
        let _ = retired;
    }
    fn io_read(&mut self, port: u16, size: u8) -> u32;
    fn io_write(&mut self, port: u16, size: u8, value: u32) -> BusFlow;
    /// Reads from an address that is neither RAM nor this processor's APIC page. Nothing there reads all ones.
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64;
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) -> BusFlow;

    /// The INTA cycle: the vector of the external interrupt controller, if LINT0 or an ExtINT asked for one.
    fn acknowledge_extint(&mut self) -> Option<u8>;
    /// Delivers to the mailboxes of the processors that the message addresses, and wakes them.
    fn send_ipi(&mut self, message: IpiMessage);
    /// A level-triggered vector reached EOI: I/O APICs clear their remote IRR.
    fn eoi_broadcast(&mut self, vector: u8);
    /// The APIC ID, LDR, mode or enable of this processor changed: publish a new destination map.
    fn apic_changed(&mut self, identity: crate::apic::ApicIdentity);

    /// The VM's TSC without this processor's offset, when it has retired `retired` instructions.
    /// Also the VM's time: [`crate::cpu::TSC_HZ`] ticks a second.
    fn tsc(&mut self, retired: u64) -> u64;
    /// As [`Bus::tsc`], for an instruction that reads it: never less than any processor of the VM has read before. Guests
    /// take the TSCs for synchronized (SDM 3, "Invariant TSC").
    fn read_tsc(&mut self, retired: u64) -> u64 {
        self.tsc(retired)
    }
    /// How many instructions may run before `deadline_tsc` (same scale as [`Bus::tsc`]) has to be looked at
    /// again; 0 when it has passed.
    fn instructions_until(&mut self, retired: u64, deadline_tsc: u64) -> u64;

    /// A new id for something that causes events (an ICR write, an injection); never 0.
    fn new_cause(&mut self) -> u64;
    /// The whole id of which a mailbox carries the low bits ([`crate::mailbox::CAUSE_BITS`]).
    fn expand_cause(&mut self, low: u32) -> u64;
    /// Whether anybody wants events of this kind; frequent kinds are only built when someone does.
    fn wants(&self, kind: EventKind) -> bool;
    fn event(&mut self, event: Event);

    /// Runs `f` while no other processor of the VM executes an instruction (page-crossing LOCK,
    /// first decoding of a page that others may write).
    fn exclusive(&mut self, f: &mut dyn FnMut());
}
