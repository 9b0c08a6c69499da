//! The idle and total timeouts of a stream, if they are configured.
//!
//! The idle timeout compares the number of relayed bytes from time to time, so that relaying costs
//! nothing more. A stream without limits has no timer.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::sleep;

use super::context::RelayContext;
use super::end_reason::EndReason;

/// Comparisons within one idle timeout: an idle stream ends at most this part of the timeout late.
const CHECKS: u32 = 16;

/// Completes when the stream must end; `None` without a limit.
pub(super) fn stream_timeout<'a>(
    cx: &'a RelayContext<'_>,
) -> Option<Pin<Box<dyn Future<Output = EndReason> + Send + 'a>>> {
    let (idle, total) = (cx.limits.stream_idle, cx.limits.stream_total);
    if idle.is_none() && total.is_none() {
        return None;
    }
    Some(Box::pin(async move {
        tokio::select! {
            biased;
            () = wait_idle(cx, idle) => EndReason::Idle,
            () = wait_total(cx, total) => EndReason::TooLong,
        }
    }))
}

async fn wait_idle(cx: &RelayContext<'_>, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let mut last_bytes = 0;
    let mut unchanged = 0;
    while unchanged < CHECKS {
        sleep(idle / CHECKS).await;
        let bytes = cx.bytes();
        unchanged = if bytes == last_bytes { unchanged + 1 } else { 0 };
        last_bytes = bytes;
    }
}

async fn wait_total(cx: &RelayContext<'_>, total: Option<Duration>) {
    match total {
        Some(total) => sleep(total.saturating_sub(cx.began.elapsed())).await,
        None => std::future::pending().await,
    }
}
