//! The pages that say which test shows what name tests that exist.

use std::fs;
use std::path::PathBuf;

/// The pages, and how many names are in each at least, so that none is read past.
const PAGES: [(&str, usize); 3] =
    [("threat-model.md", 40), ("reliability.md", 20), ("kubernetes.md", 5)];

/// What stands in `page` between backquotes and has a `::` in it.
fn named(page: &str) -> Vec<&str> {
    page.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).collect()
}

/// Whether there is a test of this name, such as `faults::a_test`, `interop::web::a_test` or
/// `src::gateway::finger::a_test`.
fn exists(name: &str) -> bool {
    let (path, test) = name.rsplit_once("::").expect("a path");
    let path = path.replace("::", "/");
    let directory = match path.split_once('/') {
        Some(("src", _)) => "",
        Some(("interop", _)) => "tests",
        _ => "tests/it",
    };
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(directory).join(path);
    let Ok(source) = fs::read_to_string(file.with_extension("rs")) else { return false };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let head = format!("fn {test}(");
    // Its attribute stands right above it, some with arguments.
    let is_attribute = |line: &str| line.starts_with("#[") && line.contains("test");
    lines.windows(2).any(|pair| is_attribute(pair[0]) && pair[1].contains(&head))
}

#[test]
fn named_tests_exist() {
    for (page, least) in PAGES {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(page);
        let text = fs::read_to_string(path).expect(page);
        let names = named(&text);
        assert!(names.len() >= least, "{} names in {page}", names.len());
        let missing: Vec<_> = names.iter().filter(|name| !exists(name)).collect();
        assert!(missing.is_empty(), "{page} names tests that are not there: {missing:?}");
    }
    assert!(!exists("faults::no_such_test") && !exists("nowhere::named_tests_exist"));
}
