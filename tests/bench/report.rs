//! Writes the results: every sample as JSON, a report in Markdown, plots.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::goals::{self, ratio, values};
use crate::plots;
use crate::rounds::Rounds;
use crate::sample::{Entry, Sample};
use crate::scenarios::Scenario;
use crate::statistics::Median;
use crate::targets::{HAPROXY, HAPROXY_PAIR};

/// All results until now.
#[derive(Serialize)]
pub(crate) struct Report {
    /// Machine, programs and options, in the order of the report.
    about: Vec<(String, String)>,
    samples: Vec<Sample>,
    #[serde(skip)]
    allow_noise: bool,
    #[serde(skip)]
    threshold: f64,
}

impl Report {
    pub(crate) fn new(rounds: &Rounds, descriptors: u64, gateways: &[PathBuf]) -> Self {
        let mut about = vec![
            ("processors".to_owned(), processors()),
            ("kernel".to_owned(), output(Command::new("uname").args(["-s", "-r", "-m"]))),
            ("haproxy".to_owned(), output(Command::new("haproxy").arg("-v"))),
            ("open files".to_owned(), descriptors.to_string()),
            ("rounds".to_owned(), rounds.rounds.to_string()),
            (
                "bulk streams and request rates".to_owned(),
                format!("{} ms each", rounds.effort.milliseconds),
            ),
        ];
        for (number, gateway) in gateways.iter().enumerate() {
            let name = if number == 0 { "ours".to_owned() } else { format!("also {number}") };
            let version = output(Command::new(gateway).arg("--version"));
            about.push((name, format!("{version}, {}", gateway.display())));
        }
        let Rounds { allow_noise, threshold, .. } = *rounds;
        Self { about, samples: Vec::new(), allow_noise, threshold }
    }

    /// Adds a sample and prints it.
    pub(crate) fn add(&mut self, sample: Sample) {
        let figures: Vec<String> = sample
            .scenario
            .columns()
            .iter()
            .filter_map(|name| Some(format!("{name} {}", number(*sample.figures.get(name)?))))
            .collect();
        let verdict = match &sample.error {
            Some(error) => format!("FAILED: {error}"),
            None if sample.refused => {
                format!(
                    "DISCARDED, other processes used {:.0} %: {}",
                    sample.foreign * 100.0,
                    sample.foreign_by
                )
            }
            None => figures.join(", "),
        };
        eprintln!("  {} {}: {verdict}", sample.round, sample.entry);
        self.samples.push(sample);
    }

    /// Writes samples.json, report.md and the plots into `directory`.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())
        };
        write("samples.json", &serde_json::to_string_pretty(self)?)?;
        write("report.md", &self.markdown())?;
        plots::memory(&self.samples, &directory.join("memory.svg"))?;
        plots::latency(&self.samples, &directory.join("latency.svg"))
    }

    fn markdown(&self) -> String {
        let mut text = String::from("# Measured\n\n");
        for (name, value) in &self.about {
            let _ = writeln!(text, "- {name}: {value}");
        }
        let _ = writeln!(text, "\n{}\n", self.noise());
        self.goals(&mut text);
        let mut scenarios: Vec<_> = self.samples.iter().map(|sample| sample.scenario).collect();
        scenarios.dedup();
        for scenario in scenarios {
            self.scenario(scenario, &mut text);
        }
        text
    }

    /// How many samples were disturbed by other processes, and whether they count.
    fn noise(&self) -> String {
        let share = self.threshold * 100.0;
        let count = |wanted: &dyn Fn(&Sample) -> bool| {
            self.samples.iter().filter(|sample| wanted(sample)).count()
        };
        let all = self.samples.len();
        let refused = count(&|sample| sample.refused);
        let failed = count(&|sample| sample.error.is_some());
        let noisy = count(&|sample| sample.foreign > self.threshold);
        if self.allow_noise {
            format!(
                "**Noisy:** in {noisy} of {all} samples other processes used more than {share} % of \
                 the machine; they count nevertheless (`--allow-noise`). {failed} failed."
            )
        } else {
            format!(
                "{all} samples; {refused} were discarded and repeated because other processes used \
                 more than {share} % of the machine; {failed} failed."
            )
        }
    }

    fn goals(&self, text: &mut String) {
        text.push_str(
            "## Goals\n\n| what | scenario | target | measured | goal | value | reached |\n",
        );
        text.push_str("|---|---|---|---:|---|---:|---|\n");
        for goal in goals::all() {
            let (what, scenario, entry) = (goal.what, goal.scenario, goal.entry);
            let figure = goal.figure;
            let _ = match goal.judge(&self.samples) {
                None => continue,
                Some(verdict) => writeln!(
                    text,
                    "| {what} | {scenario} | {entry} | {} {figure} | {} | {} | {} |",
                    number(verdict.figure.median),
                    verdict.bound,
                    spread(verdict.value),
                    if verdict.reached { "yes" } else { "**no**" },
                ),
            };
        }
        text.push('\n');
    }

    fn scenario(&self, scenario: Scenario, text: &mut String) {
        let of = |entry, figure: &str| values(&self.samples, scenario, entry, figure);
        let mut entries: Vec<Entry> = self
            .samples
            .iter()
            .filter(|sample| sample.scenario == scenario)
            .map(|sample| sample.entry)
            .collect();
        entries.sort_unstable();
        entries.dedup();
        let columns: Vec<&str> = scenario
            .columns()
            .iter()
            .copied()
            .filter(|column| entries.iter().any(|entry| !of(*entry, column).is_empty()))
            .collect();
        let _ = write!(text, "## {} ({scenario})\n\n| target | samples |", scenario.title());
        for column in &columns {
            let _ = write!(text, " {column} |");
        }
        let _ = write!(text, " {} to haproxy's |\n|---|---:|", scenario.main_figure());
        text.push_str(&"---:|".repeat(columns.len() + 1));
        text.push('\n');
        for entry in entries {
            let samples = columns.first().map_or(0, |column| of(entry, column).len());
            let _ = write!(text, "| {entry} | {samples} |");
            for column in &columns {
                let values = of(entry, column).into_iter().map(|(_, value)| value).collect();
                let _ = write!(text, " {} |", Median::of(values).map_or("–".to_owned(), spread));
            }
            // Compares pairs with haproxy's pair, single processes with a single haproxy.
            let peer = Entry::warm(if entry.kind.is_pair() { HAPROXY_PAIR } else { HAPROXY });
            let column = scenario.main_figure();
            let ratio = ratio(&of(entry, column), &of(peer, column)).filter(|_| entry != peer);
            let _ = writeln!(text, " {} |", ratio.map_or("–".to_owned(), spread));
        }
        text.push('\n');
    }
}

/// Formats a median with minimum and maximum.
fn spread(of: Median) -> String {
    if of.least.total_cmp(&of.most).is_eq() {
        return number(of.median);
    }
    format!("{} ({}–{})", number(of.median), number(of.least), number(of.most))
}

/// Formats a number with three significant digits, or a count as it is.
fn number(value: f64) -> String {
    match value.abs() {
        _ if value.fract() == 0.0 => format!("{value}"),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn processors() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("model name"))
        .filter_map(|line| Some(line.split_once(": ")?.1))
        .collect();
    format!("{} × {}", crate::machine::processors(), models.first().unwrap_or(&"unknown"))
}

/// The first line that a command prints.
fn output(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}
