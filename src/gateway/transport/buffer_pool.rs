//! A pool of read buffers, held only while bytes move: an idle stream has none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// The size of each buffer, in bytes: four full TLS records, which then cost one system call.
pub(crate) const BUFFER_SIZE: usize = 64 * 1024;

/// The number of free buffers that each thread keeps. More are allocated when needed, and freed.
const IDLE_PER_THREAD: usize = 4;

thread_local! {
    static IDLE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer from the pool. Its content is left over from another stream: use only what has been
/// read into it.
pub(crate) struct PooledBuffer(Box<[u8]>);

impl PooledBuffer {
    /// Takes a free buffer, or allocates one.
    pub(crate) fn acquire() -> Self {
        let idle = IDLE.with_borrow_mut(Vec::pop);
        Self(idle.unwrap_or_else(|| vec![0; BUFFER_SIZE].into_boxed_slice()))
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        IDLE.with_borrow_mut(|idle| {
            if idle.len() < IDLE_PER_THREAD {
                idle.push(buffer);
            }
        });
    }
}

impl Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The bytes of one read.
pub(crate) struct Chunk {
    buffer: PooledBuffer,
    length: usize,
}

impl Chunk {
    /// The first `length` bytes of `buffer`.
    pub(crate) fn new(buffer: PooledBuffer, length: usize) -> Self {
        Self { buffer, length }
    }

    /// Appends `more`, which must fit into the buffer.
    pub(crate) fn append(&mut self, more: &[u8]) {
        let length = self.length + more.len();
        self.buffer[self.length..length].copy_from_slice(more);
        self.length = length;
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_keeps_few_idle_buffers() {
        let many: Vec<_> = (0..3 * IDLE_PER_THREAD).map(|_| PooledBuffer::acquire()).collect();
        assert!(many.iter().all(|buffer| buffer.len() == BUFFER_SIZE));
        drop(many);
        assert_eq!(IDLE.with_borrow(Vec::len), IDLE_PER_THREAD);
        let one = PooledBuffer::acquire();
        assert_eq!(IDLE.with_borrow(Vec::len), IDLE_PER_THREAD - 1);
        drop(one);
        assert_eq!(IDLE.with_borrow(Vec::len), IDLE_PER_THREAD);
    }
}
