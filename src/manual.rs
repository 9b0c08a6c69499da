//! The manual pages in `docs/`: prose written there by hand, and between two marks each what the
//! program knows itself. A test holds the pages against that; with `WRITE_MANUAL` set it writes it
//! into them:
//!
//! ```text
//! WRITE_MANUAL=1 cargo test --lib manual
//! ```
//!
//! The pages are in mdoc(7). A mark is a comment: `.\" BEGIN name` and `.\" END name`.

use std::fmt::Write as _;

use clap::{Arg, Command};

/// What stands between the marks of zuul-fingergw(8).
fn of_command_line(mut command: Command) -> Vec<(&'static str, String)> {
    command.build();
    vec![
        ("synopsis", synopsis(&command)),
        ("options", options(&command, |_| true)),
        ("commands", commands(&command)),
    ]
}

/// Commands as they are told of: not the one that every program of clap's has.
fn told(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|command| command.get_name() != "help")
}

fn told_arguments(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_global_set() && !is_clap_own(arg))
}

fn is_clap_own(arg: &Arg) -> bool {
    ["help", "version"].contains(&arg.get_id().as_str())
}

fn synopsis(command: &Command) -> String {
    let global = |with: &str| {
        let options = command.get_arguments().filter(|arg| arg.is_global_set());
        options.map(|arg| format!(".Op {}\n", flag(arg, with))).collect::<String>()
    };
    let mut text = format!(".Nm\n{}{}", optional(command), global(""));
    for command in told(command) {
        let wants_none = ["demo", "completions"].contains(&command.get_name());
        let global = if wants_none { String::new() } else { global("") };
        let _ = write!(text, ".Nm\n{global}.Cm {}\n{}", command.get_name(), optional(command));
    }
    text
}

/// The options of one command, each as one that may be left out; single letters together.
fn optional(command: &Command) -> String {
    let takes_value = |arg: &&Arg| arg.get_action().takes_values();
    let letters: String = told_arguments(command)
        .filter(|arg| !takes_value(arg))
        .filter_map(|arg| arg.get_short())
        .collect();
    let mut text = String::new();
    if !letters.is_empty() {
        let _ = writeln!(text, ".Op Fl {letters}");
    }
    for arg in told_arguments(command).filter(|arg| takes_value(arg) || arg.get_short().is_none()) {
        // What stands in a place of its own is wanted.
        let may_be_left_out = if arg.is_positional() { "." } else { ".Op " };
        let _ = writeln!(text, "{may_be_left_out}{}", flag(arg, ""));
    }
    text
}

/// `Fl c Ar FILE`, both spellings with `between` if there are two.
fn flag(arg: &Arg, between: &str) -> String {
    let short = arg.get_short().map(|letter| format!("Fl {letter}"));
    let long = arg.get_long().map(|name| format!("Fl -{name}"));
    let mut text: Vec<_> = short.into_iter().chain(long).collect();
    if between.is_empty() {
        text.truncate(1);
    }
    let mut text = text.join(between);
    for value in
        arg.get_value_names().filter(|_| arg.get_action().takes_values()).into_iter().flatten()
    {
        let blank = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{blank}Ar {value}");
    }
    text
}

fn options(command: &Command, wanted: impl Fn(&Arg) -> bool) -> String {
    let mut text = String::new();
    for arg in command.get_arguments().filter(|arg| wanted(arg)) {
        let help = arg.get_long_help().or(arg.get_help()).expect("every option is explained");
        let _ = write!(text, ".It {}\n{}", flag(arg, " , "), prose(&sentence(&help.to_string())));
    }
    text
}

fn commands(command: &Command) -> String {
    let mut text = String::new();
    for command in told(command) {
        let about = command.get_about().expect("every command is explained").to_string();
        let more = command.get_long_about().map(ToString::to_string).unwrap_or_default();
        let more = more.strip_prefix(&about).unwrap_or(&more).trim();
        let _ = write!(text, ".It Cm {}\n{}", command.get_name(), prose(&sentence(&about)));
        for paragraph in more.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
            text.push_str(&prose(&sentence(paragraph)));
        }
        let own = options(command, |arg| !arg.is_global_set() && !is_clap_own(arg));
        if !own.is_empty() {
            let _ = write!(text, ".Bl -tag -width Ds\n{own}.El\n");
        }
    }
    text
}

/// clap's help text as a sentence: `[default: X]` behind it and no full stop.
fn sentence(help: &str) -> String {
    let help = match help.strip_suffix(']').and_then(|help| help.split_once(" [default: ")) {
        Some((help, default)) => format!("{help}. Default: {default}"),
        None => help.to_owned(),
    };
    if help.ends_with('.') { help } else { format!("{help}.") }
}

/// What stands between the marks of zuul-fingergw.toml(5), told by the example.
fn of_example(example: &str) -> Vec<(&'static str, String)> {
    let mut text = String::new();
    let mut told = Vec::new();
    let (mut root, mut open) = (true, false);
    for line in example.lines() {
        if let Some(words) = line.strip_prefix("# ") {
            told.push(words);
            continue;
        }
        let setting = line.strip_prefix('#').unwrap_or(line);
        if setting.starts_with('[') {
            let setting = setting.trim_end_matches("  # example");
            let _ = write!(text, "{}.Ss {setting}\n{}", end(&mut open), prose(&told.join(" ")));
            root = false;
        } else if let Some((key, value)) = setting.split_once(" = ") {
            if root && !open {
                text.push_str(".Ss Before the first table\n");
            }
            if !open {
                text.push_str(".Bl -tag -width Ds\n");
                open = true;
            }
            let (value, word) = match value.split_once("  # example") {
                Some((value, _)) => (value, "Example"),
                None if setting == line => (value, "Required; for example"),
                None => (value, "Default"),
            };
            let value = format!("{word}: `{value}`.");
            let _ = write!(text, ".It Ic {key}\n{}{}", prose(&told.join(" ")), prose(&value));
        }
        // A blank line as well: what was said above it is about the file.
        told.clear();
    }
    text.push_str(end(&mut open));
    vec![("keys", text)]
}

