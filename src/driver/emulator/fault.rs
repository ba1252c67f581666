//! What a kernel did wrong, and where.

use super::abi::Index;

/// The first thing that a kernel did wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// The block.
    pub block: Index,
    /// The thread, where it is known.
    pub thread: Option<Index>,
    /// What it did, and at which place of the source, if known.
    pub what: String,
    /// The address that it should not have touched.
    pub address: Option<u64>,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "block {}", self.block)?;
        if let Some(thread) = self.thread {
            write!(f, ", thread {thread}")?;
        }
        write!(f, ": {}", self.what)
    }
}
