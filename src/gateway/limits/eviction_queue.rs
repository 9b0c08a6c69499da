//! A queue of connections that may be closed to make room for a new one, oldest first.
//!
//! If a limit refused the newest connection, clients that connect first and send nothing could use
//! it up. OpenSSH's `MaxStartups` answers the same attack by dropping connections that have not
//! authenticated yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The entries, by the order in which they came. Cheap to clone: all clones are one queue.
pub(crate) struct EvictionQueue<T>(Arc<Mutex<Entries<T>>>);

struct Entries<T> {
    next: u64,
    /// `None` for an entry whose value is not known yet; it is never evicted.
    values: BTreeMap<u64, Option<T>>,
}

/// One connection's entry; dropping it removes it from the queue.
pub(crate) struct Entry<T> {
    queue: EvictionQueue<T>,
    number: u64,
}

impl<T> Default for EvictionQueue<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Entries { next: 0, values: BTreeMap::new() })))
    }
}

impl<T> Clone for EvictionQueue<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> EvictionQueue<T> {
    /// Adds an entry that cannot be evicted before [`Self::fill`] gives it its value: the handle of
    /// a task exists only after the task, which owns the entry, has been spawned.
    pub(crate) fn reserve(&self) -> Entry<T> {
        self.push(None)
    }

    /// Adds an entry.
    pub(crate) fn insert(&self, value: T) -> Entry<T> {
        self.push(Some(value))
    }

    /// Sets the value of the entry `number`, unless that has left already.
    pub(crate) fn fill(&self, number: u64, value: T) {
        if let Some(slot) = self.lock().values.get_mut(&number) {
            *slot = Some(value);
        }
    }

    /// Removes the oldest entry of those that are `eligible` and returns its value. The caller
    /// closes the connection.
    pub(crate) fn evict(&self, eligible: impl Fn(&T) -> bool) -> Option<T> {
        let mut entries = self.lock();
        let oldest = |(_, value): &(&u64, &Option<T>)| value.as_ref().is_some_and(&eligible);
        let number = entries.values.iter().find(oldest).map(|(number, _)| *number)?;
        entries.values.remove(&number)?
    }

    /// The number of entries that are `counted`.
    pub(crate) fn count(&self, counted: impl Fn(&T) -> bool) -> usize {
        self.lock().values.values().flatten().filter(|value| counted(value)).count()
    }

    /// The number of all entries.
    pub(crate) fn len(&self) -> usize {
        self.lock().values.len()
    }

    fn push(&self, value: Option<T>) -> Entry<T> {
        let mut entries = self.lock();
        let number = entries.next;
        entries.next += 1;
        entries.values.insert(number, value);
        Entry { queue: self.clone(), number }
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        // The map is whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Entry<T> {
    /// The number to [`EvictionQueue::fill`].
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Changes the value, unless the entry has none or has left.
    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        if let Some(Some(value)) = self.queue.lock().values.get_mut(&self.number) {
            change(value);
        }
    }

    /// Removes the entry: from here on the connection cannot be evicted. Returns whether it was
    /// still there; if not, the connection has been evicted.
    pub(crate) fn leave(self) -> bool {
        self.remove()
    }

    fn remove(&self) -> bool {
        self.queue.lock().values.remove(&self.number).is_some()
    }
}

impl<T> Drop for Entry<T> {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_eligible_entry_is_evicted() {
        let queue = EvictionQueue::default();
        let entries = [1, 2, 3, 4].map(|value| queue.insert(value));
        assert_eq!(queue.evict(|value| value % 2 == 0), Some(2));
        assert_eq!(queue.evict(|_| true), Some(1));
        assert_eq!(queue.count(|value| *value > 3), 1);
        assert_eq!(queue.len(), 2);
        let left = entries.map(Entry::leave);
        assert_eq!(left, [false, false, true, true], "an evicted one can tell");
        assert_eq!(queue.evict(|_| true), None);
    }

    #[test]
    fn entry_without_a_value_is_not_evicted() {
        let queue = EvictionQueue::default();
        let (first, second) = (queue.reserve(), queue.insert("second"));
        assert_eq!(queue.evict(|_| true), Some("second"));
        assert_eq!(queue.evict(|_| true), None);
        first.update(|_| panic!("it has no value"));
        queue.fill(first.number(), "1st");
        first.update(|value| *value = "first");
        assert_eq!(queue.evict(|_| true), Some("first"));
        assert!(!first.leave() && !second.leave());
    }

    #[test]
    fn dropping_an_entry_removes_it() {
        let queue = EvictionQueue::default();
        let (dropped, kept) = (queue.reserve(), queue.insert(1));
        let number = dropped.number();
        drop(dropped);
        queue.fill(number, 0);
        assert_eq!(queue.len(), 1, "a late value brings nothing back");
        assert!(kept.leave());
        assert_eq!(queue.len(), 0);
    }
}
