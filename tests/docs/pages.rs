//! Tests how pages are parsed and compared, and that each block has a test that runs it.

use crate::support::page_commands::{MACHINES, PageCommands};
use crate::support::pages::{Block, Page, alike, compare};

#[test]
fn blocks_are_found() {
    let text = "a\n```sh\n# one\nx\n```\n\n```text\n  y\n```\n## b\n\n  ```sh background\n  z\n    zz\n  ```\n";
    let page = Page { name: "page.md".to_owned(), text: text.to_owned() };
    let (blocks, prose) = page.parts();
    let taken: Vec<_> = blocks
        .iter()
        .map(|Block { place, heading, info, text, follows }| {
            (&**place, &**heading, &**info, &**text, *follows)
        })
        .collect();
    assert_eq!(
        taken,
        [
            ("page.md:2", "", "sh", "# one\nx\n", false),
            ("page.md:7", "", "text", "  y\n", true),
            ("page.md:12", "b", "sh background", "z\n  zz\n", false),
        ]
    );
    assert_eq!(prose, [(1, "a"), (6, ""), (10, "## b"), (11, "")]);
}

#[test]
fn output_is_compared() {
    assert!(
        alike("1 of 20 B", "31 of 4 B  ") && alike("a ... b", "a 12 x b") && alike("a...", "abc")
    );
    assert!(alike("0.2 s, 127.0.0.1:79.", "12 s, 198.51.100.4:7979."));
    assert!(!alike("a", "ab") && !alike("a ... b", "a 12 x c") && !alike("x 1", "x one"));
    let block = |text: &str| Block {
        place: String::new(),
        heading: String::new(),
        info: String::new(),
        text: text.to_owned(),
        follows: true,
    };
    compare(&block("a\n...\nc\n"), "a\nb\nc\n");
    let other_order = std::panic::catch_unwind(|| compare(&block("c\na\n"), "a\nb\nc\n"));
    assert!(other_order.is_err());
}

/// Each machine must be booted by a test, otherwise its blocks would not be run.
#[test]
fn every_machine_is_booted() {
    for (machine, source) in MACHINES {
        assert!(source.contains(&format!("PageCommands::on({machine:?})")), "{machine}");
        // Each machine has blocks.
        std::mem::forget(PageCommands::on(machine));
    }
}
