//! Short names of enum values, for people and for command lines.

use crate::v1;

/// The names of an enum's values without the prefix that protobuf wants: `VM_EXIT` for `EVENT_KIND_VM_EXIT`.
pub trait Label: Copy + TryFrom<i32> + 'static {
    const PREFIX: &'static str;
    fn full_name(self) -> &'static str;
    fn from_full_name(name: &str) -> Option<Self>;

    fn label(self) -> &'static str {
        let name = self.full_name();
        name.strip_prefix(Self::PREFIX).unwrap_or(name)
    }

    /// The label of a field's number; numbers of later versions are `UNKNOWN`.
    fn label_of(value: i32) -> &'static str {
        Self::try_from(value).map_or("UNKNOWN", Self::label)
    }

    /// Takes any case, and `-` for `_`. UNSPECIFIED is not a choice.
    fn from_label(label: &str) -> Option<Self> {
        let upper = label.replace('-', "_").to_ascii_uppercase();
        (upper != "UNSPECIFIED").then(|| Self::from_full_name(&format!("{}{upper}", Self::PREFIX))).flatten()
    }

    /// Every label but UNSPECIFIED, in the order of the numbers, which are dense.
    fn labels() -> Vec<&'static str> {
        (1..).map_while(|n| Self::try_from(n).ok()).map(Self::label).collect()
    }
}

macro_rules! labels {
    ($($name:ident $prefix:literal),* $(,)?) => {$(
        impl Label for v1::$name {
            const PREFIX: &'static str = $prefix;
            fn full_name(self) -> &'static str {
                self.as_str_name()
            }
            fn from_full_name(name: &str) -> Option<Self> {
                Self::from_str_name(name)
            }
        }
    )*};
}

labels! {
    ActivityState "ACTIVITY_STATE_",
    Clock "CLOCK_",
    DeliveryMode "DELIVERY_MODE_",
    Disposition "DISPOSITION_",
    Engine "ENGINE_",
    EventKind "EVENT_KIND_",
    InjectionKind "INJECTION_KIND_",
    KvmKind "KVM_KIND_",
    Level "LEVEL_",
    MpState "MP_STATE_",
    Nested "NESTED_",
    VmChange "VM_CHANGE_",
    VmState "VM_STATE_",
    VmcsRole "VMCS_ROLE_",
    VmcsWidth "VMCS_WIDTH_",
    VmxMode "VMX_MODE_",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_round_trip_in_any_case() {
        assert_eq!(v1::EventKind::VmExit.label(), "VM_EXIT");
        assert_eq!(v1::EventKind::from_label("vm-exit"), Some(v1::EventKind::VmExit));
        assert_eq!(v1::EventKind::from_label("unspecified"), None);
        assert_eq!(v1::EventKind::label_of(9999), "UNKNOWN");
        assert!(v1::EventKind::labels().contains(&"VCPU_STARTED"));
    }
}
