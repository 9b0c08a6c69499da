//! Checks the direction of imports in `src`: a folder imports only from folders on lower levels,
//! and the files of one folder have no import cycles. docs/architecture.md explains the levels.
//!
//! The test reads paths that begin with `crate::`, `super::` or `self::` in the source text, without
//! comments, string literals and modules that only tests or fuzzing compile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::support::checkout::top;

/// The folders of `src`, from the top level to the bottom. Folders on one level do not import each other.
const LEVELS: [&[&str]; 9] = [
    &["cli"],
    &["daemon"],
    &["control", "admin", "demo"],
    &["gateway"],
    &["registry"],
    &["telemetry", "tls"],
    &["config"],
    &["model"],
    &["os"],
];

/// The same for the folders and files of `src/gateway`, whose `mod.rs` is above all of them.
const GATEWAY_LEVELS: [&[&str]; 6] = [
    &["accept"],
    &["session"],
    // Shared by all sessions.
    &["context"],
    &["routing", "upstream", "relay"],
    &["health", "limits", "stream_table"],
    &["protocol", "transport"],
];

/// A module: the names that lead to it from the crate's root.
type Module = Vec<String>;

/// The modules of the program, each with the paths that its file names.
fn modules() -> BTreeMap<Module, BTreeSet<Module>> {
    let mut texts = BTreeMap::new();
    read_folder(&top().join("src"), &mut Vec::new(), &mut texts);
    // Modules that lie in files of their own but are compiled for tests only, such as `tests.rs`.
    let mut excluded = BTreeSet::new();
    for (module, text) in &texts {
        for name in modules_left_out(text) {
            excluded.insert([module.clone(), vec![name]].concat());
        }
    }
    texts.retain(|module, _| !excluded.iter().any(|prefix| module.starts_with(prefix)));
    let known: BTreeSet<Module> = texts.keys().cloned().collect();
    let mut modules = BTreeMap::new();
    for (module, text) in texts {
        let is_root = module.is_empty();
        let mut targets = BTreeSet::new();
        for path in paths(&without_test_modules(&text)) {
            targets.extend(module_of(&module, &path, &known));
        }
        targets.remove(&module);
        // The root declares the modules and re-exports for main.rs.
        if !is_root {
            modules.insert(module, targets);
        }
    }
    modules
}

/// Reads the source files below `folder`, which is the module `module`.
fn read_folder(folder: &Path, module: &mut Module, texts: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(folder).expect("a folder of src").flatten() {
        let path = entry.path();
        let name = path.file_stem().expect("a name").to_str().expect("UTF-8").to_owned();
        if path.is_dir() {
            module.push(name);
            read_folder(&path, module, texts);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "main" {
            let text = bare(&fs::read_to_string(&path).expect("a source file"));
            let module = match name.as_str() {
                "mod" | "lib" => module.clone(),
                _ => [module.clone(), vec![name]].concat(),
            };
            texts.insert(module, text);
        }
    }
}

/// Replaces comments by a blank and empties string literals, so that neither is read as code.
fn bare(source: &str) -> String {
    let characters: Vec<char> = source.chars().collect();
    let (mut text, mut at) = (String::new(), 0);
    while at < characters.len() {
        let next = characters.get(at + 1);
        match characters[at] {
            '/' if next == Some(&'/') => {
                while at < characters.len() && characters[at] != '\n' {
                    at += 1;
                }
                continue;
            }
            'r' if matches!(next, Some('"' | '#'))
                && !is_of_name(at.checked_sub(1), &characters) =>
            {
                let hashes = characters[at + 1..].iter().take_while(|c| **c == '#').count();
                if characters.get(at + 1 + hashes) == Some(&'"') {
                    let end: Vec<char> =
                        std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    at += 2 + hashes;
                    while at < characters.len() && !characters[at..].starts_with(&end) {
                        at += 1;
                    }
                    at += end.len();
                    text.push_str("\"\"");
                    continue;
                }
                text.push('r');
            }
            '"' => {
                at += 1;
                while at < characters.len() && characters[at] != '"' {
                    at += if characters[at] == '\\' { 2 } else { 1 };
                }
                text.push_str("\"\"");
            }
            // A character literal may be a quote or a brace; a lifetime has no second quote.
            '\'' if next == Some(&'\\') || characters.get(at + 2) == Some(&'\'') => {
                at += if next == Some(&'\\') { 3 } else { 2 };
                while at < characters.len() && characters[at] != '\'' {
                    at += 1;
                }
                text.push_str("' '");
            }
            other => text.push(other),
        }
        at += 1;
    }
    text
}

fn is_of_name(at: Option<usize>, characters: &[char]) -> bool {
    at.is_some_and(|at| characters[at].is_alphanumeric() || characters[at] == '_')
}

/// Attributes of code that is not compiled into the program.
const LEFT_OUT: [&str; 4] =
    ["#[cfg(test)]", "#[cfg(fuzzing)]", "#[cfg(any(test, fuzzing))]", "#[cfg(any(fuzzing, test))]"];

/// The names of modules that are declared with such an attribute and lie in files of their own.
fn modules_left_out(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut lines = text.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        if LEFT_OUT.contains(&line)
            && let Some(name) = lines.peek().and_then(|next| next.strip_suffix(';'))
            && let Some((_, name)) = name.rsplit_once("mod ")
        {
            names.push(name.to_owned());
        }
    }
    names
}

