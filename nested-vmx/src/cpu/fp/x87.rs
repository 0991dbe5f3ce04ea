//! x87 arithmetic: the host's unit gets the guest's whole x87 state, runs one instruction, and gives the state back.
//!
//! It runs with the guest's own masks. Unmasked exceptions thus leave exactly what the processor leaves (unchanged or
//! rescaled results, stores that do not happen); the host's own #MF would come only with the next waiting
//! instruction, and FNSAVE, which does not wait, resets the unit before that.

use super::state::{FpState, status};
use crate::cpu::access::Use;
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::flags::{ARITHMETIC, CF, PF, ZF};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow, Stop};
use iced_x86::{Mnemonic as M, OpKind, Register};

/// What FRSTOR and FNSAVE exchange with the host: the 32-bit protected-mode format, 108 bytes.
#[repr(C, align(16))]
struct Image([u8; 112]);

const STATUS_AT: usize = 4;
const TAGS_AT: usize = 8;
const ST_AT: usize = 28;

impl Image {
    /// Without the exception flags, so that those that come back are the instruction's own and nothing is pending.
    fn of(fp: &FpState) -> Self {
        let mut image = Self([0; 112]);
        let tags = (0..8).fold(0u16, |t, n| t | if fp.full >> n & 1 == 0 { 3 << (2 * n) } else { 0 });
        let old = fp.status & !(status::FLAGS | status::SUMMARY);
        image.0[..2].copy_from_slice(&fp.control.to_le_bytes());
        image.0[STATUS_AT..STATUS_AT + 2].copy_from_slice(&old.to_le_bytes());
        image.0[TAGS_AT..TAGS_AT + 2].copy_from_slice(&tags.to_le_bytes());
        for n in 0..8 {
            let at = ST_AT + 10 * n;
            image.0[at..at + 10].copy_from_slice(&fp.st(n).to_le_bytes()[..10]);
        }
        image
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// The flags that the instruction raised.
    fn flags(&self) -> u16 {
        self.word(STATUS_AT) & status::FLAGS
    }
}

/// Runs an instruction on the host. `m` is a pointer to its memory operand.
macro_rules! on_host {
    ($image:ident, [$($instruction:expr),+] $(, $name:ident = $operand:expr)*) => {
        // SAFETY: FNSAVE leaves the x87 unit as FNINIT does, which is how compiled code expects it; memory operands are
        // buffers of 16 bytes. No instruction between FRSTOR and FNSAVE waits after one that may raise an exception.
        unsafe {
            std::arch::asm!("frstor [{image}]", $($instruction,)+ "fnsave [{image}]",
                image = in(reg) &mut $image, $($name = in(reg) $operand,)*
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
        }
    };
}

impl Cpu {
    /// Takes the state after an instruction; FIP, FDP and (as Intel's processors do, for unmasked exceptions only) FOP.
    fn x87_done(&mut self, op: &Op, image: &Image, memory: bool) {
        let rip = self.regs.rip().wrapping_add(op.start()) & self.mode.rip_mask;
        let data = memory.then(|| self.effective_address(op));
        let fp = &mut self.fp;
        let flags = fp.status & status::FLAGS;
        fp.status = image.word(STATUS_AT) & !status::SUMMARY | flags;
        fp.set_tags(image.word(TAGS_AT));
        for n in 0..8 {
            let mut bytes = [0; 16];
            bytes[..10].copy_from_slice(&image.0[ST_AT + 10 * n..ST_AT + 10 * n + 10]);
            fp.set_st(n, u128::from_le_bytes(bytes));
        }
        fp.summarize();
        fp.instruction = rip;
        if let Some(ea) = data {
            fp.data = ea;
        }
        if fp.pending() {
            fp.opcode = op.imm as u16;
        }
    }

    /// Exchanges ST(1) with ST(i) around `f`, so that every ST(i) is ST(1) or ST(0) to the host.
    fn as_st1(&mut self, op: &Op, f: impl FnOnce(&mut Self)) {
        let top = self.fp.top();
        let [a, b] = [(top + 1) & 7, (top + usize::from(op.src)) & 7];
        let exchange = |fp: &mut FpState| {
            if op.src > 1 {
                fp.r.swap(a, b);
                let differ = (fp.full >> a ^ fp.full >> b) & 1;
                fp.full ^= differ << a | differ << b;
            }
        };
        exchange(&mut self.fp);
        f(self);
        exchange(&mut self.fp);
    }

    /// The memory operand of an arithmetic instruction or load.
    fn x87_operand(&mut self, op: &Op, len: usize) -> Result<[u8; 16], Stop> {
        let mut bytes = [0; 16];
        match len {
            2 => bytes[..2].copy_from_slice(&self.load_operand::<u16>(op)?.to_le_bytes()),
            4 => bytes[..4].copy_from_slice(&self.load_operand::<u32>(op)?.to_le_bytes()),
            8 => bytes[..8].copy_from_slice(&self.load_operand::<u64>(op)?.to_le_bytes()),
            _ => {
                let lin = self.linear(op, len as u64, Use::Read)?;
                self.load_bytes(op, lin, &mut bytes[..len])?;
            }
        }
        Ok(bytes)
    }

    /// Stores what the host stored. An unmasked exception other than inexactness kept it from storing.
    fn x87_store(&mut self, op: &Op, image: &Image, bytes: &[u8]) -> Flow {
        const PRECISION: u16 = 1 << 5;
        if image.flags() & !self.fp.control & status::EXCEPTIONS & !PRECISION == 0 {
            let len = bytes.len() as u64;
            match bytes.len() {
                2 => self.store_operand(op, u16::from_le_bytes([bytes[0], bytes[1]]))?,
                4 => self.store_operand(op, u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))?,
                _ => {
                    let lin = self.linear(op, len, Use::Write)?;
                    self.probe(op, lin, len, Use::Write)?;
                    self.store_bytes(lin, bytes)?;
                }
            }
        }
        self.x87_done(op, image, true);
        Ok(())
    }
}

/// Without explicit operands.
macro_rules! plain {
    ($($mnemonic:ident $name:ident,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.x87_ready()?;
            let mut image = Image::of(&cpu.fp);
            on_host!(image, [stringify!($name)]);
            cpu.x87_done(op, &image, false);
            Ok(())
        })*
        fn plain(m: M) -> Selected {
            Some(match m {
                $(M::$mnemonic => $name,)*
                _ => return None,
            })
        }
    };
}

