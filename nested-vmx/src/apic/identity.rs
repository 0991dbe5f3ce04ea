//! Who takes a message (SDM 3, "Determining IPI Destination", "Logical Destination Mode in x2APIC Mode").

use crate::bus::Destination;

/// What decides which messages address this APIC; published when it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ApicIdentity {
    pub id: u32,
    /// Logical destination register.
    pub ldr: u32,
    /// Destination format register: true is the flat model (xAPIC only).
    pub flat: bool,
    pub x2apic: bool,
    /// IA32_APIC_BASE.EN: a globally disabled APIC takes no message at all (R22).
    pub enabled: bool,
    /// SVR bit 8: without it the APIC takes INIT, NMI, SMI and SIPI only, and never wins an arbitration.
    pub software_enabled: bool,
}

/// Who sent a message: it decides how wide a destination is, and whom a shorthand means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// I/O APIC, MSI or an injection by the API: 8-bit destinations.
    Outside,
    /// A local APIC; `receiver` when it is the one that is asked.
    Apic { x2apic: bool, receiver: bool },
}

const BROADCAST_8: u32 = 0xff;
const BROADCAST_32: u32 = 0xffff_ffff;

impl ApicIdentity {
    /// Whether a message to `destination` is for this APIC. Shorthands from outside mean everybody.
    pub fn accepts(&self, destination: &Destination, sender: Sender) -> bool {
        if !self.enabled {
            return false;
        }
        let (wide, is_sender) = match sender {
            Sender::Outside => (false, false),
            Sender::Apic { x2apic, receiver } => (x2apic, receiver),
        };
        let broadcast = |d: u32| d == if wide { BROADCAST_32 } else { BROADCAST_8 };
        match *destination {
            Destination::SelfOnly => is_sender,
            Destination::AllIncludingSelf => true,
            Destination::AllExcludingSelf => !is_sender,
            Destination::Physical(d) => broadcast(d) || d == if self.x2apic { self.id } else { self.id & 0xff },
            Destination::Logical(d) => broadcast(d) || self.matches_logical(d),
        }
    }

    fn matches_logical(&self, destination: u32) -> bool {
        if self.x2apic {
            return destination >> 16 == self.ldr >> 16 && destination & self.ldr & 0xffff != 0;
        }
        if destination > 0xff {
            return false;
        }
        let own = self.ldr >> 24;
        if self.flat { own & destination != 0 } else { own >> 4 == destination >> 4 && own & destination & 0xf != 0 }
    }
}

/// Chooses one of the APICs that a lowest-priority message addresses: the index of the winner. Which one wins is
/// left to the platform ("Lowest Priority Delivery Mode"); a function of the vector alone keeps an interrupt on
/// one processor, and replays.
pub fn arbitrate_lowest_priority<'a>(
    vector: u8,
    destination: &Destination,
    candidates: impl Iterator<Item = (usize, &'a ApicIdentity, Sender)> + Clone,
) -> Option<usize> {
    let addressed = candidates.filter(|(_, apic, sender)| apic.software_enabled && apic.accepts(destination, *sender));
    let count = addressed.clone().count();
    let winner = usize::from(vector).checked_rem(count)?;
    addressed.map(|(index, ..)| index).nth(winner)
}

