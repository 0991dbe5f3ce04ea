//! Quantities as people write them, for the configuration file and for command lines.

use std::{fmt, str::FromStr, time::Duration};

use serde::Deserialize;

/// Bytes: `512M`, `4GiB`, `1048576`. The units are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct ByteSize(pub u64);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error("`{0}` is not a size; write a number with K, M or G, such as 512M")]
    Size(String),
    #[error("`{0}` is not a time; write a number with ms, s or m, such as 60s")]
    Time(String),
}

/// The number in front and the unit behind it.
fn split(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, text[end..].trim()))
}

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let bytes = split(text.trim()).and_then(|(number, unit)| {
            let shift = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
                "" => 0,
                "k" => 10,
                "m" => 20,
                "g" => 30,
                _ => return None,
            };
            number.checked_mul(1 << shift)
        });
        bytes.map(Self).ok_or_else(|| UnitError::Size(text.into()))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = UnitError;
    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        let (shift, unit) = match bytes {
            0..1024 => return write!(f, "{bytes} B"),
            0x400..0x10_0000 => (10, "KiB"),
            0x10_0000..0x4000_0000 => (20, "MiB"),
            _ => (30, "GiB"),
        };
        let tenths = (u128::from(bytes) * 10) >> shift;
        match tenths % 10 {
            0 => write!(f, "{} {unit}", tenths / 10),
            tenth => write!(f, "{}.{tenth} {unit}", tenths / 10),
        }
    }
}

/// A time: `250ms`, `60s`, `2m`; a bare number is seconds.
pub fn parse_time(text: &str) -> Result<Duration, UnitError> {
    let time = split(text.trim()).and_then(|(number, unit)| match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        _ => None,
    });
    time.ok_or_else(|| UnitError::Time(text.into()))
}

/// For serde: a time written as text.
pub fn deserialize_time<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_time(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown_in_powers_of_1024() {
        assert_eq!("512M".parse(), Ok(ByteSize(512 << 20)));
        assert_eq!("4GiB".parse(), Ok(ByteSize(4 << 30)));
        assert_eq!("7kb".parse(), Ok(ByteSize(7 << 10)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        for wrong in ["", "M", "1T", "-1", "99999999999G", "1.5G"] {
            assert!(wrong.parse::<ByteSize>().is_err(), "{wrong}");
        }
        assert_eq!(ByteSize(512 << 20).to_string(), "512 MiB");
        assert_eq!(ByteSize(1).to_string(), "1 B");
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(ByteSize(0).to_string(), "0 B");
    }

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(parse_time("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_time("5"), Ok(Duration::from_secs(5)));
        for wrong in ["", "s", "1h", "-1s"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