/// The text up to its inline test module, which stands at the end of each file, and without single items
/// that only tests compile.
fn without_test_modules(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((at, attribute)) =
        LEFT_OUT.iter().filter_map(|attribute| Some((rest.find(attribute)?, attribute))).min()
    {
        kept.push_str(&rest[..at]);
        rest = &rest[at + attribute.len()..];
        rest = &rest[length_of_item(rest)..];
    }
    kept + rest
}

/// How long the item is that `text` begins with: up to its `;`, or to the end of its braces.
fn length_of_item(text: &str) -> usize {
    let mut depth = 0;
    for (at, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => return at,
            '}' => {
                depth -= 1;
                // A `use` with braces ends with a semicolon.
                if depth == 0 && !text[at + 1..].starts_with(';') {
                    return at + 1;
                }
            }
            ';' | ',' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The paths in `text` that begin with `crate`, `super` or `self`, each item of a braced list as a path of
/// its own. What a `mod.rs` re-exports of its own modules (`pub(crate) use self::name`) is not among them.
fn paths(text: &str) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    for first in ["crate", "super", "self"] {
        for (at, _) in text.match_indices(&format!("{first}::")) {
            let before = &text[..at];
            let is_longer = before.ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c));
            let re_exported = before.strip_suffix("use ").is_some_and(|before| {
                before.trim_end().ends_with("pub(crate)") || before.ends_with("pub ")
            });
            if !(is_longer || first == "self" && re_exported) {
                tree(&text[at..], &mut Vec::new(), &mut found);
            }
        }
    }
    found
}

/// Collects the paths of the tree that `text` begins with, below `prefix`. Returns the rest of the text.
fn tree<'t>(text: &'t str, prefix: &mut Module, found: &mut BTreeSet<Module>) -> &'t str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = tree(rest, prefix, found).trim_start();
            match rest.strip_prefix(',') {
                Some(more) if more.trim_start().starts_with('}') => rest = more.trim_start(),
                Some(more) => {
                    rest = more;
                    continue;
                }
                None => {}
            }
            return rest.strip_prefix('}').unwrap_or(rest);
        }
    }
    let length = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(length);
    prefix.push(name.to_owned());
    let rest = match rest.strip_prefix("::") {
        Some(rest) => tree(rest, prefix, found),
        None => {
            found.insert(prefix.clone());
            match rest.trim_start().strip_prefix("as ") {
                Some(alias) => {
                    let end = alias.find([',', '}', ';', '\n']).unwrap_or(alias.len());
                    &alias[end..]
                }
                None => rest,
            }
        }
    };
    prefix.pop();
    rest
}

/// The module that `path` leads to from within `module`: its longest beginning that is a module. None if
/// that is the crate's root.
fn module_of(module: &Module, path: &Module, known: &BTreeSet<Module>) -> Option<Module> {
    let mut at = match path[0].as_str() {
        "crate" => Vec::new(),
        _ => module.clone(),
    };
    for name in path {
        match name.as_str() {
            "crate" | "self" => {}
            "super" => drop(at.pop()),
            name => {
                at.push(name.to_owned());
                if !known.contains(&at) {
                    at.pop();
                    break;
                }
            }
        }
    }
    (!at.is_empty()).then_some(at)
}

/// Returns the level of `name`, counted from the top.
fn level(levels: &[&[&str]], name: &str) -> Option<usize> {
    levels.iter().position(|names| names.contains(&name))
}

/// Returns an import that points up or sideways, as `FROM -> TO` by folders.
fn upward(from: &Module, to: &Module) -> Option<String> {
    if from[0] != to[0] {
        let (above, below) = (level(&LEVELS, &from[0])?, level(&LEVELS, &to[0]));
        return below
            .is_none_or(|below| below <= above)
            .then(|| format!("{} -> {}", from[0], to[0]));
    }
    // `gateway/mod.rs` may import from all of them.
    let above = level(&GATEWAY_LEVELS, from.get(1)?).filter(|_| from[0] == "gateway")?;
    let below = to.get(1).and_then(|name| level(&GATEWAY_LEVELS, name));
    let to_name = to.get(1).map_or("gateway itself", |name| name.as_str());
    (to.get(1) != from.get(1) && below.is_none_or(|below| below <= above))
        .then(|| format!("gateway/{} -> {to_name}", from[1]))
}

