//! The heap, which is to shrink when many connections have gone.
//!
//! glibc keeps freed memory for the next time, and what lies between two blocks in use forever: most of
//! what many connections took would stay resident. musl's allocator gives it back by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Handle;
use tracing::debug;

/// Fewer connections than this are no peak: what they have left is not worth the work.
const PEAK: usize = 256;

/// Gives memory back to the system when the connections have fallen to a part of their peak.
#[derive(Clone, Default)]
pub(crate) struct HeapTrimmer(Arc<Counts>);

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    /// The most that were open since memory was given back.
    peak: AtomicUsize,
}

/// An open connection, for as long as it exists.
pub(crate) struct Open(HeapTrimmer);

impl HeapTrimmer {
    /// Counts one more connection.
    pub(crate) fn open(&self) -> Open {
        let open = self.0.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.peak.fetch_max(open, Ordering::Relaxed);
        Open(self.clone())
    }

    /// Counts one connection less. Returns whether they have fallen below an eighth of their peak,
    /// once for each such fall.
    fn close(&self) -> bool {
        let open = self.0.open.fetch_sub(1, Ordering::Relaxed) - 1;
        let peak = self.0.peak.load(Ordering::Relaxed);
        let fallen = peak >= PEAK && open < peak / 8;
        fallen
            && self
                .0
                .peak
                .compare_exchange(peak, open, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // It takes milliseconds, and locks that allocations in other threads wait for only briefly.
        if self.0.close()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn_blocking(trim);
        }
    }
}

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no library offers malloc_trim(3) as a safe call")]
fn trim() {
    // SAFETY: malloc_trim has no precondition and may be called in any thread (malloc_trim(3)).
    let released = unsafe { libc::malloc_trim(0) } == 1;
    debug!(released, "heap trimmed");
}

#[cfg(not(target_env = "gnu"))]
fn trim() {
    debug!(released = false, "heap not trimmed");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fall_below_an_eighth_of_a_peak_is_reported_once() {
        let trimmer = HeapTrimmer::default();
        let peaks = |count: usize| {
            let opened: Vec<_> = (0..count).map(|_| trimmer.open()).collect();
            let falls = opened.iter().filter(|_| trimmer.close()).count();
            // Closed already.
            opened.into_iter().for_each(std::mem::forget);
            falls
        };
        assert_eq!(peaks(PEAK - 1), 0, "no peak");
        assert_eq!(peaks(PEAK), 1);
        assert_eq!(peaks(PEAK), 1, "another peak");
        assert_eq!(peaks(100 * PEAK), 3, "one after the other");
    }
}
