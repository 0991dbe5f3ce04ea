//! Entry, and what the multiboot loader says.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{console, cpu, exception, exit_code, fail};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// EAX at the entry of a multiboot1 kernel.
pub const LOADER_MAGIC: u32 = 0x2bad_b002;
pub const INFO_COMMAND_LINE: u32 = 1 << 2;
pub const INFO_MODULES: u32 = 1 << 3;

/// The multiboot information, as far as the guests use it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
    pub flags: u32,
    pub memory_kib: [u32; 2],
    pub boot_device: u32,
    pub command_line_gpa: u32,
    pub module_count: u32,
    pub modules_gpa: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Module {
    start_gpa: u32,
    end_gpa: u32,
    command_line_gpa: u32,
    reserved: u32,
}

impl Info {
    pub fn command_line(&self) -> &'static [u8] {
        if self.flags & INFO_COMMAND_LINE == 0 {
            return &[];
        }
        let text = self.command_line_gpa as usize as *const u8;
        let mut length = 0;
        // SAFETY: the loader promises a string that ends in 0, in memory that nobody changes.
        unsafe {
            while text.add(length).read_volatile() != 0 {
                length += 1;
            }
            core::slice::from_raw_parts(text, length)
        }
    }

    pub fn first_module(&self) -> Option<&'static [u8]> {
        if self.flags & INFO_MODULES == 0 || self.module_count == 0 {
            return None;
        }
        // SAFETY: the loader promises a table of `module_count` modules, and that each is in memory.
        unsafe {
            let module = (self.modules_gpa as usize as *const Module).read_unaligned();
            let length = module.end_gpa.checked_sub(module.start_gpa)? as usize;
            Some(core::slice::from_raw_parts(module.start_gpa as usize as *const u8, length))
        }
    }
}

/// The value of `key=value` in a command line.
pub fn option<'a>(command_line: &'a [u8], key: &str) -> Option<&'a [u8]> {
    command_line.split(|byte| *byte == b' ').find_map(|word| word.strip_prefix(key.as_bytes())?.strip_prefix(b"="))
}

/// Declares a guest: the prefix of its lines, its first processor's function and its second's.
#[macro_export]
macro_rules! guest {
    ($name:literal, $first:path, $second:path) => {
        #[unsafe(no_mangle)]
        fn guest_name() -> &'static str {
            $name
        }
        #[unsafe(no_mangle)]
        fn guest_first(info: &'static $crate::boot::Info) -> ! {
            $first(info)
        }
        #[unsafe(no_mangle)]
        fn guest_second() -> ! {
            $second()
        }
    };
}

unsafe extern "Rust" {
    safe fn guest_name() -> &'static str;
    safe fn guest_first(info: &'static Info) -> !;
    safe fn guest_second() -> !;
}

pub(crate) fn name() -> &'static str {
    guest_name()
}

/// `interrupts=on`: see the crate's documentation.
static INTERRUPTS_ON: AtomicBool = AtomicBool::new(false);

/// From boot.s, in long mode on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn rt_main(processor: u32, magic: u32, info_gpa: u32) -> ! {
    if processor != 0 {
        exception::load();
        if INTERRUPTS_ON.load(Ordering::Acquire) {
            cpu::enable_interrupts();
        }
        guest_second();
    }
    console::init();
    exception::init();
    exception::load();
    if magic != LOADER_MAGIC {
        fail!(exit_code::UNSUPPORTED, "not started by a multiboot loader");
    }
    // SAFETY: the loader says that its information is there.
    let info = unsafe { &*(info_gpa as usize as *const Info) };
    if option(info.command_line(), "interrupts") == Some(b"on") {
        INTERRUPTS_ON.store(true, Ordering::Release);
        cpu::enable_interrupts();
    }
    guest_first(info)
}

/// The code at which a second processor reaches long mode and `guest_second`; position-independent.
pub fn second_processor_code() -> &'static [u8] {
    unsafe extern "C" {
        safe static ap_start16: u8;
        safe static ap_end16: u8;
    }
    let start = &raw const ap_start16;
    // SAFETY: both symbols bound one piece of the image.
    unsafe { core::slice::from_raw_parts(start, (&raw const ap_end16 as usize) - start as usize) }
}