/// The LDR of an x2APIC follows from its ID ("Deriving Logical x2APIC ID from the Local x2APIC ID").
pub(super) fn x2apic_ldr(id: u32) -> u32 {
    (id & 0x000f_fff0) << 12 | 1 << (id & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Destination::*;

    const OTHER: Sender = Sender::Apic { x2apic: false, receiver: false };
    const OTHER_X2: Sender = Sender::Apic { x2apic: true, receiver: false };

    fn xapic(id: u32, ldr: u32, flat: bool) -> ApicIdentity {
        ApicIdentity { id, ldr: ldr << 24, flat, x2apic: false, enabled: true, software_enabled: true }
    }

    fn x2apic(id: u32) -> ApicIdentity {
        ApicIdentity { id, ldr: x2apic_ldr(id), flat: false, x2apic: true, enabled: true, software_enabled: true }
    }

    #[test]
    fn destinations_match_as_the_sdm_says() {
        let table: &[(ApicIdentity, Destination, Sender, bool)] = &[
            (xapic(3, 0, true), Physical(3), OTHER, true),
            (xapic(3, 0, true), Physical(4), OTHER, false),
            (xapic(3, 0, true), Physical(0xff), OTHER, true),
            (xapic(3, 0, true), Physical(0xffff_ffff), OTHER_X2, true),
            (xapic(3, 0, true), Physical(0x103), OTHER_X2, false),
            (xapic(0, 0b0100, true), Logical(0b0110), OTHER, true),
            (xapic(0, 0b0100, true), Logical(0b0011), OTHER, false),
            (xapic(0, 0, true), Logical(0xff), OTHER, true),
            (xapic(0, 0x21, false), Logical(0x23), OTHER, true),
            (xapic(0, 0x21, false), Logical(0x22), OTHER, false),
            (xapic(0, 0x21, false), Logical(0x31), OTHER, false),
            (xapic(0, 0x21, false), Logical(0xff), Sender::Outside, true),
            (x2apic(0x123), Physical(0x123), OTHER_X2, true),
            (x2apic(0x123), Physical(0x23), OTHER_X2, false),
            (x2apic(0xff), Physical(0xff), OTHER_X2, true),
            (x2apic(1), Physical(0xff), OTHER_X2, false),
            (x2apic(1), Physical(0xff), Sender::Outside, true),
            (x2apic(1), Physical(0xffff_ffff), OTHER_X2, true),
            (x2apic(0x123), Logical(0x0012_0008), OTHER_X2, true),
            (x2apic(0x123), Logical(0x0012_0004), OTHER_X2, false),
            (x2apic(0x123), Logical(0x0013_0008), OTHER_X2, false),
            (x2apic(0x123), Logical(0xffff_ffff), OTHER_X2, true),
            (x2apic(2), Logical(4), Sender::Outside, true),
        ];
        for (apic, destination, sender, expected) in table {
            assert_eq!(apic.accepts(destination, *sender), *expected, "{destination:?} at {apic:?} from {sender:?}");
        }
    }

    #[test]
    fn shorthands_look_at_the_sender_only() {
        let a = xapic(0, 0, true);
        let me = Sender::Apic { x2apic: false, receiver: true };
        assert!(a.accepts(&SelfOnly, me) && !a.accepts(&SelfOnly, OTHER));
        assert!(a.accepts(&AllIncludingSelf, me) && a.accepts(&AllIncludingSelf, OTHER));
        assert!(!a.accepts(&AllExcludingSelf, me) && a.accepts(&AllExcludingSelf, OTHER));
    }

    #[test]
    fn r22_a_globally_disabled_apic_takes_nothing_and_a_software_disabled_one_is_still_addressed() {
        let disabled = ApicIdentity { enabled: false, ..xapic(0, 0, true) };
        let software = ApicIdentity { software_enabled: false, ..xapic(0, 0, true) };
        for d in [Physical(0), Physical(0xff), AllIncludingSelf, AllExcludingSelf] {
            assert!(!disabled.accepts(&d, OTHER));
            assert!(software.accepts(&d, OTHER));
        }
    }

    #[test]
    fn lowest_priority_picks_one_that_is_addressed_and_software_enabled() {
        let apics = [xapic(0, 1, true), xapic(1, 2, true), xapic(2, 4, true), xapic(3, 8, true)];
        let mut apics = apics.map(|a| (a, OTHER));
        apics[1].0.software_enabled = false;
        let pick =
            |vector, d| arbitrate_lowest_priority(vector, &d, apics.iter().enumerate().map(|(i, (a, s))| (i, a, *s)));
        assert_eq!(pick(0x20, Logical(0b0111)), Some(0));
        assert_eq!(pick(0x21, Logical(0b0111)), Some(2));
        assert_eq!(pick(0x20, Logical(0b0010)), None);
    }
}
