use nested_vmx::bus::{Delivery, Destination};

use super::*;

/// 2024-02-29 23:59:58 UTC, a Thursday.
const EPOCH_S: u64 = 1_709_251_198;
const MS: u64 = 1_000_000;

#[derive(Debug, Default)]
struct Seen {
    console: Vec<u8>,
    messages: Vec<IpiMessage>,
    extint: bool,
}

impl Outputs for Seen {
    fn console(&mut self, bytes: &[u8]) {
        self.console.extend(bytes);
    }
    fn message(&mut self, message: IpiMessage) {
        self.messages.push(message);
    }
    fn extint(&mut self, asserted: bool) {
        self.extint = asserted;
    }
}

/// A machine whose time stands still unless a test moves it.
struct Bench {
    devices: Devices,
    seen: Seen,
    now_ns: u64,
}

impl Bench {
    fn new() -> Self {
        let config = MachineConfig { cpus: 2, memory_bytes: 5 << 30, testdev: true, epoch_s: EPOCH_S };
        Self { devices: Devices::new(config), seen: Seen::default(), now_ns: 0 }
    }
    fn outb(&mut self, port: u16, value: u8) -> Outcome {
        self.devices.io_write(port, 1, value.into(), self.now_ns, &mut self.seen)
    }
    fn outs(&mut self, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            assert_eq!(self.outb(port, value), Outcome::Continue);
        }
    }
    fn inb(&mut self, port: u16) -> u8 {
        self.devices.io_read(port, 1, self.now_ns, &mut self.seen) as u8
    }
    fn irq(&mut self, irq: u16, high: bool) {
        let outcome = self.devices.io_write(0x2000 + irq, 1, high.into(), self.now_ns, &mut self.seen);
        assert_eq!(outcome, Outcome::Continue);
    }
    fn pulse(&mut self, irq: u16) {
        self.irq(irq, true);
        self.irq(irq, false);
    }
    fn inta(&mut self) -> Option<u8> {
        self.devices.acknowledge_extint(&mut self.seen)
    }
    fn advance_to(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.devices.advance(now_ns, &mut self.seen);
    }
    /// As kernels set the 8259s up: vectors 0x20 and 0x28, everything unmasked.
    fn init_pics(&mut self) {
        self.outs(&[(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)]);
        self.outs(&[(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1), (0xa1, 0)]);
    }
    fn ioapic(&mut self, register: u32, value: u32) {
        self.devices.mmio_write(IOAPIC_GPA, register.into(), &mut self.seen);
        self.devices.mmio_write(IOAPIC_GPA + 0x10, value.into(), &mut self.seen);
    }
    fn ioapic_read(&mut self, register: u32) -> u32 {
        self.devices.mmio_write(IOAPIC_GPA, register.into(), &mut self.seen);
        self.devices.mmio_read(IOAPIC_GPA + 0x10, 4) as u32
    }
}

#[test]
fn serial_writes_reach_the_console_and_input_interrupts() {
    let mut b = Bench::new();
    b.init_pics();
    b.outs(&[(0x3f8, b'h'), (0x3f8, b'i')]);
    assert_eq!(b.seen.console, b"hi");
    b.outs(&[(0x3f9, 1)]);
    assert_eq!(b.devices.console_input(b"xy", &mut b.seen), 2);
    assert!(b.seen.extint);
    assert_eq!(b.inta(), Some(0x24));
    assert_eq!((b.inb(0x3fd) & 1, b.inb(0x3f8), b.inb(0x3f8), b.inb(0x3fd) & 1), (1, b'x', b'y', 0));
    let room = b.devices.console_room();
    assert_eq!(b.devices.console_input(&[0; 1000], &mut b.seen), room);
}

