//! Buffers that are lent while bytes move, so that a quiet stream holds none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// The length of each, in bytes: four full TLS records, which then cost one system call.
pub(crate) const LENGTH: usize = 64 * 1024;

/// Kept by each thread for whoever comes next. More are made when needed, and freed.
const KEPT: usize = 4;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer for as long as somebody holds it. What is in it before it is written to is left over
/// from another stream: hand on only what has been read into it.
pub(crate) struct Lent(Box<[u8]>);

impl Lent {
    /// Any buffer that is free.
    pub(crate) fn take() -> Self {
        let free = FREE.with_borrow_mut(Vec::pop);
        Self(free.unwrap_or_else(|| vec![0; LENGTH].into_boxed_slice()))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        FREE.with_borrow_mut(|free| {
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// What has been read at once.
pub(crate) struct Piece {
    lent: Lent,
    length: usize,
}

impl Piece {
    /// The first `length` bytes of `lent`.
    pub(crate) fn new(lent: Lent, length: usize) -> Self {
        Self { lent, length }
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.lent[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_are_kept() {
        let many: Vec<_> = (0..3 * KEPT).map(|_| Lent::take()).collect();
        assert!(many.iter().all(|lent| lent.len() == LENGTH));
        drop(many);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
        let one = Lent::take();
        assert_eq!(FREE.with_borrow(Vec::len), KEPT - 1);
        drop(one);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
    }
}