plain! {
    Fabs fabs, Fchs fchs, Fsqrt fsqrt, Frndint frndint, Fscale fscale, Fxtract fxtract, Fprem fprem, Fprem1 fprem1,
    F2xm1 f2xm1, Fyl2x fyl2x, Fyl2xp1 fyl2xp1, Fptan fptan, Fpatan fpatan, Fsin fsin, Fcos fcos, Fsincos fsincos,
    Fxam fxam, Ftst ftst, Fld1 fld1, Fldl2t fldl2t, Fldl2e fldl2e, Fldpi fldpi, Fldlg2 fldlg2, Fldln2 fldln2,
    Fldz fldz, Fnop fnop, Fincstp fincstp, Fdecstp fdecstp, Fcompp fcompp, Fucompp fucompp,
}

/// On ST(0) and ST(i): the texts for i = 0 and for another.
macro_rules! registers {
    ($($name:ident $same:literal $other:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.x87_ready()?;
            cpu.as_st1(op, |cpu| {
                let mut image = Image::of(&cpu.fp);
                if op.src == 0 {
                    on_host!(image, [$same]);
                } else {
                    on_host!(image, [$other]);
                }
                cpu.x87_done(op, &image, false);
            });
            Ok(())
        })*
    };
}

registers! {
    fadd "fadd st(0), st(0)" "fadd st(0), st(1)", fadd_i "fadd st(0), st(0)" "fadd st(1), st(0)",
    faddp "faddp st(0), st(0)" "faddp st(1), st(0)", fmul "fmul st(0), st(0)" "fmul st(0), st(1)",
    fmul_i "fmul st(0), st(0)" "fmul st(1), st(0)", fmulp "fmulp st(0), st(0)" "fmulp st(1), st(0)",
    fsub "fsub st(0), st(0)" "fsub st(0), st(1)", fsub_i "fsub st(0), st(0)" "fsub st(1), st(0)",
    fsubp "fsubp st(0), st(0)" "fsubp st(1), st(0)", fsubr "fsubr st(0), st(0)" "fsubr st(0), st(1)",
    fsubr_i "fsubr st(0), st(0)" "fsubr st(1), st(0)", fsubrp "fsubrp st(0), st(0)" "fsubrp st(1), st(0)",
    fdiv "fdiv st(0), st(0)" "fdiv st(0), st(1)", fdiv_i "fdiv st(0), st(0)" "fdiv st(1), st(0)",
    fdivp "fdivp st(0), st(0)" "fdivp st(1), st(0)", fdivr "fdivr st(0), st(0)" "fdivr st(0), st(1)",
    fdivr_i "fdivr st(0), st(0)" "fdivr st(1), st(0)", fdivrp "fdivrp st(0), st(0)" "fdivrp st(1), st(0)",
    fcom "fcom st(0)" "fcom st(1)", fcomp "fcomp st(0)" "fcomp st(1)", fucom "fucom st(0)" "fucom st(1)",
    fucomp "fucomp st(0)" "fucomp st(1)", fxch "fxch st(0)" "fxch st(1)", fst "fst st(0)" "fst st(1)",
    fstp "fstp st(0)" "fstp st(1)",
    // An alias of FSTP, D9 D8+i, that ignores empty registers; assemblers do not know it.
    fstpnce ".byte 0xd9, 0xd8" ".byte 0xd9, 0xd9",
}

