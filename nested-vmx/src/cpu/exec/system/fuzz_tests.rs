//! Random code on random tables: nothing that a guest does may panic or run for ever (no-guest-panic).

use crate::arch::cr::{Cr0, Cr4};
use crate::arch::segment::{AccessRights, system};
use crate::cpu::seg::{Segment, TableRegister, reg};
use crate::cpu::slot;
use crate::testing::{CODE, DATA, Rig};
use proptest::prelude::*;

/// Where the GDT, IDT and TSS of the random machine are; all of it is random bytes.
const TABLES: u64 = 0x30_0000;

/// Opcodes of system instructions, to come up more often than chance would have it.
const OPCODES: [&[u8]; 40] = [
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x06],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0xa1],
    &[0x17],
    &[0x1f],
    &[0x8e],
    &[0x8c],
    &[0x9a],
    &[0x9c],
    &[0x9d],
    &[0x66, 0x9d],
    &[0xc4],
    &[0xca],
    &[0xcb],
    &[0x48, 0xcb],
    &[0xcc],
    &[0xcd],
    &[0xcf],
    &[0x48, 0xcf],
    &[0xea],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0xff],
    &[0x66, 0x0f, 0x38, 0x82],
];

fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let tail = prop::collection::vec(any::<u8>(), 7);
    (0..OPCODES.len(), tail).prop_map(|(n, tail)| {
        let mut bytes = [OPCODES[n], &tail[..]].concat();
        bytes.truncate(8);
        bytes
    })
}

/// Selectors and small numbers, so that something is found now and then.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0..0x100u64, any::<u64>(), TABLES..TABLES + 0x2000, any::<u32>().prop_map(u64::from)]
}

/// Descriptors that have a chance of being valid.
fn descriptor() -> impl Strategy<Value = u64> {
    let flat =
        (any::<u8>(), 0..16u64).prop_map(|(access, flags)| 0xffff | u64::from(access) << 40 | 0xf << 48 | flags << 52);
    let gate = (any::<u8>(), 0..0x100u64, CODE..CODE + 0x100)
        .prop_map(|(access, selector, to)| to & 0xffff | selector << 16 | u64::from(access) << 40 | (to >> 16) << 48);
    prop_oneof![flat, gate, any::<u64>()]
}

fn machine(mode: u8) -> Rig {
    match mode {
        0 => Rig::real(),
        1 => Rig::protected(),
        2 => Rig::long(),
        _ => Rig::long_at(3),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]
    #[test]
    fn random_system_code_never_panics_and_keeps_to_its_budget(
        mode in 0..4u8,
        code in prop::collection::vec(instruction(), 32),
        tables in prop::collection::vec(descriptor(), 512),
        registers in prop::collection::vec(value(), 16),
        (cr0, cr4, flags, dr7) in any::<(u32, u32, u32, u32)>(),
        limit in any::<u16>(),
    ) {
        let mut rig = machine(mode);
        rig.ram.write(CODE, &code.concat()).unwrap();
        for (i, d) in tables.iter().enumerate() {
            rig.write_u64(TABLES + 8 * i as u64, *d);
        }
        for (n, v) in registers.iter().enumerate() {
            rig.set_r(n as u8, if n == usize::from(slot::RSP) { DATA + (v & 0xfff) } else { *v });
        }
        let c = &mut rig.cpu;
        let wide = Cr0::new().with_wp(true).with_am(true).with_ts(true).into_bits();
        c.cr0 = Cr0::from_bits(c.cr0.into_bits() ^ u64::from(cr0) & wide);
        let extra = Cr4::new().with_smep(true).with_smap(true).with_umip(true).with_de(true).with_fsgsbase(true);
        c.cr4 = Cr4::from_bits(c.cr4.into_bits() | u64::from(cr4) & extra.into_bits());
        c.flags.set_bits(u64::from(flags) & !crate::cpu::flags::VM);
        c.dr7 = u64::from(dr7) & 0xffff_23ff | 0x400;
        c.dr = [CODE + 8, DATA, TABLES, 0x60];
        c.gdtr = TableRegister { base: TABLES, limit };
        c.idtr = TableRegister { base: TABLES + 0x100, limit };
        let ar = AccessRights::new().with_kind(system::TSS_BUSY).with_p(true);
        c.seg[usize::from(reg::TR)] = Segment { selector: 0x28, base: TABLES + 0x800, limit: limit.into(), ar };
        c.mode_changed();
        for _ in 0..100 {
            let before = rig.cpu.retired();
            rig.run(7);
            prop_assert!(rig.cpu.retired() - before <= 7);
            rig.cpu.activity = crate::event::ActivityState::Active;
        }
    }
}
