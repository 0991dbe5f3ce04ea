//! When instructions fault, and what the areas look like. Results are compared with the host's in
//! [`crate::cpu::differential`].

mod areas;
mod faults;

use crate::arch::cr::{Cr0, Cr4};
use crate::testing::{DATA, Rig};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;

/// 64-bit mode with everything enabled, RDI at [`DATA`].
fn rig() -> Rig {
    let mut rig = Rig::long();
    rig.cpu.cr0 = rig.cpu.cr0.with_mp(true);
    rig.cpu.cr4 = rig.cpu.cr4.with_osxsave(true);
    rig.cpu.xcr0 = 3;
    rig.cpu.fp.init_x87();
    rig.set_r(crate::cpu::slot::RDI, DATA);
    rig.cpu.mode_changed();
    rig
}

/// The vector that the first instruction of `f` raises, or None. State is that of the instruction's start.
fn raised(rig: &mut Rig, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Option<u8> {
    use crate::cpu::StopKind;
    let mut a = CodeAssembler::new(rig.bits()).unwrap();
    f(&mut a).unwrap();
    let bytes = a.assemble(crate::testing::CODE).unwrap();
    let op = rig.cpu.decode_for_test(&bytes)[0];
    let before = rig.cpu.save();
    let result = (op.handler)(&mut rig.cpu, &op);
    rig.cpu.stop_after = false;
    match result.map_err(|stop| stop.kind()) {
        Ok(()) => None,
        Err(StopKind::Exception { vector, .. }) => {
            let mut after = rig.cpu.save();
            // #XM is the one fault that leaves something: the flags in MXCSR.
            after.fp.mxcsr = before.fp.mxcsr;
            assert!(after == before, "the faulting instruction changed something");
            Some(vector)
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn with_cr0(rig: &mut Rig, f: impl FnOnce(Cr0) -> Cr0) {
    rig.cpu.cr0 = f(rig.cpu.cr0);
    rig.cpu.mode_changed();
}

fn with_cr4(rig: &mut Rig, f: impl FnOnce(Cr4) -> Cr4) {
    rig.cpu.cr4 = f(rig.cpu.cr4);
    rig.cpu.mode_changed();
}
