//! Basic exit reasons (SDM 3, appendix "VMX Basic Exit Reasons") and VM-instruction errors.

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident: $($ident:ident = $number:literal, $text:literal;)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum $name {
            $(#[doc = $text] $ident = $number,)*
        }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$ident,)*];

            pub const fn number(self) -> u16 {
                self as u16
            }

            /// Short name for people.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$ident => $text,)*
                }
            }

            pub const fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$ident),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// Bits 15:0 of the exit reason.
    ExitReason:
    ExceptionOrNmi = 0, "exception or NMI";
    ExternalInterrupt = 1, "external interrupt";
    TripleFault = 2, "triple fault";
    InitSignal = 3, "INIT signal";
    Sipi = 4, "start-up IPI";
    IoSmi = 5, "I/O SMI";
    OtherSmi = 6, "other SMI";
    InterruptWindow = 7, "interrupt window";
    NmiWindow = 8, "NMI window";
    TaskSwitch = 9, "task switch";
    Cpuid = 10, "CPUID";
    Getsec = 11, "GETSEC";
    Hlt = 12, "HLT";
    Invd = 13, "INVD";
    Invlpg = 14, "INVLPG";
    Rdpmc = 15, "RDPMC";
    Rdtsc = 16, "RDTSC";
    Rsm = 17, "RSM";
    Vmcall = 18, "VMCALL";
    Vmclear = 19, "VMCLEAR";
    Vmlaunch = 20, "VMLAUNCH";
    Vmptrld = 21, "VMPTRLD";
    Vmptrst = 22, "VMPTRST";
    Vmread = 23, "VMREAD";
    Vmresume = 24, "VMRESUME";
    Vmwrite = 25, "VMWRITE";
    Vmxoff = 26, "VMXOFF";
    Vmxon = 27, "VMXON";
    CrAccess = 28, "control-register access";
    MovDr = 29, "MOV DR";
    Io = 30, "I/O instruction";
    Rdmsr = 31, "RDMSR";
    Wrmsr = 32, "WRMSR";
    EntryGuestState = 33, "VM-entry failure due to invalid guest state";
    EntryMsrLoading = 34, "VM-entry failure due to MSR loading";
    Mwait = 36, "MWAIT";
    MonitorTrapFlag = 37, "monitor trap flag";
    Monitor = 39, "MONITOR";
    Pause = 40, "PAUSE";
    EntryMachineCheck = 41, "VM-entry failure due to machine-check event";
    TprBelowThreshold = 43, "TPR below threshold";
    ApicAccess = 44, "APIC access";
    VirtualizedEoi = 45, "virtualized EOI";
    GdtrIdtr = 46, "access to GDTR or IDTR";
    LdtrTr = 47, "access to LDTR or TR";
    EptViolation = 48, "EPT violation";
    EptMisconfiguration = 49, "EPT misconfiguration";
    Invept = 50, "INVEPT";
    Rdtscp = 51, "RDTSCP";
    PreemptionTimer = 52, "VMX-preemption timer expired";
    Invvpid = 53, "INVVPID";
    Wbinvd = 54, "WBINVD or WBNOINVD";
    Xsetbv = 55, "XSETBV";
    ApicWrite = 56, "APIC write";
    Rdrand = 57, "RDRAND";
    Invpcid = 58, "INVPCID";
    Vmfunc = 59, "VMFUNC";
    Encls = 60, "ENCLS";
    Rdseed = 61, "RDSEED";
    PmlFull = 62, "page-modification log full";
    Xsaves = 63, "XSAVES";
    Xrstors = 64, "XRSTORS";
    Pconfig = 65, "PCONFIG";
    SppEvent = 66, "SPP-related event";
    Umwait = 67, "UMWAIT";
    Tpause = 68, "TPAUSE";
    Loadiwkey = 69, "LOADIWKEY";
    Enclv = 70, "ENCLV";
    EnqcmdPasid = 72, "ENQCMD PASID translation failure";
    EnqcmdsPasid = 73, "ENQCMDS PASID translation failure";
    BusLock = 74, "bus lock";
    InstructionTimeout = 75, "instruction timeout";
    Seamcall = 76, "SEAMCALL";
    Tdcall = 77, "TDCALL";
    RdmsrList = 78, "RDMSRLIST";
    WrmsrList = 79, "WRMSRLIST";
    Urdmsr = 80, "URDMSR";
    Uwrmsr = 81, "UWRMSR";
    RdmsrImmediate = 84, "RDMSR immediate";
    WrmsrImmediate = 85, "WRMSRNS immediate";
}

impl ExitReason {
    /// Exit-reason bit 31: the VM entry failed.
    pub const ENTRY_FAILURE: u32 = 1 << 31;
}

numbered! {
    /// VM-instruction error numbers (SDM 3, "VM Instruction Error Numbers").
    InstructionError:
    VmcallInRoot = 1, "VMCALL executed in VMX root operation";
    VmclearAddress = 2, "VMCLEAR with invalid physical address";
    VmclearVmxonPointer = 3, "VMCLEAR with VMXON pointer";
    VmlaunchNotClear = 4, "VMLAUNCH with non-clear VMCS";
    VmresumeNotLaunched = 5, "VMRESUME with non-launched VMCS";
    VmresumeAfterVmxoff = 6, "VMRESUME after VMXOFF";
    EntryControls = 7, "VM entry with invalid control fields";
    EntryHostState = 8, "VM entry with invalid host-state fields";
    VmptrldAddress = 9, "VMPTRLD with invalid physical address";
    VmptrldVmxonPointer = 10, "VMPTRLD with VMXON pointer";
    VmptrldRevision = 11, "VMPTRLD with incorrect VMCS revision identifier";
    UnsupportedField = 12, "VMREAD or VMWRITE of an unsupported VMCS component";
    ReadOnlyField = 13, "VMWRITE to a read-only VMCS component";
    VmxonInRoot = 15, "VMXON executed in VMX root operation";
    EntryExecutiveVmcs = 16, "VM entry with invalid executive-VMCS pointer";
    EntryExecutiveNotLaunched = 17, "VM entry with non-launched executive VMCS";
    EntryExecutiveNotVmxon = 18, "VM entry with executive-VMCS pointer not VMXON pointer";
    VmcallNotClear = 19, "VMCALL with non-clear VMCS";
    VmcallExitControls = 20, "VMCALL with invalid VM-exit control fields";
    VmcallMsegRevision = 22, "VMCALL with incorrect MSEG revision identifier";
    VmxoffDualMonitor = 23, "VMXOFF under dual-monitor treatment of SMIs and SMM";
    VmcallSmmFeatures = 24, "VMCALL with invalid SMM-monitor features";
    EntryExecutiveControls = 25, "VM entry with invalid VM-execution control fields in executive VMCS";
    EntryMovSs = 26, "VM entry with events blocked by MOV SS";
    InveptInvvpidOperand = 28, "invalid operand to INVEPT or INVVPID";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_back() {
        assert!(ExitReason::ALL.iter().all(|&r| ExitReason::from_number(r.number()) == Some(r)));
        assert!(InstructionError::ALL.iter().all(|&e| InstructionError::from_number(e.number()) == Some(e)));
        assert_eq!((ExitReason::InitSignal.number(), ExitReason::Sipi.number()), (3, 4));
        assert_eq!(ExitReason::from_number(35), None);
    }
}
