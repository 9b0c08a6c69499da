//! Which errors of ZooKeeper are worth a retry, and how long to wait before it.

use std::time::Duration;

use tracing::debug;
use zookeeper_client::Error;

/// Wait after ZooKeeper has refused a request because it is overloaded.
const THROTTLED_WAIT: Duration = Duration::from_secs(1);

/// Performs `operation`, again after errors that [`wait_to_retry`] regards as temporary.
pub(super) async fn retry<T, Operation>(
    mut operation: impl FnMut() -> Operation,
) -> Result<T, Error>
where
    Operation: Future<Output = Result<T, Error>>,
{
    loop {
        match operation().await {
            Err(error) if wait_to_retry(&error).await => {}
            result => return result,
        }
    }
}

/// Whether a request that failed with `error` can be sent again in the same session. Waits first if
/// the server asks for that.
///
/// A loop over this cannot spin: without a connection, the client holds the next request back until
/// there is one.
pub(super) async fn wait_to_retry(error: &Error) -> bool {
    if is_connection_loss(error) {
        debug!(%error, "repeating a request to ZooKeeper");
        return true;
    }
    if *error == Error::Throttled {
        debug!("repeating a request to an overloaded ZooKeeper after a pause");
        tokio::time::sleep(equal_jitter(THROTTLED_WAIT)).await;
        return true;
    }
    false
}

/// Whether `error` means that the session has ended or is unusable. Other errors concern one
/// request.
pub(super) fn ends_session(error: &Error) -> bool {
    matches!(
        error,
        Error::AuthFailed
            | Error::ClientClosed
            | Error::NoHosts
            | Error::RuntimeInconsistent
            | Error::SessionExpired
            | Error::SessionMoved
            | Error::UnexpectedError(_)
            | Error::UnmarshalError { .. }
    )
}

/// Whether the connection was lost while the response was outstanding. The client reports I/O
/// errors and its own timeouts as `Custom`.
pub(super) fn is_connection_loss(error: &Error) -> bool {
    matches!(error, Error::ConnectionLoss | Error::Custom(_) | Error::Timeout)
}

/// A random duration between 0 and `max`.
pub(super) fn full_jitter(max: Duration) -> Duration {
    max.mul_f64(fastrand::f64())
}

/// A random duration between `min` and twice `min`.
pub(super) fn equal_jitter(min: Duration) -> Duration {
    min.mul_f64(1.0 + fastrand::f64())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn temporary_errors_are_retried_and_others_returned() {
        let results = RefCell::new(vec![
            Err(Error::NoAuth),
            Err(Error::Throttled),
            Err(Error::Timeout),
            Ok(1),
            Err(Error::ConnectionLoss),
        ]);
        let operation = || std::future::ready(results.borrow_mut().pop().expect("a result"));
        assert_eq!(retry(operation).await, Ok(1));
        let start = tokio::time::Instant::now();
        assert_eq!(retry(operation).await, Err(Error::NoAuth));
        assert!(start.elapsed() >= THROTTLED_WAIT, "an overloaded server is left alone");
    }

    #[test]
    fn jitter_spreads_clients_over_the_whole_range() {
        let range = Duration::from_secs(4);
        let waits: Vec<_> = (0..1000).map(|_| full_jitter(range)).collect();
        assert!(waits.iter().all(|wait| *wait < range));
        let waits: Vec<_> = waits.into_iter().map(|wait| range + wait).collect();
        let others: Vec<_> = (0..1000).map(|_| equal_jitter(range)).collect();
        for second in 4..8 {
            let second = Duration::from_secs(second)..Duration::from_secs(second + 1);
            for waits in [&waits, &others] {
                // 250 are expected; 7 standard deviations are 96.
                let count = waits.iter().filter(|wait| second.contains(*wait)).count();
                assert!((150..350).contains(&count), "{count} in {second:?}");
            }
        }
    }
}
