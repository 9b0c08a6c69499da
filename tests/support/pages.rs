//! The pages of the documentation, and the fenced blocks in them.

use std::fs;
use std::path::{Path, PathBuf};

use super::checkout::{read, top};

/// A page, by its path from the top of the repository.
pub(crate) struct Page {
    pub(crate) name: String,
    pub(crate) text: String,
}

/// A fenced block.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// The page, and the line of its opening fence.
    pub(crate) place: String,
    /// The heading above the block.
    pub(crate) heading: String,
    /// The text after the opening fence: a language, and words for the tests that run the block.
    pub(crate) info: String,
    pub(crate) text: String,
    /// Whether only blank lines separate it from the block before.
    pub(crate) follows: bool,
}

/// Returns README.md and all of docs/*.md, sorted by name.
pub(crate) fn all() -> Vec<Page> {
    let listing = fs::read_dir(top().join("docs")).expect("docs");
    let mut paths: Vec<PathBuf> = listing.map(|entry| entry.expect("a file").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.push(top().join("README.md"));
    paths.sort();
    assert!(paths.len() >= 10, "{paths:?}");
    paths.iter().map(|path| page(path)).collect()
}

fn page(path: &Path) -> Page {
    let name = path.strip_prefix(top()).expect("below the top").display().to_string();
    Page { text: read(path), name }
}

/// Returns the EXAMPLES of this manual page: the commands of each example as a block of `sh`, all
/// other literal text as a block of `toml`. The page uses the macros of mdoc(7) or of man(7).
pub(crate) fn manual(name: &str) -> Vec<Block> {
    let text = read(Path::new("docs").join(name)).replace(".SH ", ".Sh ");
    let (_, examples) = text.split_once(".Sh EXAMPLES\n").expect("the section");
    let examples = examples.split(".Sh ").next().unwrap_or_default();
    let examples = examples.replace(r"\-", "-").replace(r"\e", r"\").replace(r"\(aq", "'");
    let mut shown = Vec::new();
    let mut literal = false;
    for line in examples.lines() {
        match line.split(' ').next() {
            Some(".Bd" | ".EX") => {
                literal = true;
                shown.push(String::new());
            }
            Some(".Ed" | ".EE") => literal = false,
            _ if literal => {
                let example = shown.last_mut().expect("an open example");
                example.push_str(line.strip_prefix("  ").unwrap_or(line));
                example.push('\n');
            }
            _ => {}
        }
    }
    let block = |(number, text): (usize, String)| {
        let is_command = text.starts_with("$ ") || text.starts_with("# ");
        let typed = |line: &str| {
            let typed = line.strip_prefix("$ ").or_else(|| line.strip_prefix("# "));
            format!("{}\n", typed.unwrap_or(line))
        };
        Block {
            place: format!("docs/{name}, example {number}"),
            heading: "EXAMPLES".to_owned(),
            info: if is_command { "sh" } else { "toml" }.to_owned(),
            text: if is_command { text.lines().map(typed).collect() } else { text },
            follows: false,
        }
    };
    (1..).zip(shown).map(block).collect()
}

impl Page {
    /// Returns the fenced blocks and, separately, the lines outside them with their numbers.
    pub(crate) fn parts(&self) -> (Vec<Block>, Vec<(usize, &str)>) {
        let (mut blocks, mut prose) = (Vec::new(), Vec::new());
        // The open block and the indentation of its fence.
        let mut open: Option<(Block, usize)> = None;
        let (mut follows, mut heading) = (false, String::new());
        for (number, line) in (1..).zip(self.text.lines()) {
            let fence = line.trim_start().strip_prefix("```");
            match (open.take(), fence) {
                (None, Some(info)) => {
                    let block = Block {
                        place: format!("{}:{number}", self.name),
                        heading: heading.clone(),
                        info: info.trim().to_owned(),
                        text: String::new(),
                        follows,
                    };
                    open = Some((block, line.len() - line.trim_start().len()));
                }
                (Some((block, _)), Some(_)) => {
                    blocks.push(block);
                    follows = true;
                }
                (Some((mut block, indent)), None) => {
                    let blanks = line.len() - line.trim_start().len();
                    block.text.push_str(&line[indent.min(blanks)..]);
                    block.text.push('\n');
                    open = Some((block, indent));
                }
                (None, None) => {
                    follows &= line.trim().is_empty();
                    if line.starts_with('#') {
                        line.trim_start_matches('#').trim().clone_into(&mut heading);
                    }
                    prose.push((number, line));
                }
            }
        }
        assert!(open.is_none(), "{}: a block has no end", self.name);
        (blocks, prose)
    }

    pub(crate) fn blocks(&self) -> Vec<Block> {
        self.parts().0
    }
}

impl Block {
    /// The block's language.
    pub(crate) fn language(&self) -> &str {
        self.info.split(' ').next().unwrap_or_default()
    }
}

/// Checks that each shown line is printed, in this order. Numbers may differ; `...` stands for
/// anything, also for lines.
pub(crate) fn compare(shown: &Block, printed: &str) {
    let mut lines = printed.lines();
    for line in shown.text.lines().filter(|line| line.trim() != "...") {
        let found = lines.any(|actual| alike(line, actual));
        assert!(found, "{}: not printed: {line}\nprinted:\n{printed}", shown.place);
    }
}

/// Whether `actual` equals `shown` except for numbers and `...`.
pub(crate) fn alike(shown: &str, actual: &str) -> bool {
    let (shown, actual) = (shape(shown), shape(actual));
    let mut pieces = shown.split("...");
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = actual.strip_prefix(first) else { return false };
    let mut last = first;
    for piece in pieces {
        let Some(at) = rest.find(piece) else { return false };
        rest = &rest[at + piece.len()..];
        last = piece;
    }
    // A final `...` matches the rest.
    rest.is_empty() || shown.ends_with("...") || (last != first && actual.ends_with(last))
}

/// Replaces each number, with or without a point, by one `0`, and removes trailing blanks.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    let mut characters = line.trim_end().chars().peekable();
    while let Some(character) = characters.next() {
        let in_number = shape.ends_with('0');
        match character {
            '0'..='9' if in_number => {}
            '0'..='9' => shape.push('0'),
            '.' if in_number && characters.peek().is_some_and(char::is_ascii_digit) => {}
            other => shape.push(other),
        }
    }
    shape
}
