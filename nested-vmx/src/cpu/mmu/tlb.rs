//! The software TLB: linear page to RAM offset, for each kind of access that is allowed.
//!
//! An entry is tagged with its page and a context: the (VPID, PCID, EPTP) it belongs to, by a small number. So VM entries,
//! VM exits and MOV CR3 with tags flush nothing. A page that is not RAM, holds decoded code (for writes), or carries a
//! data breakpoint never gets a tag: its accesses take the slow path.

use std::collections::HashMap;

const SETS: usize = 1024;
const NONE: u64 = u64::MAX;
/// Contexts are numbered below this; bit 11 of a fetch tag says "user".
const CONTEXTS: u64 = 0x7fe;
pub const USER_FETCH: u64 = 1 << 11;

/// Who accesses data. Each has its own entries, because what is allowed differs (SDM 3, "Determination of Access Rights").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// Supervisor-mode, user pages forbidden when CR4.SMAP is set: explicit with AC=0, and all implicit ones.
    Supervisor = 0,
    /// Supervisor-mode with RFLAGS.AC=1.
    SupervisorAc = 1,
    User = 2,
    /// User-mode with alignment checks (CR0.AM and RFLAGS.AC): never hits, so that the slow path sees every access.
    UserAligned = 4,
}

const FETCH: usize = 3;
const USED: usize = 4 * SETS;
const ALL: usize = 8 * SETS;

#[derive(Clone, Copy)]
pub struct Entry {
    read: u64,
    write: u64,
    /// RAM offset = linear address + addend.
    addend: u64,
    /// Bytes of the page the translation came from, minus 1, and GLOBAL.
    info: u64,
}

const GLOBAL: u64 = 1 << 63;
const EMPTY: Entry = Entry { read: NONE, write: NONE, addend: 0, info: 0 };

/// What [`Tlb::fill`] learns from a translation.
pub struct Fill {
    pub lin: u64,
    pub ram_offset: u64,
    pub read: bool,
    pub write: bool,
    pub global: bool,
    /// The size of the page in the paging structures of the linear address, minus 1: INVLPG drops all its pieces, also
    /// where EPT has smaller pages (SDM 3, "Operations that Invalidate TLBs and Paging-Structure Caches").
    pub page_mask: u64,
}

/// What a context number stands for (SDM 3, "Information That May Be Cached").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ContextKey {
    pub vpid: u16,
    pub pcid: u16,
    /// EPTP bits 51:12 and bit 0; 0 without EPT.
    pub eptp: u64,
}

pub struct Tlb {
    /// [`USED`] ones, then those that are never filled: [`Access::UserAligned`]'s.
    entries: Box<[Entry; ALL]>,
    context: u64,
    contexts: HashMap<ContextKey, u64>,
    /// The next number that no entry carries.
    next: u64,
    key: ContextKey,
    /// Changes with every invalidation: what was looked up by linear address before is void.
    generation: u64,
}

#[inline(always)]
fn set(lin: u64) -> usize {
    (lin >> 12) as usize & (SETS - 1)
}

impl Default for Tlb {
    fn default() -> Self {
        let mut t = Self {
            entries: vec![EMPTY; ALL].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!()),
            context: 0,
            contexts: HashMap::new(),
            next: 1,
            key: ContextKey::default(),
            generation: 0,
        };
        t.contexts.insert(t.key, 0);
        t
    }
}

impl Tlb {
    /// The RAM offset for a read of `size` bytes that does not leave the page.
    #[inline(always)]
    pub fn read(&self, access: Access, lin: u64, size: u64) -> Option<u64> {
        let e = &self.entries[(access as usize * SETS + set(lin)) & (ALL - 1)];
        let tag = lin.wrapping_add(size - 1) & !0xfff | self.context;
        (e.read == tag).then(|| lin.wrapping_add(e.addend))
    }

    #[inline(always)]
    pub fn write(&self, access: Access, lin: u64, size: u64) -> Option<u64> {
        let e = &self.entries[(access as usize * SETS + set(lin)) & (ALL - 1)];
        let tag = lin.wrapping_add(size - 1) & !0xfff | self.context;
        (e.write == tag).then(|| lin.wrapping_add(e.addend))
    }

