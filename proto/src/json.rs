//! The JSON mapping of protobuf (proto3, "JSON Mapping") for any message of this package.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

/// The descriptor pool of this package.
pub fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    // The bytes are our own build's output, so a failure is a broken build and not a condition to handle.
    POOL.get_or_init(|| DescriptorPool::decode(crate::DESCRIPTORS).expect("descriptors made by this build"))
}

/// `message` in the JSON mapping: lowerCamelCase names, 64-bit integers as strings, enum values by name. Fields
/// with default values are written out, so that a reader finds every field it knows.
pub fn to_value<M: Message + Name>(message: &M) -> Result<serde_json::Value, serde_json::Error> {
    use serde::ser::Error;
    let name = M::full_name();
    let descriptor = pool()
        .get_message_by_name(&name)
        .ok_or_else(|| serde_json::Error::custom(format!("no descriptor for {name}")))?;
    let dynamic =
        DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(serde_json::Error::custom)?;
    let options = SerializeOptions::new().skip_default_fields(false);
    dynamic.serialize_with_options(serde_json::value::Serializer, &options)
}

/// One line.
pub fn to_line<M: Message + Name>(message: &M) -> Result<String, serde_json::Error> {
    to_value(message).map(|v| v.to_string())
}

/// Indented, for people.
pub fn to_text<M: Message + Name>(message: &M) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(&to_value(message)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn json_names_enums_and_64_bit_numbers_as_the_mapping_says() {
        let event = v1::Event {
            sequence: 1 << 60,
            kind: v1::EventKind::VmExit as i32,
            detail: Some(v1::event::Detail::VmExit(v1::VmExit { reason: 3, ..Default::default() })),
            ..Default::default()
        };
        let json = to_value(&event).unwrap();
        assert_eq!(json["sequence"], "1152921504606846976");
        assert_eq!(json["kind"], "EVENT_KIND_VM_EXIT");
        assert_eq!(json["vmExit"]["reason"], 3);
        assert_eq!(json["causeId"], "0");
        assert!(json.get("icrWrite").is_none());
    }

    #[test]
    fn every_message_of_the_package_has_a_descriptor() {
        assert!(pool().get_message_by_name("nestd.v1.Vm").is_some());
        assert!(pool().get_service_by_name("nestd.v1.EventService").is_some());
        assert!(pool().get_message_by_name("google.protobuf.Timestamp").is_some());
    }
}
