//! The cache of decoded basic blocks, by physical address; a front of it by linear address.

use super::op::Op;
use std::collections::HashMap;

/// Operations of a block at most; also bounds how long an event waits.
pub const MAX_OPS: usize = 64;
/// The arena is emptied when it holds this many operations.
const ARENA_OPS: usize = 1 << 20;
const FRONT: usize = 4096;
pub const NO_PAGE: u32 = u32::MAX;

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

#[derive(Clone, Copy)]
struct Front {
    lin: u64,
    tag: u64,
    block: u32,
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

const NOWHERE: Front = Front { lin: 0, tag: u64::MAX, block: 0 };

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
    pub fn find(&self, lin: u64, tag: u64) -> Option<u32> {
        let f = &self.front[slot(lin)];
        (f.lin == lin && f.tag == tag).then_some(f.block)
    }

    pub fn remember(&mut self, lin: u64, tag: u64, block: u32) {
        self.front[slot(lin)] = Front { lin, tag, block };
    }

    #[inline(always)]
    pub fn block(&self, index: u32) -> &Block {
        &self.blocks[index as usize]
    }

    #[inline(always)]
    pub fn ops(&self, b: &Block) -> &[Op] {
        &self.ops[b.first as usize..b.first as usize + usize::from(b.ops)]
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
        index
    }
}
