//! Returns freed heap memory to the system after many connections have closed.
//!
//! glibc keeps freed memory for later allocations, and never returns pages between two blocks in
//! use: most memory of many connections would stay resident. musl's allocator returns it by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Handle;
use tracing::debug;

/// The fewest connections that count as a peak: less memory is not worth the work.
const PEAK: usize = 256;

/// Trims the heap when the number of connections has fallen to a fraction of its peak.
#[derive(Clone, Default)]
pub(crate) struct HeapTrimmer(Arc<Counts>);

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    /// The most connections that were open since the heap was trimmed.
    peak: AtomicUsize,
}

/// Counts one open connection until it is dropped.
pub(crate) struct OpenConnection(HeapTrimmer);

impl HeapTrimmer {
    /// Counts one more connection.
    pub(crate) fn open(&self) -> OpenConnection {
        let open = self.0.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.peak.fetch_max(open, Ordering::Relaxed);
        OpenConnection(self.clone())
    }

    /// Counts one connection less. Returns true once when the number falls below an eighth of its
    /// peak.
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

impl Drop for OpenConnection {
    fn drop(&mut self) {
        // On another thread, because it takes milliseconds. Allocations wait for its locks only
        // briefly.
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
    fn fall_below_an_eighth_of_the_peak_is_reported_once() {
        let trimmer = HeapTrimmer::default();
        let peaks = |count: usize| {
            let opened: Vec<_> = (0..count).map(|_| trimmer.open()).collect();
            let falls = opened.iter().filter(|_| trimmer.close()).count();
            // They are closed already.
            opened.into_iter().for_each(std::mem::forget);
            falls
        };
        assert_eq!(peaks(PEAK - 1), 0, "not a peak");
        assert_eq!(peaks(PEAK), 1);
        assert_eq!(peaks(PEAK), 1, "another peak");
        assert_eq!(peaks(100 * PEAK), 3, "each an eighth of the one before");
    }
}
