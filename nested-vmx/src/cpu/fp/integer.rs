//! `op register, register/memory` on integers and bits: what the host does, without MXCSR.

use super::vector::{on_mmx, on_vectors};
use crate::cpu::decode::{Decoded, Selected};
use crate::cpu::op::Op;
use crate::cpu::{Cpu, Flow};
use iced_x86::{Mnemonic, OpKind};

macro_rules! xmm {
    ($($mnemonic:ident $name:ident,)*) => {
        mod x {
            use super::*;
            $(pub fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
                cpu.sse_ready()?;
                let b = cpu.vector_source(op)?;
                let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
                *d = on_vectors!(stringify!($name), *d, b);
                Ok(())
            })*
        }

        pub(super) fn select_xmm(d: &mut Decoded) -> Selected {
            if d.i.op_count() != 2 || !d.i.op0_register().is_xmm() {
                return None;
            }
            if d.i.op1_kind() == OpKind::Immediate8 {
                return shift_xmm(d);
            }
            Some(match d.i.mnemonic() {
                $(Mnemonic::$mnemonic => x::$name,)*
                _ => return None,
            })
        }
    };
}

macro_rules! mmx {
    ($($mnemonic:ident $name:ident,)*) => {
        mod m {
            use super::*;
            $(pub fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
                cpu.mmx_ready()?;
                let b = cpu.other_source(op)? as u64;
                let v = on_mmx!(stringify!($name), cpu.fp.mm(op.dst), b);
                cpu.fp.set_mm(op.dst, v);
                Ok(())
            })*
        }

        pub(super) fn select_mmx(d: &mut Decoded) -> Selected {
            if d.i.op_count() != 2 || !d.i.op0_register().is_mm() {
                return None;
            }
            if d.i.op1_kind() == OpKind::Immediate8 {
                return shift_mmx(d);
            }
            Some(match d.i.mnemonic() {
                $(Mnemonic::$mnemonic => m::$name,)*
                _ => return None,
            })
        }
    };
}

/// Shifts by an immediate are the same as by a register that holds it.
macro_rules! shifts {
    ($($mnemonic:ident $name:ident,)*) => {
        mod xi {
            use super::*;
            $(pub fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
                cpu.sse_ready()?;
                let d = &mut cpu.fp.xmm[usize::from(op.dst & 15)];
                *d = on_vectors!(stringify!($name), *d, op.imm8().into());
                Ok(())
            })*
        }
        mod mi {
            use super::*;
            $(pub fn $name(cpu: &mut Cpu, op: &Op) -> Flow {
                cpu.mmx_ready()?;
                let v = on_mmx!(stringify!($name), cpu.fp.mm(op.dst), u64::from(op.imm8()));
                cpu.fp.set_mm(op.dst, v);
                Ok(())
            })*
        }

        fn shift_xmm(d: &mut Decoded) -> Selected {
            Some(match d.i.mnemonic() {
                $(Mnemonic::$mnemonic => xi::$name,)*
                _ => return None,
            })
        }

        fn shift_mmx(d: &mut Decoded) -> Selected {
            Some(match d.i.mnemonic() {
                $(Mnemonic::$mnemonic => mi::$name,)*
                _ => return None,
            })
        }
    };
}

/// The lists of instructions that both register files have, those of XMM registers only, and the shifts.
macro_rules! lists {
    (both { $($bm:ident $bn:ident,)* } only_xmm { $($xm:ident $xn:ident,)* } shifts { $($sm:ident $sn:ident,)* }) => {
        // The register forms of shifts are ordinary.
        xmm! { $($bm $bn,)* $($xm $xn,)* $($sm $sn,)* }
        mmx! { $($bm $bn,)* $($sm $sn,)* }
        shifts! { $($sm $sn,)* }
    };
}

lists! {
    both {
        Paddb paddb, Paddw paddw, Paddd paddd, Paddq paddq, Paddsb paddsb, Paddsw paddsw, Paddusb paddusb,
        Paddusw paddusw, Psubb psubb, Psubw psubw, Psubd psubd, Psubq psubq, Psubsb psubsb, Psubsw psubsw,
        Psubusb psubusb, Psubusw psubusw, Pmullw pmullw, Pmulhw pmulhw, Pmulhuw pmulhuw, Pmuludq pmuludq,
        Pmaddwd pmaddwd, Pavgb pavgb, Pavgw pavgw, Pminub pminub, Pminsw pminsw, Pmaxub pmaxub, Pmaxsw pmaxsw,
        Psadbw psadbw, Pand pand, Pandn pandn, Por por, Pxor pxor, Pcmpeqb pcmpeqb, Pcmpeqw pcmpeqw,
        Pcmpeqd pcmpeqd, Pcmpgtb pcmpgtb, Pcmpgtw pcmpgtw, Pcmpgtd pcmpgtd, Packsswb packsswb, Packssdw packssdw,
        Packuswb packuswb, Punpckhbw punpckhbw, Punpckhwd punpckhwd, Punpckhdq punpckhdq, Punpcklbw punpcklbw,
        Punpcklwd punpcklwd, Punpckldq punpckldq, Pshufb pshufb, Phaddw phaddw, Phaddd phaddd, Phaddsw phaddsw,
        Pmaddubsw pmaddubsw, Phsubw phsubw, Phsubd phsubd, Phsubsw phsubsw, Psignb psignb, Psignw psignw,
        Psignd psignd, Pmulhrsw pmulhrsw, Pabsb pabsb, Pabsw pabsw, Pabsd pabsd,
    }
    only_xmm {
        Punpckhqdq punpckhqdq, Punpcklqdq punpcklqdq, Andps andps, Andpd andpd, Andnps andnps, Andnpd andnpd,
        Orps orps, Orpd orpd, Xorps xorps, Xorpd xorpd, Unpcklps unpcklps, Unpcklpd unpcklpd, Unpckhps unpckhps,
        Unpckhpd unpckhpd, Movshdup movshdup, Movsldup movsldup, Packusdw packusdw, Pcmpeqq pcmpeqq,
        Pcmpgtq pcmpgtq, Pmaxsb pmaxsb, Pmaxsd pmaxsd, Pmaxud pmaxud, Pmaxuw pmaxuw, Pminsb pminsb, Pminsd pminsd,
        Pminud pminud, Pminuw pminuw, Pmuldq pmuldq, Pmulld pmulld, Phminposuw phminposuw, Pmovsxbw pmovsxbw,
        Pmovsxbd pmovsxbd, Pmovsxbq pmovsxbq, Pmovsxwd pmovsxwd, Pmovsxwq pmovsxwq, Pmovsxdq pmovsxdq,
        Pmovzxbw pmovzxbw, Pmovzxbd pmovzxbd, Pmovzxbq pmovzxbq, Pmovzxwd pmovzxwd, Pmovzxwq pmovzxwq,
        Pmovzxdq pmovzxdq, Aesenc aesenc, Aesenclast aesenclast, Aesdec aesdec, Aesdeclast aesdeclast, Aesimc aesimc,
        Rcpps rcpps, Rcpss rcpss, Rsqrtps rsqrtps, Rsqrtss rsqrtss,
    }
    shifts {
        Psllw psllw, Pslld pslld, Psllq psllq, Psrlw psrlw, Psrld psrld, Psrlq psrlq, Psraw psraw, Psrad psrad,
    }
}