    pub fn fetch(&self, user: bool, lin: u64) -> Option<u64> {
        let e = &self.entries[FETCH * SETS + set(lin)];
        (e.read == self.fetch_tag(user, lin)).then(|| lin.wrapping_add(e.addend))
    }

    fn fetch_tag(&self, user: bool, lin: u64) -> u64 {
        lin & !0xfff | self.context | if user { USER_FETCH } else { 0 }
    }

    pub fn fill(&mut self, access: Access, f: &Fill) {
        if access == Access::UserAligned {
            return;
        }
        let tag = f.lin & !0xfff | self.context;
        let e = &mut self.entries[access as usize * SETS + set(f.lin)];
        *e = Entry {
            read: if f.read { tag } else { NONE },
            write: if f.write { tag } else { NONE },
            addend: f.ram_offset.wrapping_sub(f.lin),
            info: f.page_mask | if f.global { GLOBAL } else { 0 },
        };
    }

    pub fn fill_fetch(&mut self, user: bool, f: &Fill) {
        let tag = self.fetch_tag(user, f.lin);
        self.entries[FETCH * SETS + set(f.lin)] = Entry {
            read: tag,
            write: NONE,
            addend: f.ram_offset.wrapping_sub(f.lin),
            info: f.page_mask | if f.global { GLOBAL } else { 0 },
        };
    }

    /// What caches keyed by linear address compare besides the address.
    #[inline(always)]
    pub fn lookup_tag(&self) -> u64 {
        self.generation << 12 | self.context
    }

    pub fn key(&self) -> ContextKey {
        self.key
    }

    /// Another (VPID, PCID, EPTP) is current; its old entries are valid again.
    pub fn switch(&mut self, key: ContextKey) {
        if key == self.key {
            return;
        }
        self.key = key;
        self.context = match self.contexts.get(&key) {
            Some(&c) => c,
            None => self.number(key),
        };
    }

    /// A number for `key` that no entry carries.
    fn number(&mut self, key: ContextKey) -> u64 {
        if self.next == CONTEXTS {
            self.next = 0;
            self.contexts.clear();
            self.flush();
        }
        let number = self.next;
        self.next += 1;
        self.contexts.insert(key, number);
        number
    }

    /// Everything, in all contexts.
    pub fn flush(&mut self) {
        self.generation += 1;
        self.entries[..USED].fill(EMPTY);
    }

    /// Everything of contexts that `which` names; global translations too if `globals`.
    pub fn flush_contexts(&mut self, globals: bool, which: impl Fn(&ContextKey) -> bool) {
        if globals {
            // Nothing of them stays: it is enough that their numbers are never used again.
            self.contexts.retain(|k, _| !which(k));
            if which(&self.key) {
                self.context = self.number(self.key);
            }
            return;
        }
        self.generation += 1;
        let mut hit = [false; CONTEXTS as usize + 1];
        for (k, &c) in &self.contexts {
            hit[c as usize] = which(k);
        }
        for e in self.entries[..USED].iter_mut() {
            let tag = if e.read != NONE { e.read } else { e.write };
            if tag != NONE && hit[(tag & 0x7ff) as usize] && (globals || e.info & GLOBAL == 0) {
                *e = EMPTY;
            }
        }
    }

    /// Every translation of the page that holds `lin`, in all contexts and for all page sizes.
    pub fn flush_page(&mut self, lin: u64) {
        self.generation += 1;
        for e in self.entries[..USED].iter_mut() {
            let tag = if e.read != NONE { e.read } else { e.write };
            if tag != NONE && (tag ^ lin) & !(e.info & !GLOBAL | 0xfff) == 0 {
                *e = EMPTY;
            }
        }
    }

    /// No fast writes to this page of RAM any more: it is about to hold decoded code.
    pub fn revoke_writes(&mut self, ram_page_offset: u64) {
        for e in self.entries[..USED].iter_mut() {
            if e.write != NONE && (e.write & !0xfff).wrapping_add(e.addend) == ram_page_offset {
                e.write = NONE;
            }
        }
    }

