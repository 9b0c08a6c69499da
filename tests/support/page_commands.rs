//! Commands of the pages for an operator of a machine with systemd: blocks with the name of a
//! machine after `sh`. The tests that boot machines take these blocks from the pages and run each
//! of them. docs/CONTRIBUTING.md has the rules for authors of pages.

use super::debian_root::Machine;
use super::pages::{self, Block, compare};

/// The machines, with the source of the tests that boot them.
pub(crate) const MACHINES: [(&str, &str); 4] = [
    // The units, from a checkout.
    ("checkout", include_str!("../system/boot.rs")),
    ("without-socket", include_str!("../system/boot.rs")),
    // The packages.
    ("deb", include_str!("../system/packages.rs")),
    ("rpm", include_str!("../system/packages.rs")),
];

/// Whether `word`, after a block's language, names a machine.
pub(crate) fn is_machine(word: &str) -> bool {
    MACHINES.iter().any(|(name, _)| *name == word)
}

/// All blocks for one machine. Dropping it fails if a block has not been run.
pub(crate) struct PageCommands {
    /// Each block with the output that the page shows after it.
    blocks: Vec<(Block, Option<Block>)>,
}

impl PageCommands {
    pub(crate) fn on(machine: &str) -> Self {
        let mut found = Vec::new();
        for page in pages::all() {
            let blocks = page.blocks();
            for (index, block) in blocks.iter().enumerate() {
                if block.info.split(' ').skip(1).any(|word| word == machine) {
                    let shown = blocks.get(index + 1);
                    let shown = shown.filter(|next| next.follows && next.info == "text");
                    found.push((block.clone(), shown.cloned()));
                }
            }
        }
        assert!(!found.is_empty(), "no page has anything for {machine}");
        Self { blocks: found }
    }

    /// Runs the next block below this heading as root in `directory` and returns its output, or
    /// writes the file that the block's first line names.
    pub(crate) async fn next(
        &mut self,
        (page, heading): (&str, &str),
        machine: &Machine,
        directory: &str,
    ) -> String {
        let here = |(block, _): &(Block, Option<Block>)| {
            block.heading == heading && block.place.starts_with(&format!("{page}:"))
        };
        let index = self.blocks.iter().position(here);
        let index = index.unwrap_or_else(|| panic!("{page}: no more blocks below {heading:?}"));
        let (block, shown) = self.blocks.remove(index);
        let Block { place, text, .. } = &block;
        if block.language() != "sh" {
            let path = text.lines().next().and_then(|line| line.strip_prefix("# /"));
            let path = path.unwrap_or_else(|| panic!("{place}: the first line names no file"));
            machine.root.write(path, text);
            return String::new();
        }
        let quoted = text.replace('\'', r"'\''");
        let words = format!("cd {directory} && bash -eu -o pipefail -c '{quoted}' 2>&1");
        let printed = machine.succeeds(&words).await;
        println!("--- {place}\n{text}--->\n{printed}");
        if let Some(shown) = shown {
            compare(&shown, &printed);
        }
        printed
    }
}

impl Drop for PageCommands {
    fn drop(&mut self) {
        let left: Vec<_> = self.blocks.iter().map(|(block, _)| &block.place).collect();
        assert!(left.is_empty() || std::thread::panicking(), "no test has run {left:?}");
    }
}
