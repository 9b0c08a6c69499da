//! Starts the asynchronous runtime. Limits of the process that would make libraries panic are
//! checked first and reported as errors.

use std::env;
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

/// Tokio's environment variable for the number of worker threads.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

/// The number of threads besides the workers: log, ZooKeeper client, name lookups, reloads.
const OTHER_THREADS: usize = 6;

/// The fewest open files that a gateway without clients needs, with a margin.
const FILES_MIN: u64 = 64;

/// Starts the runtime.
///
/// # Errors
/// The environment variable is not a number, or limits allow too few threads or open files.
pub(crate) fn start() -> Result<Runtime> {
    let workers = workers(env::var_os(WORKERS).as_deref())?;
    check_files(getrlimit(Resource::Nofile).maximum)?;
    check_threads(workers)?;
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(workers).enable_all().build().context("cannot start the runtime")
}

/// Returns the number of workers: `given`, or one for each CPU.
fn workers(given: Option<&OsStr>) -> Result<usize> {
    let Some(given) = given else {
        return Ok(thread::available_parallelism().map_or(1, NonZeroUsize::get));
    };
    match given.to_str().and_then(|text| text.parse::<NonZeroUsize>().ok()) {
        Some(number) => Ok(number.get()),
        None => bail!("{WORKERS}={}: must be a number of at least 1", given.display()),
    }
}

fn check_files(limit: Option<u64>) -> Result<()> {
    match limit {
        Some(files) if files < FILES_MIN => bail!(
            "the limit of open files is {files}, and at least {FILES_MIN} are needed: raise it \
             (LimitNOFILE= of the unit, ulimit -n)"
        ),
        _ => Ok(()),
    }
}

/// Checks that the needed threads can be started, by starting them all and ending them again.
fn check_threads(workers: usize) -> Result<()> {
    let gate = Mutex::new(());
    let needed = workers.saturating_add(OTHER_THREADS);
    thread::scope(|scope| {
        let _closed = gate.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..needed {
            let wait = || drop(gate.lock());
            thread::Builder::new().spawn_scoped(scope, wait).with_context(|| {
                format!(
                    "cannot start {needed} threads: raise the limit of processes (TasksMax= of the \
                     unit, ulimit -u), or set {WORKERS} to fewer than {workers}"
                )
            })?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_count_must_be_a_positive_number() {
        assert!(workers(None).expect("a default") > 0);
        assert_eq!(workers(Some("3".as_ref())).expect("a number"), 3);
        for text in ["0", "", "-1", "two", "99999999999999999999"] {
            let error = workers(Some(text.as_ref())).expect_err("an error").to_string();
            assert_eq!(
                error,
                format!("TOKIO_WORKER_THREADS={text}: must be a number of at least 1")
            );
        }
    }

    #[test]
    fn too_few_open_files_are_an_error() {
        assert!(check_files(None).is_ok() && check_files(Some(FILES_MIN)).is_ok());
        assert!(check_files(Some(FILES_MIN - 1)).is_err());
    }
}