/// FLD ST(i) pushes: the register that it fills may be the one that it reads, so each has its own text.
fn fld_i(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let mut image = Image::of(&cpu.fp);
    match op.src {
        0 => on_host!(image, ["fld st(0)"]),
        1 => on_host!(image, ["fld st(1)"]),
        2 => on_host!(image, ["fld st(2)"]),
        3 => on_host!(image, ["fld st(3)"]),
        4 => on_host!(image, ["fld st(4)"]),
        5 => on_host!(image, ["fld st(5)"]),
        6 => on_host!(image, ["fld st(6)"]),
        _ => on_host!(image, ["fld st(7)"]),
    }
    cpu.x87_done(op, &image, false);
    Ok(())
}

/// FCMOVcc: the host's ZF is the condition. `FLAGS` are the guest's, `SET` says whether one of them or none makes it move.
fn fcmov<const FLAGS: u64, const SET: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.x87_ready()?;
    let moves = (cpu.flags.status() & FLAGS != 0) == SET;
    let test = u64::from(moves);
    cpu.as_st1(op, |cpu| {
        let mut image = Image::of(&cpu.fp);
        if op.src == 0 {
            on_host!(image, ["test {t}, {t}", "fcmovne st(0), st(0)"], t = test);
        } else {
            on_host!(image, ["test {t}, {t}", "fcmovne st(0), st(1)"], t = test);
        }
        cpu.x87_done(op, &image, false);
    });
    Ok(())
}

/// FCOMI and the like. Flags stay when an unmasked exception keeps the instruction from completing.
macro_rules! compare_flags {
    ($($name:ident $same:literal $other:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.x87_ready()?;
            let mut flags = cpu.flags.status();
            cpu.as_st1(op, |cpu| {
                let mut image = Image::of(&cpu.fp);
                let f = &mut flags;
                if op.src == 0 {
                    on_host!(image, ["push qword ptr [{f}]", "popfq", $same, "pushfq", "pop qword ptr [{f}]"], f = f);
                } else {
                    on_host!(image, ["push qword ptr [{f}]", "popfq", $other, "pushfq", "pop qword ptr [{f}]"], f = f);
                }
                cpu.x87_done(op, &image, false);
            });
            cpu.flags.set_status(flags & ARITHMETIC);
            Ok(())
        })*
    };
}

