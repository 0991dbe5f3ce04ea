//! The CPU model `nestd-v1`: what CPUID says, and the VMX capabilities. Only what works is advertised.

use super::{Cpu, PHYSICAL_ADDRESS_BITS, TSC_HZ, fp};
use crate::apic::{CRYSTAL_HZ, TSC_TICKS_PER_CRYSTAL_TICK};
use crate::arch::LINEAR_ADDRESS_BITS;
use crate::arch::cr::Cr4;
use crate::vmx::caps::{Caps, Limits, OFFER};
use iced_x86::CpuidFeature;
use std::sync::LazyLock;

pub const NAME: &str = "nestd-v1";

/// CPUID.1:EAX, also EDX after RESET and INIT: family 6, model 0x5e, stepping 3.
pub const SIGNATURE: u32 = 0x0005_06e3;
const MAX_BASIC: u32 = 0x16;
const MAX_EXTENDED: u32 = 0x8000_0008;
const BRAND: &[u8; 48] = b"nestd-v1 emulated processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const fn bits(list: &[u32]) -> u32 {
    let (mut v, mut i) = (0, 0);
    while i < list.len() {
        v |= 1 << list[i];
        i += 1;
    }
    v
}

/// FPU DE PSE TSC MSR PAE CX8 SEP MTRR PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2; APIC follows IA32_APIC_BASE.
const LEAF_1_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 8, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
/// VMX CX16 PCID x2APIC MOVBE POPCNT TSC-deadline XSAVE RDRAND.
const LEAF_1_ECX: u32 = bits(&[5, 13, 17, 21, 22, 23, 24, XSAVE, 30]);
/// Vector features of CPUID.1:ECX that the host must have: they run on its units.
const HOST_FEATURES: [(CpuidFeature, u32); 6] = [
    (CpuidFeature::SSE3, 0),
    (CpuidFeature::PCLMULQDQ, 1),
    (CpuidFeature::SSSE3, 9),
    (CpuidFeature::SSE4_1, 19),
    (CpuidFeature::SSE4_2, 20),
    (CpuidFeature::AES, 25),
];
/// FSGSBASE TSC_ADJUST BMI1 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT CLWB; FCS and FDS are always 0.
const LEAF_7_EBX: u32 = bits(&[0, 1, 3, 7, 8, 9, 10, 13, 18, 19, 20, 23, 24]);
/// UMIP.
const LEAF_7_ECX: u32 = bits(&[2]);
/// SYSCALL NX 1-GiB pages RDTSCP LM.
const EXTENDED_1_EDX: u32 = bits(&[11, 20, 26, 27, 29]);
/// LAHF LZCNT PREFETCHW.
const EXTENDED_1_ECX: u32 = bits(&[0, 5, 8]);
const APIC_BIT: u32 = 1 << 9;
const HTT_BIT: u32 = 1 << 28;
const OSXSAVE_BIT: u32 = 1 << 27;
const XSAVE: u32 = 26;
/// CPUID.0xd.1:EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
const XSAVE_FORMS: u32 = 1 << 0 | 1 << 1 | 1 << 2;
const INVARIANT_TSC: u32 = 1 << 8;
/// The APIC timer runs in all states (ARAT).
const ARAT: u32 = 1 << 2;

/// CR4 bits that may be set, besides VMXE.
const CR4: Cr4 = Cr4::new()
    .with_tsd(true)
    .with_de(true)
    .with_pse(true)
    .with_pae(true)
    .with_pge(true)
    .with_osfxsr(true)
    .with_osxmmexcpt(true)
    .with_umip(true)
    .with_osxsave(true)
    .with_fsgsbase(true)
    .with_pcide(true)
    .with_smep(true)
    .with_smap(true);

/// The VMX capabilities of the model.
pub(crate) fn vmx_caps() -> &'static Caps {
    static CAPS: LazyLock<Caps> = LazyLock::new(|| {
        Caps::new(OFFER, Limits { physical_bits: PHYSICAL_ADDRESS_BITS as u8, cr4: CR4, debugctl: 0 })
    });
    &CAPS
}

impl Cpu {
    /// EAX, EBX, ECX, EDX of a leaf. Beyond the last one, as Intel's: the last basic leaf.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let leaf = match leaf {
            0..=MAX_BASIC | 0x8000_0000..=MAX_EXTENDED => leaf,
            _ => MAX_BASIC,
        };
        let count = self.config.count.max(1);
        let id = self.config.apic_id;
        match leaf {
            0 => [MAX_BASIC, word(b"Genu"), word(b"ntel"), word(b"ineI")],
            1 => {
                let ebx = id << 24 | count.min(255) << 16 | 8 << 8;
                let ecx = leaf_1_ecx() | if self.cr4.osxsave() { OSXSAVE_BIT } else { 0 };
                let apic = if self.apic.enabled() { APIC_BIT } else { 0 };
                [SIGNATURE, ebx, ecx, LEAF_1_EDX | apic | if count > 1 { HTT_BIT } else { 0 }]
            }
            6 => [ARAT, 0, 0, 0],
            7 if subleaf == 0 => [0, LEAF_7_EBX, LEAF_7_ECX, 0],
            // Extended topology: one thread per core, all cores in one package.
            0xb => {
                let shift = count.next_power_of_two().trailing_zeros();
                match subleaf {
                    0 => [0, 1, 1 << 8, id],
                    1 => [shift, count, 2 << 8 | 1, id],
                    n => [0, 0, n & 0xff, id],
                }
            }
            // The XSAVE area; it has the same size in both formats and whatever XCR0 enables.
            0xd => match subleaf {
                0 => [fp::XCR0_MASK as u32, fp::XSAVE_AREA_SIZE, fp::XSAVE_AREA_SIZE, 0],
                1 => [XSAVE_FORMS, fp::XSAVE_AREA_SIZE, 0, 0],
                _ => [0; 4],
            },
            // TSC = crystal * EBX / EAX.
            0x15 => [1, TSC_TICKS_PER_CRYSTAL_TICK as u32, CRYSTAL_HZ as u32, 0],
            0x16 => {
                let mhz = (TSC_HZ / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
            0x8000_0001 => [0, 0, EXTENDED_1_ECX, EXTENDED_1_EDX],
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| word(&[0, 1, 2, 3].map(|b| BRAND[at + 4 * i + b])))
            }
            0x8000_0007 => [0, 0, 0, INVARIANT_TSC],
            0x8000_0008 => [PHYSICAL_ADDRESS_BITS | LINEAR_ADDRESS_BITS << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// CR4 bits that exist.
    pub(crate) fn cr4_supported(&self) -> u64 {
        vmx_caps().cr4_fixed1()
    }
}

fn leaf_1_ecx() -> u32 {
    HOST_FEATURES.iter().filter(|(f, _)| fp::host_has(*f)).fold(LEAF_1_ECX, |ecx, (_, bit)| ecx | 1 << bit)
}

fn word(b: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*b)
}
