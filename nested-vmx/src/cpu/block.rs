//! The cache of decoded basic blocks, by physical address; a front of it by linear address.

use super::op::Op;
use std::collections::HashMap;

/// Operations of a block at most; also bounds how long an event waits.
pub const MAX_OPS: usize = 64;
/// The arena is emptied when it holds this many operations.
const ARENA_OPS: usize = 1 << 20;
const FRONT: usize = 4096;
pub const NO_PAGE: u32 = u32::MAX;
/// [`BlockKey::second_page`] of the last block found at an address whose first instruction crosses into another page.
pub const CROSSES: u32 = u32::MAX - 1;

#[derive(Clone, Copy)]
pub struct Block {
    pub first: u32,
    /// Instructions; a block that ends without a branch has one more operation, which advances RIP.
    pub count: u16,
    pub ops: u16,
    /// Bytes of code.
    pub bytes: u16,
    /// RAM pages of its bytes and their generations when they were decoded; the second is [`NO_PAGE`] mostly.
    pub pages: [u32; 2],
    pub generations: [u32; 2],
}

/// What decoded bytes depend on besides themselves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// RAM offset of the first byte.
    pub offset: u64,
    /// The RAM page behind it, when an instruction crosses into it; else [`NO_PAGE`].
    pub second_page: u32,
    pub mode: u8,
}

/// What is needed to run a block, found by linear address.
#[derive(Clone, Copy)]
pub struct Front {
    lin: u64,
    tag: u64,
    pub first: u32,
    pub page: u32,
    pub generation: u32,
    pub ops: u16,
    pub count: u16,
    pub bytes: u16,
}

pub struct BlockCache {
    ops: Vec<Op>,
    blocks: Vec<Block>,
    by_address: HashMap<BlockKey, u32>,
    front: Box<[Front; FRONT]>,
}

#[inline(always)]
fn slot(lin: u64) -> usize {
    (lin ^ lin >> 12) as usize & (FRONT - 1)
}

const NOWHERE: Front = Front { lin: 0, tag: u64::MAX, first: 0, page: 0, generation: 0, ops: 0, count: 0, bytes: 0 };

impl Default for BlockCache {
    fn default() -> Self {
        Self {
            ops: Vec::new(),
            blocks: Vec::new(),
            by_address: HashMap::new(),
            front: vec![NOWHERE; FRONT].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!()),
        }
    }
}

impl BlockCache {
    /// By linear address; `tag` is all that the translation and the decoding depended on.
    #[inline(always)]
    pub fn find(&self, lin: u64, tag: u64) -> Option<&Front> {
        let f = &self.front[slot(lin)];
        (f.lin == lin && f.tag == tag).then_some(f)
    }

    /// Puts a block in front, unless it crosses into a second page: [`Front`] follows one generation.
    pub fn remember(&mut self, lin: u64, tag: u64, block: u32) -> Front {
        let b = &self.blocks[block as usize];
        let front = Front {
            lin,
            tag,
            first: b.first,
            page: b.pages[0],
            generation: b.generations[0],
            ops: b.ops,
            count: b.count,
            bytes: b.bytes,
        };
        if b.pages[1] == NO_PAGE {
            self.front[slot(lin)] = front;
        }
        front
    }

    #[inline(always)]
    pub fn block(&self, index: u32) -> &Block {
        &self.blocks[index as usize]
    }

    #[inline(always)]
    pub fn ops(&self, first: u32, ops: u16) -> &[Op] {
        &self.ops[first as usize..first as usize + usize::from(ops)]
    }

    pub fn get(&self, key: &BlockKey) -> Option<u32> {
        self.by_address.get(key).copied()
    }

    pub fn insert(&mut self, key: BlockKey, ops: &[Op], mut block: Block) -> u32 {
        if self.ops.len() + ops.len() > ARENA_OPS {
            self.ops.clear();
            self.blocks.clear();
            self.by_address.clear();
            self.front.fill(NOWHERE);
        }
        block.first = self.ops.len() as u32;
        self.ops.extend_from_slice(ops);
        let index = self.blocks.len() as u32;
        self.blocks.push(block);
        self.by_address.insert(key, index);
        if key.second_page != NO_PAGE {
            self.by_address.insert(BlockKey { second_page: CROSSES, ..key }, index);
        }
        index
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }
}
