//! Random code in each mode and in L2, and VM entries with random fields: nothing panics or runs for ever
//! (no-guest-panic).

use super::bench::{BITMAP, Bench, GUEST_RIP, MSR_LIST};
use crate::arch::vmx::{PinControls, Proc2Controls, ProcControls};
use crate::cpu::seg::TableRegister;
use crate::cpu::slot;
use crate::event::ActivityState::{Active, Shutdown};
use crate::testing::{CODE, DATA, PML4, Rig};
use crate::vmx::vmcs12::Field;
use proptest::prelude::*;

/// Addresses that lead somewhere, and any.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        0..0x1_0000u64,
        CODE..DATA + 0x2_0000,
        0xfee0_0000u64..0xfee0_1000,
        (0..64u32).prop_map(|n| 1 << n),
        Just(u64::MAX),
    ]
}

fn run(rig: &mut Rig, registers: &[u64]) -> Result<(), TestCaseError> {
    for (n, v) in registers.iter().enumerate().filter(|(n, _)| *n != usize::from(slot::RSP)) {
        rig.set_r(n as u8, *v);
    }
    for _ in 0..4 {
        let before = rig.cpu.retired();
        rig.run(50);
        prop_assert!(rig.cpu.retired() - before <= 50);
        // Out of HLT and shutdown; a VMX abort is for good.
        if rig.cpu.activity() != Shutdown {
            rig.mailbox.post_nmi(1);
        }
        prop_assert_eq!(rig.cpu.save(), rig.cpu.save());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn random_bytes_as_code_never_panic_nor_run_for_ever(
        mode in 0..5u8,
        code in prop::collection::vec(any::<u8>(), 64),
        registers in prop::collection::vec(value(), 16),
    ) {
        let mut rig = match mode {
            0 => Rig::real(),
            1 => Rig::protected(),
            2 => Rig::long(),
            3 => Rig::long_at(3),
            _ => Bench::off().rig,
        };
        if mode == 4 {
            rig.cpu.regs.set_rip(CODE);
        }
        rig.ram.write(CODE, &code).unwrap();
        run(&mut rig, &registers)?;
    }

    #[test]
    fn random_bytes_as_code_of_l2_never_panic_nor_run_for_ever(
        code in prop::collection::vec(any::<u8>(), 64),
        registers in prop::collection::vec(value(), 16),
        (pin, proc, proc2, exceptions) in any::<(u32, u32, u32, u32)>(),
        timer in 0..100u64,
        bitmap in any::<u8>(),
    ) {
        let mut b = Bench::root();
        let caps = b.cpu().vmx.caps;
        // What is offered, but for the pages and pointers that would have to be set up.
        let pages = Proc2Controls::new().with_enable_ept(true).with_unrestricted_guest(true).with_mode_based_execute(true);
        b.pin(PinControls::from_bits(pin & caps.pin.may)).proc(ProcControls::from_bits(proc & caps.proc.may));
        b.proc2(Proc2Controls::from_bits(proc2 & caps.proc2.may & !pages.into_bits()));
        for field in [Field::IoBitmapAGpa, Field::IoBitmapBGpa, Field::MsrBitmapGpa] {
            b.set(field, BITMAP);
        }
        b.rig.ram.write(BITMAP, &[bitmap; 0x1000]).unwrap();
        b.set(Field::ExceptionBitmap, exceptions.into()).set(Field::PreemptionTimer, timer).set(Field::Vpid, 3);
        b.rig.ram.write(GUEST_RIP, &code).unwrap();
        b.launch();
        run(&mut b.rig, &registers)?;
    }

    #[test]
    fn vm_entries_with_random_fields_fail_or_run_but_never_panic(
        fields in prop::collection::vec((any::<prop::sample::Index>(), value(), any::<bool>()), 1..8),
        ept in any::<bool>(),
        registers in prop::collection::vec(value(), 16),
    ) {
        let mut b = Bench::root();
        if ept {
            b.proc2(Proc2Controls::new().with_enable_ept(true).with_unrestricted_guest(true));
            b.set(Field::Eptp, PML4 | 3 << 3 | 6);
        }
        b.set(Field::EntryMsrLoadGpa, MSR_LIST).set(Field::ExitMsrStoreGpa, MSR_LIST);
        for (index, value, flip) in fields {
            let field = *index.get(Field::ALL);
            let old = b.get(field);
            b.set(field, if flip { old ^ value } else { value });
        }
        b.launch();
        run(&mut b.rig, &registers)?;
    }
}

#[test]
fn an_idt_of_task_gates_to_a_task_that_faults_does_not_run_for_ever() {
    let mut rig = Rig::protected();
    let (gdt, idt) = (DATA, DATA + 0x1000);
    rig.write_u64(gdt + 8, 0x00cf_9b00_0000_ffff);
    rig.write_u64(gdt + 16, 0x00cf_9300_0000_ffff);
    rig.write_u64(gdt + 24, 0x0030_8900_2000_0067);
    for v in 0..32 {
        rig.write_u64(idt + 8 * v, 0x0000_8500_0018_0000);
    }
    rig.cpu.gdtr = TableRegister { base: gdt, limit: 0x1f };
    rig.cpu.idtr = TableRegister { base: idt, limit: 0xff };
    rig.code(|a| a.ud2());
    rig.run(100);
    assert!(rig.cpu.retired() <= 100 && matches!(rig.cpu.activity(), Active | Shutdown));
}
