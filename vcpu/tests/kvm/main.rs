//! The KVM engine on this machine's /dev/kvm. Where there is none, every test counts as ignored.

mod guest;
mod lifecycle;
mod machine;
mod modes;
mod nested;
mod rig;
mod signals;

use libtest_mimic::{Arguments, Failed, Trial};
use nestd_vcpu::host::{KvmKind, preflight};

/// Which hosts a test means something on.
#[derive(Clone, Copy, PartialEq)]
pub enum On {
    Any,
    Pvm,
    /// kvm_intel with nested=1.
    Nesting,
}

pub struct Case {
    pub name: &'static str,
    pub on: On,
    pub run: fn(),
}

#[macro_export]
macro_rules! cases {
    ($($name:ident $(on $host:ident)?),* $(,)?) => {
        pub const CASES: &[$crate::Case] = &[$($crate::Case {
            name: stringify!($name),
            on: { #[allow(unused_mut, unused_assignments)] { let mut on = $crate::On::Any; $(on = $crate::On::$host;)? on } },
            run: $name,
        }),*];
    };
}

fn main() {
    let arguments = Arguments::from_args();
    let report = preflight();
    let host = report.kvm;
    if let KvmKind::Absent { reason } = &host {
        eprintln!("skipped: no /dev/kvm ({reason})");
    }
    let trials = [modes::CASES, signals::CASES, lifecycle::CASES, machine::CASES, nested::CASES]
        .into_iter()
        .flatten()
        .map(|case| {
            let skip = match &host {
                KvmKind::Absent { .. } => Some("skipped: no /dev/kvm".to_owned()),
                kind if case.on == On::Pvm && *kind != KvmKind::Pvm => Some("skipped: not kvm_pvm".to_owned()),
                _ if case.on == On::Nesting && !report.kernel_nesting => {
                    Some(format!("skipped: no nesting in the kernel ({})", report.kernel_nesting_reason))
                }
                _ => None,
            };
            let run = case.run;
            Trial::test(case.name, move || {
                run();
                Ok::<(), Failed>(())
            })
            .with_kind(skip.clone().unwrap_or_default())
            .with_ignored_flag(skip.is_some())
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
