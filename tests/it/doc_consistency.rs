//! Comparison of the pages with the source: log messages, replies, folders, tests, versions.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::checkout::{read, top};

/// Returns all files below `directory`.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("a file").path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Returns all source files of the program, below `src`.
fn sources() -> Vec<PathBuf> {
    let mut found = files_below(&top().join("src"));
    found.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    assert!(found.len() > 50, "{found:?}");
    found
}

/// Returns the text of each string literal: escapes resolved, continued lines joined.
fn literals(code: &str) -> Vec<String> {
    let mut literals = Vec::new();
    let mut characters = code.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '"' {
            continue;
        }
        let mut text = String::new();
        loop {
            match characters.next() {
                None | Some('"') => break,
                Some('\\') => match characters.next() {
                    Some('\n') => {
                        while characters.next_if(|next| next.is_whitespace()).is_some() {}
                    }
                    Some(escaped) => text.push(escaped),
                    None => break,
                },
                Some(other) => text.push(other),
            }
        }
        literals.push(text);
    }
    literals
}

/// Returns the text from the start of `code` to the bracket that closes it.
fn arguments(code: &str) -> &str {
    let (mut depth, mut quoted, mut escaped) = (1, false, false);
    for (at, character) in code.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &code[..at];
        }
    }
    code
}

/// Returns the words by which an operator would search for a message: its first words, up to a
/// value or an explanation.
fn head(message: &str) -> &str {
    let pieces = message.split(['{', '}', ':', ';', '(', ',']).map(str::trim);
    pieces.into_iter().find(|piece| piece.len() >= 8 && piece.contains(' ')).unwrap_or_default()
}

/// Returns every warning and error that the program logs.
fn messages() -> BTreeSet<String> {
    let mut messages = BTreeSet::new();
    for path in sources() {
        let source = fs::read_to_string(&path).expect("a source");
        let source = source.split("#[cfg(test)]\nmod tests").next().expect("a first piece");
        for call in ["warn!(", "error!(", "warnings.push("] {
            for (at, _) in source.match_indices(call) {
                let literals = literals(arguments(&source[at + call.len()..]));
                // A call without a literal passes on a message of another place.
                messages.extend(literals.iter().map(|text| head(text).to_owned()));
            }
        }
    }
    messages.remove("");
    messages
}

#[test]
fn operating_page_lists_each_warning() {
    let messages = messages();
    assert!(messages.len() > 30, "{messages:#?}");
    let page = read("docs/operating.md");
    let missing: Vec<_> = messages.iter().filter(|message| !page.contains(&***message)).collect();
    assert!(missing.is_empty(), "docs/operating.md lacks {missing:#?}");
}

/// Returns the metrics that `text` names, without the suffixes of counters and histograms.
fn metric_names(text: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for (at, prefix) in text.match_indices("zuul_fingergw_") {
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let rest = &text[at + prefix.len()..];
        let length = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        // As in `zuul_fingergw_*`.
        if length == 0 {
            continue;
        }
        let name = &text[at..at + prefix.len() + length];
        let mut suffixes = ["_total", "_bucket", "_count", "_sum"].into_iter();
        names.insert(suffixes.find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name));
    }
    names
}

/// Includes the alerts and the dashboard. The changelog may name metrics of earlier versions.
#[test]
fn documented_metrics_exist() {
    let mut defined = read("src/telemetry/metrics/definitions.rs");
    for path in sources().iter().filter(|path| path.starts_with(top().join("src/admin"))) {
        defined += &fs::read_to_string(path).expect("a source");
    }
    let defined = metric_names(&defined);
    assert!(defined.len() > 30, "{defined:?}");

    let mut count = 0;
    for path in files_below(&top().join("docs")).into_iter().chain(files_below(&top().join("etc")))
    {
        let is_page = path.extension().is_some_and(|extension| extension == "md");
        let is_in_etc = path.starts_with(top().join("etc"));
        if path.ends_with("CHANGELOG.md") || !(is_page || is_in_etc) {
            continue;
        }
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for name in metric_names(&text) {
            count += 1;
            assert!(defined.contains(name), "{}: there is no metric {name}", path.display());
        }
    }
    assert!(count > 50, "{count} names");
}

/// The list of replies in `zuul-fingergw(8)` is the reference; the page must contain all of it.
#[test]
fn operating_page_lists_each_reply() {
    let manual = read("docs/zuul-fingergw.8");
    let (_, replies) = manual.split_once(".SH REPLIES").expect("the section");
    let replies = replies.split(".SH ").next().expect("its text").replace("\\(aq", "'");
    let (page, mut count) = (read("docs/operating.md"), 0);
    for reply in replies.split(".TP\n").filter_map(|item| item.lines().next()?.strip_prefix(".B "))
    {
        let words = reply.trim_start_matches("Internal streaming error: ");
        assert!(page.contains(&format!("| `{words}` |")), "docs/operating.md lacks {words:?}");
        count += 1;
    }
    assert!(count >= 10, "{count} answers");
}

/// Only folders: each file describes itself.
#[test]
fn architecture_page_names_each_folder_of_the_source() {
    let page = read("docs/architecture.md");
    // `src/gateway/relay`, but no deeper folder.
    let folder = |path: &PathBuf| {
        let folder = path.parent().expect("a folder").strip_prefix(top()).expect("below the top");
        folder.components().take(3).collect::<PathBuf>()
    };
    let mut folders: BTreeSet<_> = sources().iter().map(folder).collect();
    folders.remove(Path::new("src"));
    assert!(folders.len() > 10, "{folders:?}");
    let missing: Vec<_> = folders.iter().filter(|name| !names_folder(&page, name)).collect();
    assert!(missing.is_empty(), "docs/architecture.md names no {missing:?}");

    for word in page.split(|c: char| c.is_whitespace() || "`(),;".contains(c)) {
        let path = word.trim_end_matches(['.', ':']);
        if path.starts_with("src/") && !path.contains('*') {
            assert!(top().join(path).exists(), "docs/architecture.md: there is no {path}");
        }
    }
}

