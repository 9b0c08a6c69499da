//! Compares the manual pages in `docs/` with the program.
//!
//! The sections OPTIONS and COMMANDS of zuul-fingergw(8) come from the definition of the command line,
//! and the keys of zuul-fingergw.toml(5) from the comments of `etc/zuul-fingergw.toml`. Each stands
//! between two marks. To write them:
//!
//! ```text
//! WRITE_MAN_PAGES=1 cargo test --test docs man_pages
//! ```

use std::fmt::Write as _;
use std::process::Command;
use std::{env, fs};

use clap_mangen::Man;
use zuul_fingergw::cli;

use crate::support::checkout::{read, top};

/// Compares the text between the marks of a page with `sections`, or writes it.
fn check(page: &str, sections: &[(&str, String)]) {
    let path = top().join("docs").join(page);
    let text = fs::read_to_string(&path).expect("the page");
    let mut expected = text.clone();
    for (name, content) in sections {
        let begin = format!(".\\\" BEGIN {name}\n");
        let start = expected.find(&begin).expect("the first mark") + begin.len();
        let end = expected.find(&format!(".\\\" END {name}\n")).expect("the second mark");
        expected.replace_range(start..end, content);
    }
    if env::var_os("WRITE_MAN_PAGES").is_some() {
        fs::write(&path, &expected).expect("the page");
    } else {
        let command = "WRITE_MAN_PAGES=1 cargo test --test docs man_pages";
        assert!(text == expected, "docs/{page} is not up to date; to write it: {command}");
    }
    let lint = Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(&path).output();
    let lint = lint.expect("mandoc, which tests/run installs");
    assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
}

#[test]
fn man_page_of_the_program_has_its_options_and_commands() {
    let mut command = cli::command();
    let mut commands = String::new();
    // Before `build`, which adds the global options to each of them, and the command `help`.
    for command in command.get_subcommands() {
        let mut command = command.clone().disable_help_flag(true);
        command.build();
        let _ = writeln!(commands, ".SS {}", command.get_name());
        let man = Man::new(command);
        commands += &section(|roff| man.render_description_section(roff), "");
        commands += &section(|roff| man.render_options_section(roff), "");
    }
    command.build();
    let man = Man::new(command);
    let options = section(|roff| man.render_options_section(roff), ".SH OPTIONS\n");
    check("zuul-fingergw.8", &[("OPTIONS", options), ("COMMANDS", commands)]);
    let page = read("docs/zuul-fingergw.8");
    for entry in ["\\fB\\-c\\fR \\fI<FILE>\\fR", ".SS resolve", "\\fB\\-\\-connect\\fR"] {
        assert!(page.contains(entry), "{entry}");
    }
}

/// Returns what `render` writes, without roff's preamble and with another heading.
fn section(render: impl Fn(&mut Vec<u8>) -> std::io::Result<()>, heading: &str) -> String {
    let mut roff = Vec::new();
    render(&mut roff).expect("a section");
    // The preamble defines this string as the apostrophe.
    let roff = String::from_utf8(roff).expect("UTF-8").replace("\\*(Aq", "\\(aq");
    let lines = roff
        .lines()
        .filter(|line| [".ie ", ".el ", ".SH "].iter().all(|request| !line.starts_with(request)));
    lines.fold(heading.to_owned(), |text, line| text + line + "\n")
}

#[test]
fn man_page_of_the_configuration_has_all_keys() {
    let example = read("etc/zuul-fingergw.toml");
    check("zuul-fingergw.toml.5", &[("keys", keys(&example))]);
    let keys = read("docs/zuul-fingergw.toml.5").matches("\n.It Ic ").count();
    assert!(keys > 50, "{keys} keys");
}

/// Returns the tables and keys of the example configuration as mdoc(7).
fn keys(example: &str) -> String {
    let mut text = String::new();
    let mut comment = Vec::new();
    let mut in_root = true;
    let mut in_list = false;
    for line in example.lines() {
        if let Some(words) = line.strip_prefix("# ") {
            comment.push(words);
            continue;
        }
        let setting = line.strip_prefix('#').unwrap_or(line);
        if setting.starts_with('[') {
            if std::mem::take(&mut in_list) {
                text.push_str(".El\n");
            }
            let table = setting.trim_end_matches("  # example");
            let _ = write!(text, ".Ss {table}\n{}", prose(&comment.join(" ")));
            in_root = false;
        } else if let Some((key, value)) = setting.split_once(" = ") {
            if !std::mem::replace(&mut in_list, true) {
                if in_root {
                    text.push_str(".Ss Before the first table\n");
                }
                text.push_str(".Bl -tag -width Ds\n");
            }
            let value = match value.split_once("  # example") {
                Some((value, _)) => format!("Example: `{value}`."),
                None if setting == line => format!("Required; for example: `{value}`."),
                None => format!("Default: `{value}`."),
            };
            let _ = write!(text, ".It Ic {key}\n{}{}", prose(&comment.join(" ")), prose(&value));
        }
        // A blank line as well: a comment above it is about the whole file.
        comment.clear();
    }
    if in_list {
        text.push_str(".El\n");
    }
    text
}

/// Returns `text` as lines of a page: a new line for each sentence, at most 80 characters long, and
/// bold text instead of backticks.
fn prose(text: &str) -> String {
    let mut lines = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > 72 {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += length;
        if word.ends_with(['.', '!', '?']) || word.ends_with(".)") {
            lines.push('\n');
            column = 0;
        }
    }
    if column > 0 {
        lines.push('\n');
    }
    escape(&lines)
}

fn escape(text: &str) -> String {
    let mut page = String::new();
    let mut is_code = false;
    let mut before = '\n';
    for character in text.chars() {
        match character {
            '`' => {
                page.push_str(if is_code { "\\fR" } else { "\\fB" });
                is_code = !is_code;
            }
            '\\' => page.push_str("\\e"),
            '~' => page.push_str("\\(ti"),
            '^' => page.push_str("\\(ha"),
            // A hyphen within words, otherwise a minus sign, as in options.
            '-' if is_code || !before.is_alphanumeric() => page.push_str("\\-"),
            '.' | '\'' if before == '\n' => {
                page.push_str("\\&");
                page.push(character);
            }
            _ => page.push(character),
        }
        before = character;
    }
    page
}

#[test]
fn prose_is_escaped_and_broken_into_lines() {
    let text = "One `a -b` two-fold. 'Three' is\\at ~/x -c. .four";
    let page = "One \\fBa \\-b\\fR two-fold.\n\\&'Three' is\\eat \\(ti/x \\-c.\n\\&.four\n";
    assert_eq!(prose(text), page);
    let long = prose(&"word ".repeat(40));
    assert!(long.lines().count() == 3 && long.lines().all(|line| line.len() <= 72));
}