fn end(open: &mut bool) -> &'static str {
    if std::mem::take(open) { ".El\n" } else { "" }
}

/// Lines of a page that say `text`: each sentence begins one, none is longer than 80 characters, and
/// what is between backticks is set off.
fn prose(text: &str) -> String {
    let mut lines = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let word_length = word.chars().count();
        if column > 0 && column + 1 + word_length > 72 {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += word_length;
        if word.ends_with(['.', '!', '?']) || word.ends_with(".)") {
            lines.push('\n');
            column = 0;
        }
    }
    if column > 0 {
        lines.push('\n');
    }
    escaped(&lines)
}

fn escaped(text: &str) -> String {
    let mut page = String::new();
    let (mut set_off, mut before) = (false, '\n');
    for char in text.chars() {
        match char {
            '`' => {
                page.push_str(if set_off { "\\fR" } else { "\\fB" });
                set_off = !set_off;
            }
            '\\' => page.push_str("\\e"),
            '~' => page.push_str("\\(ti"),
            '^' => page.push_str("\\(ha"),
            // A hyphen within words, a minus to be typed.
            '-' if set_off || !before.is_alphanumeric() => page.push_str("\\-"),
            '.' | '\'' if before == '\n' => {
                page.push_str("\\&");
                page.push(char);
            }
            _ => page.push(char),
        }
        before = char;
    }
    page
}

/// What a mark's comment begins and ends with.
type Mark = (&'static str, &'static str);

const MDOC: Mark = (".\\\" ", "\n");

/// `page` with what stands between its marks replaced.
fn renew(page: &str, (opening, closing): Mark, parts: &[(&str, String)]) -> String {
    let mut page = page.to_owned();
    for (name, text) in parts {
        let begin = format!("{opening}BEGIN {name}{closing}");
        let start = page.find(&begin).unwrap_or_else(|| panic!("no mark {begin}")) + begin.len();
        let end = format!("{opening}END {name}{closing}");
        let stop = page.find(&end).expect("the other mark");
        page.replace_range(start..stop, text);
    }
    page
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process;

    use super::*;
    use crate::cli;
    use crate::gateway::protocol::reply::Reply;

    const EXAMPLE: &str = include_str!("../etc/zuul-fingergw.toml");

    fn path(page: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(page)
    }

    /// Holds a manual page against the program, or writes it.
    fn hold(page: &str, parts: &[(&str, String)]) -> String {
        let renewed = hold_text(page, MDOC, parts);
        lint(page);
        renewed
    }

    /// Holds a page of either kind.
    fn hold_text(page: &str, mark: Mark, parts: &[(&str, String)]) -> String {
        let path = path(page);
        let text = fs::read_to_string(&path).expect("the page");
        let renewed = renew(&text, mark, parts);
        if std::env::var_os("WRITE_MANUAL").is_some() {
            fs::write(&path, &renewed).expect("the page");
        } else {
            assert!(
                text == renewed,
                "docs/{page} does not say what the program does; this writes it:\n\
                 WRITE_MANUAL=1 cargo test --lib manual"
            );
        }
        renewed
    }

    /// By mandoc, where there is one; `tests/run` installs it.
    fn lint(page: &str) {
        let mut mandoc = process::Command::new("mandoc");
        match mandoc.args(["-T", "lint", "-W", "warning"]).arg(path(page)).output() {
            Ok(linted) => {
                let complaints = String::from_utf8_lossy(&linted.stdout);
                assert!(linted.status.success(), "{complaints}");
            }
            Err(_) => println!("SKIPPED: mandoc is not installed"),
        }
    }

    #[test]
    fn the_page_of_the_program() {
        let page = hold("zuul-fingergw.8", &of_command_line(cli::command()));
        for option in [".It Fl c Ar FILE", ".It Cm status", ".It Fl h , Fl -help"] {
            assert!(page.contains(option), "{option}");
        }
    }

    #[test]
    fn the_page_of_the_configuration() {
        let page = hold("zuul-fingergw.toml.5", &of_example(EXAMPLE));
        assert_eq!(page.matches("\n.It Ic ").count(), 59, "keys");
    }

    /// What clients are told is on the page, word for word.
    #[test]
    fn the_page_has_every_reply() {
        let page = fs::read_to_string(path("zuul-fingergw.8")).expect("the page");
        for reply in Reply::ALL {
            let item = format!(".It {}\n", reply.line().trim_end());
            assert!(page.contains(&item), "{item}");
        }
    }

    #[test]
    fn prose_is_safe_and_has_a_line_for_each_sentence() {
        let text = "One `a -b` two-fold. 'Three' is\\at ~/x -c. .four";
        let page = "One \\fBa \\-b\\fR two-fold.\n\\&'Three' is\\eat \\(ti/x \\-c.\n\\&.four\n";
        assert_eq!(prose(text), page);
        let long = prose(&"word ".repeat(40));
        assert!(long.lines().count() == 3 && long.lines().all(|line| line.len() <= 72));
    }

    #[test]
    fn only_what_is_between_the_marks_is_written() {
        let page = "hand\n.\\\" BEGIN a\nold\n.\\\" END a\nwork\n";
        let renewed = renew(page, MDOC, &[("a", "new\n".to_owned())]);
        assert_eq!(renewed, "hand\n.\\\" BEGIN a\nnew\n.\\\" END a\nwork\n");
    }
}