#[test]
fn exits_resets_and_power_off_are_reported() {
    let mut b = Bench::new();
    let write = |b: &mut Bench, port, size, value| b.devices.io_write(port, size, value, 0, &mut b.seen);
    assert_eq!(write(&mut b, 0xf4, 4, 0x1234_5678), Outcome::Exit(0x1234_5678));
    assert_eq!(write(&mut b, 0xf4, 1, 0x1ff), Outcome::Exit(0xff));
    assert_eq!(write(&mut b, 0xf4, 2, 3), Outcome::Exit(3));
    assert_eq!(b.outb(0x64, 0xfe), Outcome::Reset);
    assert_eq!((b.outb(0x64, 0xd1), b.outb(0x60, 0xfe)), (Outcome::Continue, Outcome::Reset));
    assert_eq!((b.outb(0x64, 0xd1), b.outb(0x60, 0xdf)), (Outcome::Continue, Outcome::Continue));
    assert_eq!((b.inb(0x92), b.outb(0x92, 2), b.outb(0x92, 3)), (2, Outcome::Continue, Outcome::Reset));
    assert_eq!((b.outb(0xcf9, 2), b.outb(0xcf9, 6)), (Outcome::Continue, Outcome::Reset));
    assert_eq!(write(&mut b, 0xcf8, 4, 0x8000_0600), Outcome::Continue, "a PCI address, not a reset");
    let power_off: Vec<_> = b"ShuShutdown".iter().map(|&c| b.outb(0x8900, c)).collect();
    assert_eq!(power_off.last(), Some(&Outcome::PowerOff));
    assert!(power_off[..10].iter().all(|&o| o == Outcome::Continue));
    assert_eq!(b.devices.io_read(0xcfc, 4, 0, &mut b.seen), u32::MAX);
    assert_eq!(b.devices.io_read(0x1234, 2, 0, &mut b.seen), 0xffff);
}

#[test]
fn debug_exit_needs_the_testdev() {
    let config = MachineConfig { cpus: 1, memory_bytes: 64 << 20, testdev: false, epoch_s: 0 };
    let mut devices = Devices::new(config);
    assert_eq!(devices.io_write(0xf4, 1, 0, 0, &mut Seen::default()), Outcome::Continue);
}

#[test]
fn firmware_configuration_tells_signature_memory_and_processors() {
    let mut b = Bench::new();
    let mut item = |key: u32| {
        assert_eq!(b.devices.io_write(0x510, 2, key, 0, &mut Seen::default()), Outcome::Continue);
        u64::from_le_bytes(std::array::from_fn(|_| b.inb(0x511)))
    };
    assert_eq!(item(0), u32::from_le_bytes(*b"QEMU").into());
    assert_eq!((item(3), item(5), item(0x0f)), (5 << 30, 2, 2));
    assert_eq!(item(0x4000), 0);
    assert_eq!(item(5), 2, "selecting begins at the first byte");
    assert_eq!(b.inb(0x511), 0);
}

#[test]
fn cmos_shows_memory_and_the_time() {
    let mut b = Bench::new();
    let cmos = |b: &mut Bench, i: u8| {
        b.outs(&[(0x70, i)]);
        b.inb(0x71)
    };
    let above_16m = u64::from(cmos(&mut b, 0x34)) | u64::from(cmos(&mut b, 0x35)) << 8;
    assert_eq!((above_16m << 16) + (16 << 20), 3 << 30);
    let above_4g = u64::from(cmos(&mut b, 0x5b)) | u64::from(cmos(&mut b, 0x5c)) << 8;
    assert_eq!(above_4g << 16, 2 << 30);

    let time = |b: &mut Bench| [0x32, 9, 8, 7, 6, 4, 2, 0].map(|i| cmos(b, i));
    assert_eq!(time(&mut b), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    b.now_ns = 2_500 * MS;
    assert_eq!(time(&mut b), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]);
    assert_eq!(cmos(&mut b, 0x0a) & 0x80, 0);
    b.now_ns = 2_999 * MS;
    assert_eq!(cmos(&mut b, 0x0a) & 0x80, 0x80);
    b.outs(&[(0x70, 0x0b), (0x71, 4)]);
    assert_eq!(cmos(&mut b, 4), 12, "binary, 12 hours: midnight");
}

#[test]
fn pit_channel_2_serves_the_calibration_of_kernels() {
    let mut b = Bench::new();
    b.now_ns = 12_345;
    // Gate on, speaker off; mode 0, low and high byte; 10 ms.
    let latch = (PIT_HZ / 100) as u16;
    let port61 = b.inb(0x61) & !2 | 1;
    b.outs(&[(0x61, port61), (0x43, 0xb0), (0x42, latch as u8), (0x42, (latch >> 8) as u8)]);
    assert_eq!(b.inb(0x61) & 0x20, 0);
    b.now_ns = 12_345 + 9_990_000;
    assert_eq!(b.inb(0x61) & 0x20, 0);
    b.now_ns = 12_345 + 10_000_000;
    assert_eq!(b.inb(0x61) & 0x20, 0x20);
}