/// Whether `page` names this folder: by its path, or as `NAME/` in a drawing of the tree.
fn names_folder(page: &str, folder: &Path) -> bool {
    let path = folder.to_str().expect("UTF-8");
    let in_tree = format!("{}/", folder.file_name().expect("a name").to_str().expect("UTF-8"));
    page.split(|c: char| c.is_whitespace() || "`(),;".contains(c))
        .any(|word| word == in_tree || word.trim_end_matches(['/', '.', ':']) == path)
}

/// Each release has a section, so the top section is either unreleased or the current version.
#[test]
fn changelog_begins_with_this_version() {
    let page = read("docs/CHANGELOG.md");
    let top = page.lines().find_map(|line| line.strip_prefix("## ")).expect("a section");
    let version = env!("CARGO_PKG_VERSION");
    let date = top.strip_prefix(&format!("{version} - "));
    let is_date = |date: &str| {
        let shape: String =
            date.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        shape == "0000-00-00"
    };
    assert!(
        top == "Unreleased" || date.is_some_and(is_date),
        "docs/CHANGELOG.md: {top:?} is neither Unreleased nor \"{version} - YYYY-MM-DD\""
    );
    let kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"];
    for kind in page.lines().filter_map(|line| line.strip_prefix("### ")) {
        assert!(kinds.contains(&kind), "docs/CHANGELOG.md: {kind} is none of {kinds:?}");
    }
}

/// Covers the crates of all features. Cargo downloads crates of features that are not built here,
/// unless `tests/run` has done so.
#[test]
fn no_dependency_needs_a_newer_compiler() {
    // 1.88 is 1.88.0.
    let version = |text: &str| -> [u32; 3] {
        let mut parts = text.split('.').map(|part| part.parse().expect("a number"));
        std::array::from_fn(|_| parts.next().unwrap_or_default())
    };
    let printed = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version", "1", "--all-features"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(top())
        .output()
        .expect("cargo");
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&printed.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() > 100, "{} packages", packages.len());
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    for package in packages {
        let Some(wanted) = package["rust_version"].as_str() else { continue };
        let (name, own) = (&package["name"], &package["version"]);
        assert!(version(wanted) <= ours, "{name} {own} wants Rust {wanted}");
    }
}

/// CI must not have a list of its own.
#[test]
fn ci_runs_the_one_list_of_checks() {
    let text = std::process::Command::new(top().join(".ci/check")).arg("--list").output();
    let text = String::from_utf8(text.expect(".ci/check").stdout).expect("UTF-8");
    let names: Vec<_> = text.lines().collect();
    assert!(names.len() >= 6 && names.last() == Some(&"tests"), "{names:?}");
    let run = read(".ci/run");
    let mut lines = run.lines().filter(|line| !line.starts_with('#'));
    assert!(run.contains("\n.ci/check\n") && !lines.any(|line| line.contains("cargo")), "{run}");
    let unknown = std::process::Command::new(top().join(".ci/check")).arg("nothing").output();
    assert_eq!(unknown.expect(".ci/check").status.code(), Some(2));
}

/// The pages that refer to tests, with the least number of tests that each must name, so that a
/// change of format is noticed.
const PROVEN: [(&str, usize); 3] =
    [("threat-model.md", 40), ("reliability.md", 20), ("kubernetes.md", 5)];

/// Returns everything in `page` between backquotes that contains `::`.
fn named(page: &str) -> Vec<&str> {
    page.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).collect()
}

/// Whether a test of this name exists, such as `component_failures::TEST`, `interop::web::TEST` or
/// `src::gateway::protocol::TEST`.
fn exists(name: &str) -> bool {
    let (path, test) = name.rsplit_once("::").expect("a path");
    let path = path.replace("::", "/");
    let directory = match path.split_once('/') {
        Some(("src", _)) => "",
        Some(("docs" | "interop" | "system", _)) => "tests",
        _ => "tests/it",
    };
    let file = top().join(directory).join(path);
    let source = fs::read_to_string(file.with_extension("rs"));
    let Ok(source) = source.or_else(|_| fs::read_to_string(file.join("mod.rs"))) else {
        return false;
    };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let head = format!("fn {test}(");
    // The attribute is on the line above the function; some attributes have arguments.
    let is_attribute = |line: &str| line.starts_with("#[") && line.contains("test");
    lines.windows(2).any(|pair| is_attribute(pair[0]) && pair[1].contains(&head))
}

#[test]
fn named_tests_exist() {
    for (page, least) in PROVEN {
        let text = read(Path::new("docs").join(page));
        let names = named(&text);
        assert!(names.len() >= least, "{} names in {page}", names.len());
        let missing: Vec<_> = names.iter().filter(|name| !exists(name)).collect();
        assert!(missing.is_empty(), "{page} names tests that are not there: {missing:?}");
    }
    assert!(!exists("component_failures::no_such_test") && !exists("nowhere::named_tests_exist"));
}

#[test]
fn messages_are_found_in_source_text() {
    let code = r#"
        %zone, gateway = %format_args!("{hostname}:{port}"), (a)(b),
        "one \
         two: three {} \" four"
    ) rest"#;
    assert_eq!(literals(arguments(code)), ["{hostname}:{port}", "one two: three {} \" four"]);
    assert_eq!(head("one two three: four"), "one two three");
    assert_eq!(head("{path} not reloaded: {}"), "not reloaded");
    assert_eq!(head("{}"), "");
}