/// Returns import cycles among the files of one folder: `cycle in FOLDER`, with the files of each.
fn cycles(modules: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<String, BTreeSet<String>> {
    let mut cycles: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let has_children = |module: &Module| {
        modules.keys().any(|other| other.len() == module.len() + 1 && other.starts_with(module))
    };
    let folders = modules.keys().filter(|module| has_children(module));
    for folder in folders {
        // `mod.rs`, the files beside it, and folders below it as a whole.
        let unit = |module: &Module| match module.get(folder.len()) {
            _ if !module.starts_with(folder) => None,
            Some(name) => Some(name.clone()),
            None => Some("mod".to_owned()),
        };
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, targets) in modules {
            let Some(from) = unit(from) else { continue };
            let targets = targets.iter().filter_map(unit).filter(|to| *to != from);
            edges.entry(from.clone()).or_default().extend(targets);
        }
        let reachable = |from: &String| {
            let mut seen = BTreeSet::new();
            let mut waiting: Vec<&String> = edges[from].iter().collect();
            while let Some(next) = waiting.pop() {
                if seen.insert(next.clone()) {
                    waiting.extend(&edges[next]);
                }
            }
            seen
        };
        let reached: BTreeMap<_, _> = edges.keys().map(|name| (name, reachable(name))).collect();
        for (name, seen) in &reached {
            let cycle: Vec<&str> = reached
                .iter()
                .filter(|(other, back)| seen.contains(**other) && back.contains(*name))
                .map(|(other, _)| other.as_str())
                .collect();
            if cycle.len() > 1 {
                let folder = format!("cycle in {}", folder.join("/"));
                cycles.entry(folder).or_default().insert(cycle.join(", "));
            }
        }
    }
    cycles
}

/// Modules that have no level.
const WITHOUT_LEVEL: [&str; 1] = ["fuzzing"];

/// Whether the tables of levels contain `module`.
fn has_level(module: &Module) -> bool {
    let in_gateway = || match module.get(1) {
        Some(name) => level(&GATEWAY_LEVELS, name).is_some(),
        None => true,
    };
    WITHOUT_LEVEL.contains(&module[0].as_str())
        || level(&LEVELS, &module[0]).is_some() && (module[0] != "gateway" || in_gateway())
}

#[test]
fn imports_point_down_and_make_no_cycles() {
    let modules = modules();
    assert!(modules.len() > 60, "{} modules", modules.len());
    let missing: Vec<_> = modules.keys().filter(|module| !has_level(module)).collect();
    assert!(missing.is_empty(), "LEVELS or GATEWAY_LEVELS lacks {missing:?}");
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (from, targets) in &modules {
        for to in targets {
            if let Some(violation) = upward(from, to) {
                let import = format!("{} names {}", from.join("::"), to.join("::"));
                found.entry(violation).or_default().insert(import);
            }
        }
    }
    found.extend(cycles(&modules));
    assert!(found.is_empty(), "imports that point up or make a cycle: {found:#?}");
}

#[test]
fn paths_are_found_in_source_text() {
    let source = r##"
        // crate::comment::A
        use crate::config::{self, toml::{Reader as R, Value}, Limits};
        pub(crate) use self::session::Session;
        fn f() { super::limits::take("crate::text::A", r#"crate::raw::A"#, '"'); }
        #[cfg(test)]
        use crate::only::Test;
        #[cfg(test)]
        mod tests { use crate::demo::Demo; fn g() { } }
        fn h(_: crate::os::File) {}
    "##;
    let found = paths(&without_test_modules(&bare(source)));
    let found: Vec<_> = found.iter().map(|path| path.join("::")).collect();
    let expected = [
        "crate::config::Limits",
        "crate::config::self",
        "crate::config::toml::Reader",
        "crate::config::toml::Value",
        "crate::os::File",
        "super::limits::take",
    ];
    assert_eq!(found, expected);

    let module = |path: &str| path.split("::").map(str::to_owned).collect::<Module>();
    let known = ["a", "a::b", "a::c"].map(module).into();
    let from_b = |path| module_of(&module("a::b"), &module(path), &known);
    assert_eq!(from_b("super::c::Item"), Some(module("a::c")));
    assert_eq!(from_b("super::Item"), Some(module("a")));
    assert_eq!(from_b("crate::Item"), None);

    let up = |from, to| upward(&module(from), &module(to));
    assert_eq!(up("gateway::session", "config"), None);
    assert_eq!(up("config", "gateway::session"), Some("config -> gateway".to_owned()));
    assert_eq!(up("tls::client", "telemetry"), Some("tls -> telemetry".to_owned()));
    assert_eq!(up("gateway::session", "gateway::relay"), None);
    let sideways = up("gateway::relay", "gateway::routing");
    assert_eq!(sideways, Some("gateway/relay -> routing".to_owned()));
    let root = up("gateway::relay", "gateway");
    assert_eq!(root, Some("gateway/relay -> gateway itself".to_owned()));
    assert_eq!(up("gateway", "gateway::accept"), None);

    let edges = [("a", vec!["a::b"]), ("a::b", vec!["a::c"]), ("a::c", vec!["a::b", "a"])];
    let edges = edges.map(|(from, to)| (module(from), to.into_iter().map(module).collect()));
    let expected = BTreeSet::from(["b, c, mod".to_owned()]);
    assert_eq!(cycles(&edges.into()), BTreeMap::from([("cycle in a".to_owned(), expected)]));
}
