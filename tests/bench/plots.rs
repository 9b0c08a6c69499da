//! The plots.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::goals::values;
use crate::sample::{Entry, Sample};
use crate::scenarios::Scenario;
use crate::statistics::Median;
use crate::targets::{HAPROXY, HAPROXY_PAIR, Kind, OURS, OURS_PAIR};

/// A line with its points.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (960, 540);

/// The width of the legend, at the right.
const LEGEND: u32 = 180;

/// The targets that are drawn; further lines would overlap.
const DRAWN: [Kind; 7] =
    [Kind::Direct, HAPROXY, HAPROXY_PAIR, Kind::Zuul, Kind::ZuulPair, OURS, OURS_PAIR];

/// Plots memory by number of open streams.
pub(crate) fn memory(samples: &[Sample], path: &Path) -> Result<()> {
    let lines = lines(samples, "resident MiB", |scenario| match scenario {
        Scenario::Quiet { streams } => Some(streams as f64),
        _ => None,
    });
    draw(path, "Memory by open streams", "open, idle streams", "resident MiB", &lines)
}

/// Plots the 99th percentile by number of clients.
pub(crate) fn latency(samples: &[Sample], path: &Path) -> Result<()> {
    let lines = lines(samples, "p99 ms", |scenario| match scenario {
        Scenario::Requests { clients } => Some(clients as f64),
        _ => None,
    });
    let title = "Latency by load";
    draw(path, title, "clients that request 2 KiB logs", "p99 of the whole log, ms", &lines)
}

/// A line for each target: the medians of `figure`, at the positions that `at` returns.
fn lines(samples: &[Sample], figure: &str, at: impl Fn(Scenario) -> Option<f64>) -> Vec<Line> {
    let mut keys: Vec<(Entry, Scenario)> =
        samples.iter().map(|sample| (sample.entry, sample.scenario)).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut lines: Vec<Line> = Vec::new();
    for (entry, scenario) in keys {
        if entry.cold || !DRAWN.contains(&entry.kind) {
            continue;
        }
        let Some(x) = at(scenario) else { continue };
        let of = values(samples, scenario, entry, figure).into_iter().map(|(_, value)| value);
        let Some(Median { median, .. }) = Median::of(of.collect()) else { continue };
        let name = entry.to_string();
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push((x, median)),
            None => lines.push(Line { name, points: vec![(x, median)] }),
        }
    }
    lines.retain(|line| line.points.iter().any(|(_, y)| *y > 0.0));
    lines
}

/// Draws `lines` with logarithmic axes, because targets differ by orders of magnitude. Without
/// points no file is written.
fn draw(path: &Path, title: &str, x: &str, y: &str, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let least = points().map(of).filter(|v| *v > 0.0).fold(f64::MAX, f64::min);
        let most = points().map(of).fold(f64::MIN, f64::max);
        least * 0.8..most * 1.25
    };
    if points().next().is_none() {
        return Ok(());
    }
    let failed = |error: &dyn std::fmt::Display| anyhow!("{}: {error}", path.display());
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let (plot, legend) = area.split_horizontally(SIZE.0 - LEGEND);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(range(|point| point.0).log_scale(), range(|point| point.1).log_scale())
        .map_err(|error| failed(&error))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x).y_desc(y).light_line_style(WHITE).bold_line_style(BLACK.mix(0.15));
    mesh.x_label_formatter(&ToString::to_string).y_label_formatter(&ToString::to_string);
    mesh.draw().map_err(|error| failed(&error))?;
    for (number, line) in lines.iter().enumerate() {
        let color = HSLColor(number as f64 / lines.len() as f64, 0.8, 0.4);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)))
            .map_err(|error| failed(&error))?;
        let points = line.points.iter().map(|point| Circle::new(*point, 3, color.filled()));
        chart.draw_series(points).map_err(|error| failed(&error))?;
        let height = 60 + 24 * i32::try_from(number)?;
        let stroke = PathElement::new([(0, height), (18, height)], color.stroke_width(2));
        legend.draw(&stroke).map_err(|error| failed(&error))?;
        let name = Text::new(line.name.clone(), (24, height - 6), ("sans-serif", 14));
        legend.draw(&name).map_err(|error| failed(&error))?;
    }
    area.present().map_err(|error| failed(&error))
}
