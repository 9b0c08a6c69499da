//! The plots.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::goals::values;
use crate::sample::{Entry, Sample};
use crate::scenarios::Scenario;
use crate::statistics::Median;

/// A line with its points.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (900, 540);

/// Memory against open streams.
pub(crate) fn memory(samples: &[Sample], path: &Path) -> Result<()> {
    let lines = lines(samples, "resident MiB", |scenario| match scenario {
        Scenario::Quiet { streams } => Some(streams as f64),
        _ => None,
    });
    draw(path, "Memory against open streams", "open, quiet streams", "resident MiB", &lines)
}

/// The 99th percentile against clients.
pub(crate) fn latency(samples: &[Sample], path: &Path) -> Result<()> {
    let lines = lines(samples, "p99 ms", |scenario| match scenario {
        Scenario::Requests { clients } => Some(clients as f64),
        _ => None,
    });
    let title = "Latency against load";
    draw(path, title, "clients asking for 2 KiB logs", "p99 of the whole log, ms", &lines)
}

/// A line for each target: medians of `figure`, where `at` says they belong.
fn lines(samples: &[Sample], figure: &str, at: impl Fn(Scenario) -> Option<f64>) -> Vec<Line> {
    let mut keys: Vec<(Entry, Scenario)> =
        samples.iter().map(|sample| (sample.entry, sample.scenario)).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut lines: Vec<Line> = Vec::new();
    for (entry, scenario) in keys {
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

/// Both axes are logarithmic: the targets are orders of magnitude apart. Nothing is drawn of
/// nothing.
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
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(range(|point| point.0).log_scale(), range(|point| point.1).log_scale())
        .map_err(|error| failed(&error))?;
    chart.configure_mesh().x_desc(x).y_desc(y).draw().map_err(|error| failed(&error))?;
    for (number, line) in lines.iter().enumerate() {
        let color = HSLColor(number as f64 / lines.len() as f64, 0.8, 0.4);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)))
            .map_err(|error| failed(&error))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        let points = line.points.iter().map(|point| Circle::new(*point, 3, color.filled()));
        chart.draw_series(points).map_err(|error| failed(&error))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}
