//! How long a stream may be silent, and how long it may run at all, where that is limited.
//!
//! It looks at the count of what has been handed on, now and then, so that handing on costs nothing
//! more, by whichever way. Where nothing is limited there is no timer.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::sleep;

use super::End;
use crate::config::Limits;
use crate::gateway::session::stream_table::Listed;

/// Looks for one idle time: a silence is found so much later at most.
const LOOKS: u32 = 16;

/// Ends when a stream's time is over, and says why.
pub(crate) type Allowance<'a> = Pin<Box<dyn Future<Output = End> + Send + 'a>>;

/// What `limits` allow the stream `listed`; `None` if all. The first byte has a deadline of its
/// own, so silence counts from there.
pub(crate) fn of<'a>(listed: &'a Listed, limits: &Limits) -> Option<Allowance<'a>> {
    let (idle, total) = (limits.stream_idle, limits.stream_total);
    (idle.is_some() || total.is_some()).then(|| {
        let over: Allowance<'_> = Box::pin(async move {
            tokio::select! {
                biased;
                () = silence(listed, idle) => End::Idle,
                () = end(listed, total) => End::Overlong,
            }
        });
        over
    })
}

async fn silence(listed: &Listed, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let (mut seen, mut looks) = (0, 0);
    while looks < LOOKS {
        sleep(idle / LOOKS).await;
        let bytes = listed.bytes();
        looks = if bytes == seen && bytes > 0 { looks + 1 } else { 0 };
        seen = bytes;
    }
}

async fn end(listed: &Listed, total: Option<Duration>) {
    match total {
        Some(total) => sleep(total.saturating_sub(listed.age())).await,
        None => std::future::pending().await,
    }
}
