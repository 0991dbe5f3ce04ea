//! What an ICR write sends (SDM 3, "Interrupt Command Register (ICR)").

use crate::arch::apic::{Icr, delivery};
use crate::bus::{Delivery, Destination, IpiMessage};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Message(IpiMessage),
    /// A vector below 16: it goes to the ESR.
    IllegalVector,
    /// A combination that the table "Valid Combinations for the Pentium 4 .. Local xAPIC ICR" excludes (R22).
    Nothing,
}

pub(super) fn decode(icr: Icr, x2apic: bool) -> Sent {
    let delivery = match icr.delivery() {
        delivery::FIXED => Delivery::Fixed,
        delivery::LOWEST_PRIORITY => Delivery::LowestPriority,
        delivery::SMI => Delivery::Smi,
        delivery::NMI => Delivery::Nmi,
        delivery::INIT if icr.level() && !icr.assert() => Delivery::InitDeassert,
        delivery::INIT => Delivery::Init,
        delivery::START_UP => Delivery::StartUp,
        _ => return Sent::Nothing,
    };
    let id = if x2apic { icr.destination() } else { icr.destination() >> 24 };
    let destination = match icr.shorthand() {
        1 => Destination::SelfOnly,
        2 => Destination::AllIncludingSelf,
        3 => Destination::AllExcludingSelf,
        _ if icr.logical() => Destination::Logical(id),
        _ => Destination::Physical(id),
    };
    let to_self = matches!(destination, Destination::SelfOnly | Destination::AllIncludingSelf);
    // The de-assert changes nothing at its receivers (R12), so it may name them in any way.
    if to_self && !matches!(delivery, Delivery::Fixed | Delivery::InitDeassert) {
        return Sent::Nothing;
    }
    if matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) && icr.vector() < 16 {
        return Sent::IllegalVector;
    }
    // The table's note: a level trigger mode is overridden, the interrupt is sent as edge-triggered.
    let level = matches!(delivery, Delivery::InitDeassert);
    Sent::Message(IpiMessage { delivery, vector: icr.vector(), destination, level, cause: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(delivery: Delivery, vector: u8, destination: Destination) -> Sent {
        let level = delivery == Delivery::InitDeassert;
        Sent::Message(IpiMessage { delivery, vector, destination, level, cause: 0 })
    }

    #[test]
    fn icr_values_send_what_the_sdm_says() {
        use Delivery::*;
        use Destination::*;
        let table: &[(u64, bool, Sent)] = &[
            (0x0300_0000_0000_4030, false, message(Fixed, 0x30, Physical(3))),
            (0x0300_0000_0000_4830, false, message(Fixed, 0x30, Logical(3))),
            (0x0001_0002_0000_4830, true, message(Fixed, 0x30, Logical(0x1_0002))),
            (0xffff_ffff_0000_4030, true, message(Fixed, 0x30, Physical(0xffff_ffff))),
            // Level is overridden to edge.
            (0x0300_0000_0000_c030, false, message(Fixed, 0x30, Physical(3))),
            (0x0300_0000_0000_4130, false, message(LowestPriority, 0x30, Physical(3))),
            (0x0300_0000_0000_4200, false, message(Smi, 0, Physical(3))),
            (0x0300_0000_0000_4402, false, message(Nmi, 2, Physical(3))),
            (0x0300_0000_0000_4500, false, message(Init, 0, Physical(3))),
            (0x0300_0000_0000_c500, false, message(Init, 0, Physical(3))),
            (0x0300_0000_0000_0500, false, message(Init, 0, Physical(3))),
            (0x0300_0000_0000_8500, false, message(InitDeassert, 0, Physical(3))),
            (0x0000_0000_0008_8500, false, message(InitDeassert, 0, AllIncludingSelf)),
            (0x0300_0000_0000_4608, false, message(StartUp, 8, Physical(3))),
            (0x0000_0000_000c_4608, false, message(StartUp, 8, AllExcludingSelf)),
            (0x0000_0000_0004_4030, false, message(Fixed, 0x30, SelfOnly)),
            (0x0000_0000_0008_4030, false, message(Fixed, 0x30, AllIncludingSelf)),
            (0x0300_0000_0000_400f, false, Sent::IllegalVector),
            (0x0300_0000_0000_410f, false, Sent::IllegalVector),
            (0x0300_0000_0000_4330, false, Sent::Nothing),
            (0x0300_0000_0000_4730, false, Sent::Nothing),
        ];
        for (icr, x2apic, expected) in table {
            assert_eq!(decode(Icr::from(*icr), *x2apic), *expected, "{icr:#x}");
        }
    }

    #[test]
    fn r22_init_and_sipi_to_self_or_all_including_self_are_invalid() {
        for shorthand in [0x4_0000, 0x8_0000u64] {
            for mode in [0x500, 0x600, 0x400, 0x200, 0x100] {
                assert_eq!(
                    decode(Icr::from(0x4030 | shorthand | mode), false),
                    Sent::Nothing,
                    "{shorthand:x} {mode:x}"
                );
            }
        }
    }
}