    /// No fast writes at all (a page that another processor is about to decode).
    pub fn revoke_all_writes(&mut self) {
        for e in self.entries[..USED].iter_mut() {
            e.write = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(lin: u64, off: u64) -> Fill {
        Fill { lin, ram_offset: off, read: true, write: true, global: false, page_mask: 0xfff }
    }

    #[test]
    fn an_access_that_leaves_the_page_misses() {
        let mut t = Tlb::default();
        t.fill(Access::Supervisor, &fill(0x7000_1000, 0x3000));
        assert_eq!(t.read(Access::Supervisor, 0x7000_1ff8, 8), Some(0x3ff8));
        assert_eq!(t.read(Access::Supervisor, 0x7000_1ff9, 8), None);
        assert_eq!(t.read(Access::User, 0x7000_1000, 1), None);
        assert_eq!(t.write(Access::Supervisor, 0x7000_1000, 1), Some(0x3000));
    }

    #[test]
    fn contexts_keep_their_entries_and_invlpg_reaches_all_of_them() {
        let mut t = Tlb::default();
        let (a, b) = (ContextKey { pcid: 1, ..Default::default() }, ContextKey { pcid: 2, ..Default::default() });
        t.switch(a);
        t.fill(Access::User, &fill(0x1000, 0));
        t.switch(b);
        assert_eq!(t.read(Access::User, 0x1000, 1), None);
        t.switch(a);
        assert_eq!(t.read(Access::User, 0x1000, 1), Some(0));
        t.switch(b);
        t.flush_page(0x1234);
        t.switch(a);
        assert_eq!(t.read(Access::User, 0x1000, 1), None);
    }

    #[test]
    fn invlpg_drops_all_pieces_of_a_large_page() {
        let mut t = Tlb::default();
        for lin in [0x20_0000, 0x20_5000] {
            t.fill(Access::User, &Fill { page_mask: 0x1f_ffff, ..fill(lin, lin) });
        }
        t.fill(Access::User, &fill(0x40_6000, 0));
        t.flush_page(0x3f_f000);
        assert_eq!(t.read(Access::User, 0x20_5000, 1), None);
        assert_eq!(t.read(Access::User, 0x40_6000, 1), Some(0));
    }

    #[test]
    fn flushing_a_context_spares_globals_and_others() {
        let mut t = Tlb::default();
        t.fill(Access::User, &fill(0x1000, 0));
        t.fill(Access::User, &Fill { global: true, ..fill(0x2000, 0) });
        t.switch(ContextKey { vpid: 5, ..Default::default() });
        t.fill(Access::User, &fill(0x3000, 0));
        t.flush_contexts(false, |k| k.vpid == 0);
        assert_eq!(t.read(Access::User, 0x3000, 1), Some(0));
        t.switch(ContextKey::default());
        assert_eq!(t.read(Access::User, 0x1000, 1), None);
        assert_eq!(t.read(Access::User, 0x2000, 1), Some(0));
    }

    #[test]
    fn flushing_contexts_with_globals_forgets_them_however_often() {
        let mut t = Tlb::default();
        let other = ContextKey { vpid: 5, ..Default::default() };
        t.switch(other);
        t.fill(Access::User, &fill(0x3000, 0));
        for _ in 0..3 * CONTEXTS / 2 {
            t.switch(ContextKey::default());
            t.fill(Access::User, &Fill { global: true, ..fill(0x1000, 0) });
            t.flush_contexts(true, |k| k.vpid == 0);
            assert_eq!(t.read(Access::User, 0x1000, 1), None);
        }
        t.fill(Access::User, &fill(0x1000, 0));
        t.switch(other);
        assert_eq!(t.read(Access::User, 0x1000, 1), None);
        t.fill(Access::User, &fill(0x3000, 0));
        t.switch(ContextKey::default());
        t.flush_contexts(true, |k| k.vpid == 0);
        t.switch(other);
        assert_eq!(t.read(Access::User, 0x3000, 1), Some(0));
    }

    #[test]
    fn revoked_pages_still_read() {
        let mut t = Tlb::default();
        t.fill(Access::User, &fill(0x1000, 0x9000));
        t.revoke_writes(0x9000);
        assert_eq!((t.read(Access::User, 0x1000, 1), t.write(Access::User, 0x1000, 1)), (Some(0x9000), None));
    }
}