#[test]
fn pit_gate_holds_the_count() {
    let mut b = Bench::new();
    b.outs(&[(0x61, 1), (0x43, 0xb0), (0x42, 0), (0x42, 0x10)]);
    b.now_ns = MS;
    b.outs(&[(0x61, 0)]);
    let read = |b: &mut Bench| {
        b.outs(&[(0x43, 0x80)]);
        u16::from(b.inb(0x42)) | u16::from(b.inb(0x42)) << 8
    };
    let held = read(&mut b);
    assert_eq!(held, 0x1000 - 1193);
    b.now_ns = 100 * MS;
    assert_eq!(read(&mut b), held);
    b.outs(&[(0x61, 1)]);
    b.now_ns = 101 * MS;
    assert_eq!(read(&mut b), 0x1000 - 2386);
}

#[test]
fn pit_channel_0_interrupts_periodically_and_once() {
    for (mode, periodic) in [(0x34, true), (0x36, true), (0x30, false), (0x38, false)] {
        let mut b = Bench::new();
        b.init_pics();
        b.outs(&[(0x43, mode), (0x40, 0xa9), (0x40, 0x04)]);
        let period_ns = b.devices.next_deadline_ns().unwrap();
        assert!((999_000..=1_001_000).contains(&period_ns), "1193 ticks are 1 ms: {period_ns}");
        b.advance_to(period_ns - 1);
        assert!(!b.seen.extint);
        b.advance_to(period_ns);
        assert_eq!(b.inta(), Some(0x20));
        b.outs(&[(0x20, 0x20)]);
        assert_eq!(b.devices.next_deadline_ns().is_some(), periodic, "mode {mode:#x}");
        b.advance_to(5 * period_ns + 10);
        assert_eq!(b.inta(), periodic.then_some(0x20), "several are one");
        if periodic {
            assert_eq!(b.devices.next_deadline_ns().unwrap().div_ceil(MS), 6, "the phase is kept");
        }
    }
}

#[test]
fn pit_read_back_latches_status_and_count() {
    let mut b = Bench::new();
    b.outs(&[(0x43, 0x34), (0x40, 0x34), (0x40, 0x12), (0x43, 0xc2)]);
    assert_eq!(b.inb(0x40), 0xb4, "output high, loaded, low then high, mode 2");
    b.now_ns = MS;
    assert_eq!((b.inb(0x40), b.inb(0x40)), (0x34, 0x12), "as latched");
    assert_eq!(u16::from(b.inb(0x40)) | u16::from(b.inb(0x40)) << 8, 0x1234 - 1193);
}

#[test]
fn pic_serves_by_priority_and_cascades() {
    let mut b = Bench::new();
    b.init_pics();
    b.pulse(5);
    b.pulse(12);
    b.pulse(9);
    assert_eq!(b.inta(), Some(0x29));
    assert!(!b.seen.extint, "IRQ 12 is lower than 9, IRQ 5 lower than the cascade");
    b.outs(&[(0xa0, 0x20), (0x20, 0x20)]);
    assert_eq!(b.inta(), Some(0x2c));
    b.pulse(1);
    assert_eq!(b.inta(), Some(0x21), "higher than the cascade");
    b.outs(&[(0x20, 0x20), (0xa0, 0x20), (0x20, 0x20)]);
    assert_eq!(b.inta(), Some(0x25));
    b.outs(&[(0x20, 0x0b)]);
    assert_eq!(b.inb(0x20), 1 << 5, "in service");
    b.outs(&[(0x20, 0x65)]);
    assert_eq!((b.inb(0x20), b.inta()), (0, None));
}

#[test]
fn pic_masks_hold_a_request() {
    let mut b = Bench::new();
    b.init_pics();
    b.outs(&[(0x21, 0x10)]);
    b.pulse(4);
    assert!(!b.seen.extint);
    assert_eq!((b.inb(0x20), b.inb(0x21)), (0x10, 0x10));
    b.outs(&[(0x21, 0)]);
    assert!(b.seen.extint);
    assert_eq!(b.inta(), Some(0x24));
}

#[test]
fn pic_auto_eoi_rotation_special_mask_and_poll() {
    let mut b = Bench::new();
    b.outs(&[(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3)]);
    b.pulse(3);
    assert_eq!(b.inta(), Some(0x23));
    b.pulse(4);
    assert_eq!(b.inta(), Some(0x24), "nothing stays in service");

    b.init_pics();
    b.pulse(3);
    assert_eq!(b.inta(), Some(0x23));
    b.outs(&[(0x20, 0xa0)]);
    b.pulse(3);
    b.pulse(7);
    assert_eq!(b.inta(), Some(0x27), "IRQ 3 rotated to the lowest priority");

    b.init_pics();
    b.pulse(1);
    assert_eq!(b.inta(), Some(0x21));
    b.pulse(6);
    assert!(!b.seen.extint);
    b.outs(&[(0x21, 0x02), (0x20, 0x68)]);
    assert_eq!(b.inta(), Some(0x26), "a masked one in service does not block");

    b.init_pics();
    b.pulse(6);
    b.outs(&[(0x20, 0x0c)]);
    assert_eq!(b.inb(0x20), 0x86);
    assert!(!b.seen.extint);
}