compare_flags! {
    fcomi "fcomi st(0), st(0)" "fcomi st(0), st(1)", fcomip "fcompi st(0), st(0)" "fcompi st(0), st(1)",
    fucomi "fucomi st(0), st(0)" "fucomi st(0), st(1)", fucomip "fucompi st(0), st(0)" "fucompi st(0), st(1)",
}

/// With a memory operand that is read: mnemonic and length, name, text.
macro_rules! loads {
    ($($mnemonic:ident $len:literal $name:ident $text:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.x87_ready()?;
            let bytes = cpu.x87_operand(op, $len)?;
            let mut image = Image::of(&cpu.fp);
            on_host!(image, [concat!($text, " ptr [{m}]")], m = bytes.as_ptr());
            cpu.x87_done(op, &image, true);
            Ok(())
        })*
        fn load(m: M, len: usize) -> Selected {
            Some(match (m, len) {
                $((M::$mnemonic, $len) => $name,)*
                _ => return None,
            })
        }
    };
}

loads! {
    Fadd 4 fadd_s "fadd dword", Fadd 8 fadd_d "fadd qword", Fmul 4 fmul_s "fmul dword", Fmul 8 fmul_d "fmul qword",
    Fsub 4 fsub_s "fsub dword", Fsub 8 fsub_d "fsub qword", Fsubr 4 fsubr_s "fsubr dword", Fsubr 8 fsubr_d "fsubr qword",
    Fdiv 4 fdiv_s "fdiv dword", Fdiv 8 fdiv_d "fdiv qword", Fdivr 4 fdivr_s "fdivr dword", Fdivr 8 fdivr_d "fdivr qword",
    Fcom 4 fcom_s "fcom dword", Fcom 8 fcom_d "fcom qword", Fcomp 4 fcomp_s "fcomp dword", Fcomp 8 fcomp_d "fcomp qword",
    Fiadd 2 fiadd_w "fiadd word", Fiadd 4 fiadd_d "fiadd dword", Fimul 2 fimul_w "fimul word",
    Fimul 4 fimul_d "fimul dword", Fisub 2 fisub_w "fisub word", Fisub 4 fisub_d "fisub dword",
    Fisubr 2 fisubr_w "fisubr word", Fisubr 4 fisubr_d "fisubr dword", Fidiv 2 fidiv_w "fidiv word",
    Fidiv 4 fidiv_d "fidiv dword", Fidivr 2 fidivr_w "fidivr word", Fidivr 4 fidivr_d "fidivr dword",
    Ficom 2 ficom_w "ficom word", Ficom 4 ficom_d "ficom dword", Ficomp 2 ficomp_w "ficomp word",
    Ficomp 4 ficomp_d "ficomp dword", Fld 4 fld_s "fld dword", Fld 8 fld_d "fld qword", Fld 10 fld_t "fld tbyte",
    Fild 2 fild_w "fild word", Fild 4 fild_d "fild dword", Fild 8 fild_q "fild qword", Fbld 10 fbld "fbld tbyte",
}

/// With a memory operand that is written.
macro_rules! stores {
    ($($mnemonic:ident $len:literal $name:ident $text:literal,)*) => {
        $(fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.x87_ready()?;
            let mut bytes = [0u8; 16];
            let mut image = Image::of(&cpu.fp);
            on_host!(image, [concat!($text, " ptr [{m}]")], m = bytes.as_mut_ptr());
            cpu.x87_store(op, &image, &bytes[..$len])
        })*
        fn store(m: M, len: usize) -> Selected {
            Some(match (m, len) {
                $((M::$mnemonic, $len) => $name,)*
                _ => return None,
            })
        }
    };
}

