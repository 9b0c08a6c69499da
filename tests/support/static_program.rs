//! The program linked statically, for containers and empty roots.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::checkout::top;
use super::gateway::BINARY;

/// Links the static program from the same compiled crates as the tests' own binary, which takes a
/// second.
pub(crate) fn static_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // target/PROFILE
        let directory = Path::new(BINARY).parent().expect("a directory");
        let target = directory.parent().expect("target");
        let profile = directory.file_name().expect("a profile").to_string_lossy();
        let profile = if profile == "debug" { "dev" } else { &profile };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["rustc", "--locked", "--example", "static", "--profile", profile]);
        cargo.arg("--target-dir").arg(target).current_dir(top());
        let Output { status, stderr, .. } =
            cargo.args(["--", "-C", "target-feature=+crt-static"]).output().expect("cargo");
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        directory.join("examples/static")
    })
}