#[test]
fn pic_level_lines_ask_again_until_they_drop() {
    let mut b = Bench::new();
    b.init_pics();
    b.outs(&[(0x4d0, 0xff), (0x4d1, 0xff)]);
    assert_eq!((b.inb(0x4d0), b.inb(0x4d1)), (0xf8, 0xde));
    b.irq(10, true);
    for _ in 0..2 {
        assert_eq!(b.inta(), Some(0x2a));
        b.outs(&[(0xa0, 0x20), (0x20, 0x20)]);
    }
    b.irq(10, false);
    assert!(!b.seen.extint);
    assert_eq!(b.inta(), None);
}

#[test]
fn ioapic_sends_edges_as_redirected() {
    let mut b = Bench::new();
    assert_eq!(b.ioapic_read(1), 0x0017_0011);
    b.pulse(5);
    assert!(b.seen.messages.is_empty(), "masked");
    b.ioapic(0x1b, 0x0300_0000);
    b.ioapic(0x1a, 0x0000_0935);
    assert_eq!((b.ioapic_read(0x1a), b.ioapic_read(0x1b)), (0x935, 0x0300_0000));
    b.pulse(5);
    assert_eq!(
        b.seen.messages,
        [IpiMessage {
            delivery: Delivery::LowestPriority,
            vector: 0x35,
            destination: Destination::Logical(3),
            level: false,
            cause: 0
        }]
    );
    // The PIT is on pin 2.
    b.ioapic(0x14, 0x30);
    b.outs(&[(0x43, 0x34), (0x40, 0), (0x40, 1)]);
    b.advance_to(b.devices.next_deadline_ns().unwrap());
    assert_eq!(b.seen.messages[1].vector, 0x30);
}

#[test]
fn ioapic_level_interrupts_fire_again_after_eoi_while_asserted() {
    let mut b = Bench::new();
    b.ioapic(0x10 + 2 * 17, 0x1_8041);
    b.irq(17, true);
    assert!(b.seen.messages.is_empty());
    b.ioapic(0x10 + 2 * 17, 0x8041);
    assert_eq!(b.seen.messages.len(), 1, "unmasked while asserted");
    assert!(b.seen.messages[0].level);
    assert_eq!(b.ioapic_read(0x10 + 2 * 17), 0xc041, "remote IRR");
    b.irq(17, false);
    b.irq(17, true);
    assert_eq!(b.seen.messages.len(), 1, "not before its EOI");
    b.devices.eoi_broadcast(0x42, &mut b.seen);
    assert_eq!(b.seen.messages.len(), 1, "another vector");
    b.devices.eoi_broadcast(0x41, &mut b.seen);
    assert_eq!(b.seen.messages.len(), 2);
    b.irq(17, false);
    b.devices.eoi_broadcast(0x41, &mut b.seen);
    assert_eq!((b.seen.messages.len(), b.ioapic_read(0x10 + 2 * 17)), (2, 0x8041));
}

#[test]
fn a_restored_machine_goes_on_as_the_saved_one() {
    let mut b = Bench::new();
    b.init_pics();
    b.outs(&[(0x43, 0x34), (0x40, 0), (0x40, 1), (0x8900, b'S'), (0x70, 0x34)]);
    b.devices.console_input(b"abc", &mut b.seen);
    b.irq(17, true);
    let state = b.devices.state();
    b.devices = Devices::restore(&state).unwrap();
    assert_eq!(b.devices.state(), state);
    assert_eq!(b.inb(0x3f8), b'a');
}

#[test]
fn no_access_panics() {
    let mut b = Bench::new();
    for port in 0..=u16::MAX {
        for (size, value) in [(1, u32::MAX), (4, 0), (1, 0x34), (2, 0x5aa5)] {
            b.now_ns += 1_000_003;
            let _ = b.devices.io_write(port, size, value, b.now_ns, &mut b.seen);
            b.devices.io_read(port, size, b.now_ns, &mut b.seen);
        }
    }
    for at in 0..0x100 {
        b.ioapic(at, u32::MAX);
        b.ioapic_read(at);
    }
    b.advance_to(u64::MAX);
}