stores! {
    Fst 4 fst_s "fst dword", Fst 8 fst_d "fst qword", Fstp 4 fstp_s "fstp dword", Fstp 8 fstp_d "fstp qword",
    Fstp 10 fstp_t "fstp tbyte", Fist 2 fist_w "fist word", Fist 4 fist_d "fist dword", Fistp 2 fistp_w "fistp word",
    Fistp 4 fistp_d "fistp dword", Fistp 8 fistp_q "fistp qword", Fisttp 2 fisttp_w "fisttp word",
    Fisttp 4 fisttp_d "fisttp dword", Fisttp 8 fisttp_q "fisttp qword", Fbstp 10 fbstp "fbstp tbyte",
}

/// The eleven bits of FOP: the escape opcode's low three and its ModR/M byte.
fn opcode(bytes: &[u8]) -> u64 {
    bytes.windows(2).find(|w| (0xd8..=0xdf).contains(&w[0])).map_or(0, |w| u64::from(w[0] & 7) << 8 | u64::from(w[1]))
}

pub(super) fn select(d: &mut Decoded) -> Selected {
    let m = d.i.mnemonic();
    let handler = match d.i.op_count() {
        0 => plain(m)?,
        _ if d.i.op0_kind() == OpKind::Memory => {
            let len = d.i.memory_size().size();
            load(m, len).or_else(|| store(m, len))?
        }
        n => registers(d, m, n)?,
    };
    d.op.imm = opcode(d.bytes);
    Some(handler)
}

fn registers(d: &mut Decoded, m: M, count: u32) -> Selected {
    let first = d.i.op0_register();
    if !first.is_st() {
        return None;
    }
    // ST(i) is the second operand, or the first where that is the destination. With ST(0) twice both are the same.
    let to_st0 = count == 2 && first == Register::ST0;
    let i = if to_st0 { d.i.op1_register() } else { first };
    d.op.src = i.number() as u8;
    Some(match m {
        M::Fadd => {
            if to_st0 {
                fadd
            } else {
                fadd_i
            }
        }
        M::Fmul => {
            if to_st0 {
                fmul
            } else {
                fmul_i
            }
        }
        M::Fsub => {
            if to_st0 {
                fsub
            } else {
                fsub_i
            }
        }
        M::Fsubr => {
            if to_st0 {
                fsubr
            } else {
                fsubr_i
            }
        }
        M::Fdiv => {
            if to_st0 {
                fdiv
            } else {
                fdiv_i
            }
        }
        M::Fdivr => {
            if to_st0 {
                fdivr
            } else {
                fdivr_i
            }
        }
        M::Faddp => faddp,
        M::Fmulp => fmulp,
        M::Fsubp => fsubp,
        M::Fsubrp => fsubrp,
        M::Fdivp => fdivp,
        M::Fdivrp => fdivrp,
        M::Fcom => fcom,
        M::Fcomp => fcomp,
        M::Fucom => fucom,
        M::Fucomp => fucomp,
        M::Fcomi => fcomi,
        M::Fcomip => fcomip,
        M::Fucomi => fucomi,
        M::Fucomip => fucomip,
        M::Fxch => fxch,
        M::Fst => fst,
        M::Fstp => fstp,
        M::Fstpnce => fstpnce,
        M::Fld => fld_i,
        M::Fcmovb => fcmov::<CF, true>,
        M::Fcmove => fcmov::<ZF, true>,
        M::Fcmovbe => fcmov::<{ CF | ZF }, true>,
        M::Fcmovu => fcmov::<PF, true>,
        M::Fcmovnb => fcmov::<CF, false>,
        M::Fcmovne => fcmov::<ZF, false>,
        M::Fcmovnbe => fcmov::<{ CF | ZF }, false>,
        M::Fcmovnu => fcmov::<PF, false>,
        _ => return None,
    })
}
