//! Links between the pages, and that the pages mention each other and the files in `etc`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::checkout::{read, top};
use crate::support::pages;

/// Returns the fragment by which Markdown platforms link to this heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|character| match character {
        ' ' => Some('-'),
        '-' | '_' => Some(character),
        other if other.is_alphanumeric() => Some(other.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

#[test]
fn links_have_existing_targets() {
    let mut count = 0;
    for page in pages::all() {
        let (_, prose) = page.parts();
        for (number, line) in prose {
            for target in line.split("](").skip(1) {
                let target = target.split(')').next().unwrap_or_default();
                if target.starts_with("https://") || target.starts_with("http://") {
                    continue;
                }
                count += 1;
                let place = format!("{}:{number}", page.name);
                let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
                let directory = Path::new(&page.name).parent().expect("a directory");
                let file =
                    if file.is_empty() { page.name.clone().into() } else { directory.join(file) };
                assert!(top().join(&file).exists(), "{place}: there is no {target}");
                if fragment.is_empty() {
                    continue;
                }
                let text = read(&file);
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings
                    .map(|heading| anchor(heading.trim_start_matches('#')))
                    .any(|anchor| anchor == fragment);
                assert!(found, "{place}: no heading in it is {target}");
            }
        }
    }
    assert!(count > 50, "{count} links");
}

/// Each page is reachable from each other page, and README.md mentions everything in `etc`.
#[test]
fn readme_links_to_every_page_and_etc_file() {
    let readme = read("README.md");
    for page in pages::all().iter().filter(|page| page.name != "README.md") {
        assert!(
            readme.contains(&format!("]({}", page.name)),
            "README.md leads to no {}",
            page.name
        );
    }
    let (_, table) = readme.split_once("| in `etc/` |").expect("the table");
    for entry in fs::read_dir(top().join("etc")).expect("etc").flatten() {
        let slash = if entry.path().is_dir() { "/" } else { "" };
        let name = format!("`{}{slash}`", entry.file_name().display());
        assert!(table.contains(&name), "README.md does not mention {name}");
    }
}

/// Some file systems ignore case.
#[test]
fn names_differ_by_more_than_case() {
    let mut names = BTreeSet::new();
    for page in pages::all() {
        assert!(names.insert(page.name.to_lowercase()), "{} is there twice", page.name);
    }
}

/// Returns the words of `zuul-fingergw WORD` between backquotes, outside of blocks.
#[test]
fn commands_in_sentences_are_run_somewhere() {
    let commands = |text: &str| -> BTreeSet<String> {
        let words = text.split("zuul-fingergw ").skip(1);
        let words = words.map(|rest| rest.split([' ', '\n', '`', '"']).next().unwrap_or_default());
        let commands = words.filter(|word| word.chars().all(|c| c.is_ascii_lowercase()));
        commands.filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let (mut run, mut mentioned) = (BTreeSet::new(), BTreeSet::new());
    for page in pages::all() {
        let (blocks, prose) = page.parts();
        for block in blocks.iter().filter(|block| block.language() == "sh") {
            run.extend(commands(&block.text));
        }
        for (_, line) in prose {
            for span in line.split('`').skip(1).step_by(2) {
                if span.starts_with("zuul-fingergw ") {
                    mentioned.extend(commands(span));
                }
            }
        }
    }
    assert!(mentioned.len() >= 5, "{mentioned:?}");
    let missing: Vec<_> = mentioned.difference(&run).collect();
    assert!(missing.is_empty(), "no `sh` block of any page runs {missing:?}");
}

#[test]
fn headings_become_fragments_as_platforms_make_them() {
    assert_eq!(anchor(" When a limit is reached"), "when-a-limit-is-reached");
    assert_eq!(anchor("Clients get `Build not found`"), "clients-get-build-not-found");
}
