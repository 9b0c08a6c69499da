//! Compares our results with those of CPython's `configparser` for generated files.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::Ini;

/// Files in one run.
const FILES: usize = 6000;

/// Reads a JSON list of file texts. Prints for each `null` if Python refuses the file, else the
/// options of every section, with `null` for a value that cannot be interpolated.
const PYTHON: &str = r#"
import configparser, io, json, sys
environment = {"ZUUL_ONE": "1%%", "ZUUL_TWO": "<%(a)s>", "zuul_BAD": "5%"}
answers = []
for text in json.load(sys.stdin):
    parser = configparser.ConfigParser(environment)
    try:
        parser.read_file(io.StringIO(text, newline=None))
    except configparser.Error:
        answers.append(None)
        continue
    answer = {}
    for section in parser.sections():
        options = answer[section] = {}
        for option in parser.options(section):
            try:
                options[option] = parser.get(section, option)
            except configparser.Error:
                options[option] = None
    answers.append(answer)
json.dump(answers, sys.stdout)
"#;

/// Parts of generated files: special syntax, and text that only looks like it.
const PIECES: [&str; 62] = [
    "\n",
    "\n",
    "\n",
    "\n",
    "\r\n",
    "\r",
    " ",
    " ",
    "  ",
    "\t",
    "\u{a0}",
    "\u{3000}",
    "\x0b",
    "\x0c",
    "\x1c",
    "\u{85}",
    "\u{2028}",
    "[",
    "]",
    "[fingergw]",
    "[zookeeper]\n",
    "[DEFAULT]\n",
    "[default]\n",
    "[a]b]\n",
    "[ s ]",
    "[]",
    "=",
    ":",
    " = ",
    " : ",
    "port",
    "PORT",
    "a",
    "b",
    "hosts = zk1:2281",
    "zone =",
    "key",
    "79",
    "; comment",
    "# comment",
    "#",
    ";",
    "\n  more",
    "\n\tmore\n",
    "\n   # inside\n   more",
    "\n\n  after a gap",
    "%",
    "%%",
    "%(a)s",
    "%(A)s",
    "%(zuul_one)s",
    "%(zuul_two)s",
    "%(zuul_bad)s",
    "%(missing)s",
    "%(port)s",
    "%(",
    "%(a)",
    "\"q\"",
    "\\n",
    "\u{e9}",
    "\u{130}",
    "\u{feff}",
];

/// Generates a file of up to two dozen lines, the same for the same `random`.
fn file(random: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    if random.u8(..) < 250 {
        text.push_str("[fingergw]\n");
    }
    for _ in 0..random.usize(1..24) {
        let piece = |random: &mut fastrand::Rng| PIECES[random.usize(..PIECES.len())];
        // Mostly whole lines; otherwise Python would refuse most files.
        match random.u8(..) {
            0..150 => {
                let name = ["a", "b", "PORT", "o", "zuul_one"][random.usize(..5)];
                let separator = [" = ", "=", ":", " : "][random.usize(..4)];
                let _ = write!(text, "{name}{}{separator}", random.u8(..));
                (0..random.usize(..4)).for_each(|_| text.push_str(piece(random)));
                text.push('\n');
            }
            150..200 => {
                let indent = [" ", "  ", "\t"][random.usize(..3)];
                let _ = writeln!(text, "{indent}{}", piece(random));
            }
            200..215 => {
                let _ = writeln!(text, "[s{}]", random.u8(..));
            }
            215..230 => text.push('\n'),
            230..250 => {
                let name = ["a", "b", "port"][random.usize(..3)];
                let _ = writeln!(text, "{name} = {}", piece(random));
            }
            _ => text.push_str(piece(random)),
        }
    }
    text
}

/// Returns the results of Python for `texts`.
fn python_results(texts: &[String]) -> Vec<Value> {
    let mut python = Command::new("python3")
        .args(["-c", PYTHON])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 (tests/run installs it)");
    let input = json!(texts).to_string();
    let mut stdin = python.stdin.take().expect("stdin is piped");
    stdin.write_all(input.as_bytes()).expect("Python reads all input first");
    drop(stdin);
    let output = python.wait_with_output().expect("the output of Python");
    serde_json::from_slice(&output.stdout).expect("a JSON list")
}

/// Returns our result in the form of Python's.
fn our_result(text: &str) -> Value {
    let environment = [("ZUUL_ONE", "1%%"), ("ZUUL_TWO", "<%(a)s>"), ("zuul_BAD", "5%")];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let Ok(ini) = Ini::parse(text, environment) else { return Value::Null };
    let mut answer = json!({});
    for (section, options) in &ini.sections {
        let mut values = json!({});
        for option in options.keys().chain(ini.defaults.keys()) {
            let value = ini.get(section, option).ok().flatten();
            values[option] = json!(value.map(|value| value.text));
        }
        answer[section] = values;
    }
    answer
}

#[test]
fn generated_files_are_read_as_by_python() {
    let mut random = fastrand::Rng::with_seed(143);
    let texts: Vec<_> = (0..FILES).map(|_| file(&mut random)).collect();
    let answers = python_results(&texts);
    assert_eq!(answers.len(), FILES);
    let accepted = answers.iter().filter(|answer| !answer.is_null()).count();
    assert!((FILES / 10..FILES * 9 / 10).contains(&accepted), "of both kinds: {accepted}");
    let mut differences = String::new();
    for (text, theirs) in texts.iter().zip(&answers) {
        let ours = our_result(text);
        if ours != *theirs && differences.len() < 4000 {
            let _ = writeln!(differences, "{text:?}\n  Python {theirs}\n  ours   {ours}");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}
