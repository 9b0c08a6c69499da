//! Paths in this checkout: its own files, and what `tests/run` installs below `target/`.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Reads a file, by its path from the top of the repository.
pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = top().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the path of something that `tests/run` installs.
pub(crate) fn installed(path: &str) -> PathBuf {
    top().join("target").join(path)
}
