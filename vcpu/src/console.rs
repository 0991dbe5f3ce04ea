//! The serial console as the world outside sees it: output kept up to a bound and read by offset, input queued
//! for the guest.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::thread::{Changes, lock};

/// Output kept for readers that come later.
const OUTPUT_BOUND: usize = 1 << 20;
/// Input that the guest has not taken yet.
const INPUT_BOUND: usize = 64 << 10;

#[derive(Debug, Default)]
struct Output {
    kept: VecDeque<u8>,
    /// Offset of the first kept byte since the VM was created.
    start: u64,
}

pub struct Console {
    changes: Arc<Changes>,
    output: Mutex<Output>,
    input: Mutex<VecDeque<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleRead {
    pub bytes: Vec<u8>,
    /// Where to read on.
    pub next_offset: u64,
    /// Bytes between the asked offset and the first one returned that are no longer kept.
    pub lost: u64,
}

impl Console {
    pub(crate) fn new(changes: Arc<Changes>) -> Self {
        Self { changes, output: Mutex::default(), input: Mutex::default() }
    }

    /// Reads at most `max` bytes from `offset` on; an offset past the end reads nothing.
    pub fn read(&self, offset: u64, max: usize) -> ConsoleRead {
        self.changes.seen();
        let output = lock(&self.output);
        let end = output.start + output.kept.len() as u64;
        let from = offset.clamp(output.start, end);
        let skip = (from - output.start) as usize;
        let bytes: Vec<u8> = output.kept.iter().skip(skip).take(max).copied().collect();
        ConsoleRead { next_offset: from + bytes.len() as u64, lost: output.start.saturating_sub(offset), bytes }
    }

    /// The guest wrote.
    pub fn push_output(&self, bytes: &[u8]) {
        {
            let mut output = lock(&self.output);
            output.kept.extend(bytes);
            let excess = output.kept.len().saturating_sub(OUTPUT_BOUND);
            output.kept.drain(..excess);
            output.start += excess as u64;
        }
        self.changes.tell();
    }

    /// Queues input; returns how many bytes found room.
    pub(crate) fn queue_input(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.input);
        let room = INPUT_BOUND - input.len().min(INPUT_BOUND);
        let taken = &bytes[..bytes.len().min(room)];
        input.extend(taken);
        taken.len()
    }

    /// The serial device takes at most `max` bytes of input.
    pub fn take_input(&self, max: usize) -> Vec<u8> {
        let mut input = lock(&self.input);
        let n = input.len().min(max);
        input.drain(..n).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_reader_sees_how_much_output_it_lost() {
        let c = Console::new(Arc::default());
        c.push_output(b"hello");
        assert_eq!(c.read(1, 3), ConsoleRead { bytes: b"ell".to_vec(), next_offset: 4, lost: 0 });
        assert_eq!(c.read(99, 3), ConsoleRead { bytes: vec![], next_offset: 5, lost: 0 });
        c.push_output(&vec![b'x'; OUTPUT_BOUND]);
        let r = c.read(2, 1);
        assert_eq!((r.bytes, r.next_offset, r.lost), (b"x".to_vec(), 6, 3));
    }

    #[test]
    fn input_beyond_the_bound_is_refused_and_counted() {
        let c = Console::new(Arc::default());
        assert_eq!(c.queue_input(&vec![b'a'; INPUT_BOUND - 1]), INPUT_BOUND - 1);
        assert_eq!(c.queue_input(b"bcd"), 1);
        assert_eq!(c.take_input(INPUT_BOUND).last(), Some(&b'b'));
        assert!(c.take_input(1).is_empty());
    }
}
