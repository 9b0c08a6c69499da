//! What `docs/metrics.md` says of each metric and each alert.

use std::fmt::Write as _;

use prometheus_client::metrics::MetricType;
use saphyr::{LoadableYamlNode, Yaml};

use crate::telemetry::metrics::definitions::PAGE;
use crate::telemetry::metrics::descriptor::{Descriptor, Values};

/// A table of all metrics, and what there is to say of each.
pub(crate) fn of_catalogue() -> String {
    let mut text = "| metric | type | unit | labels |\n| --- | --- | --- | --- |\n".to_owned();
    for descriptor in PAGE.iter().flat_map(|(_, descriptors)| *descriptors) {
        let name = exported(descriptor);
        let labels: Vec<_> =
            descriptor.labels.iter().map(|label| format!("`{}`", label.name)).collect();
        let (kind, unit) = (descriptor.kind.as_str(), descriptor.unit.as_str());
        let _ = writeln!(text, "| [`{name}`](#{name}) | {kind} | {unit} | {} |", labels.join(", "));
    }
    for (heading, descriptors) in PAGE {
        let _ = write!(text, "\n## {heading}\n");
        for descriptor in descriptors {
            of_metric(&mut text, descriptor);
        }
    }
    text
}

fn of_metric(text: &mut String, descriptor: &Descriptor) {
    let Descriptor { kind, unit, help, labels, advice, .. } = descriptor;
    let (kind, unit) = (kind.as_str(), unit.as_str());
    let _ = write!(text, "\n### `{}`\n\nA {kind}, {unit}. {help}.\n", exported(descriptor));
    for label in *labels {
        match label.values {
            Values::These(values) => {
                let _ = write!(text, "\n| `{}` | meaning |\n| --- | --- |\n", label.name);
                for (value, meaning) in values {
                    let _ = writeln!(text, "| `{value}` | {meaning} |");
                }
            }
            Values::Any(what) => {
                let _ = write!(text, "\n`{}`: {what}.\n", label.name);
            }
        }
    }
    let _ = write!(text, "\n{advice}\n");
}

/// The name that expressions use, but for what a histogram puts behind it.
fn exported(descriptor: &Descriptor) -> String {
    let total = if matches!(descriptor.kind, MetricType::Counter) { "_total" } else { "" };
    format!("{}{total}", descriptor.name)
}

/// A table of the alerts in a file of rules.
pub(crate) fn of_alerts(rules: &str) -> String {
    let documents = Yaml::load_from_str(rules).expect("YAML");
    let mut text = "| alert | severity | after | cause, and what to do |\n\
                    | --- | --- | --- | --- |\n"
        .to_owned();
    for group in documents[0]["groups"].as_vec().expect("groups") {
        for rule in group["rules"].as_vec().expect("rules") {
            let said = |value: &Yaml<'_>| value.as_str().expect("a string").trim().to_owned();
            let after = rule.as_mapping_get("for").map_or("at once".to_owned(), said);
            let (alert, severity) = (said(&rule["alert"]), said(&rule["labels"]["severity"]));
            let description = said(&rule["annotations"]["description"]).replace('\n', " ");
            let _ = writeln!(text, "| `{alert}` | {severity} | {after} | {description} |");
        }
    }
    text
}
