//! `dictConfig`, in YAML or JSON, which is YAML to upstream.

use std::collections::BTreeMap;

use saphyr::{Mapping, Scalar, ScanError, Yaml, YamlLoader};
use saphyr_parser::{Event, Parser};

use super::{Class, Formatter, Handler, LEVELS, Logger, Noted, Python, Target, level, rotation};
use crate::config::error::excerpt;

/// Reads `text`, as far as it can be.
pub(crate) fn read(text: &str, faults: &mut Noted<'_>) -> Python {
    let mut python = Python::default();
    let documents = match load(text) {
        Ok(documents) => documents,
        Err(error) => {
            // What is missing at the end is missing behind the last line.
            let line = error.marker().line().min(text.split('\n').count());
            faults.note(Some(line), "", None, error.info());
            return python;
        }
    };
    let [Yaml::Mapping(top)] = documents.as_slice() else {
        faults.note(None, "", None, "must be one YAML mapping, as Python's dictConfig takes it");
        return python;
    };
    if get(top, "version").and_then(Yaml::as_integer) != Some(1) {
        faults.note(None, "version", None, "must be 1");
    }
    for (name, entry) in entries(top, "formatters", faults) {
        let text = |key| get(entry, key).and_then(Yaml::as_str);
        let other = entry.iter().any(|(key, value)| match key.as_str() {
            Some("format" | "class") => false,
            Some("style") => value.as_str() != Some("%"),
            _ => !value.is_null(),
        });
        let place = format!("formatters.{}", excerpt(name));
        let formatter = Formatter::new(place, text("format"), text("class"), other);
        python.formatters.insert(name.to_owned(), formatter);
    }
    for (name, entry) in entries(top, "handlers", faults) {
        let handler = handler(format!("handlers.{}", excerpt(name)), entry, faults);
        python.handlers.insert(name.to_owned(), handler);
    }
    for (name, entry) in entries(top, "loggers", faults) {
        let logger = logger(format!("loggers.{}", excerpt(name)), entry, &mut python.rest, faults);
        python.add_logger(name, logger);
    }
    match get(top, "root") {
        Some(Yaml::Mapping(entry)) => {
            let logger = logger("root".to_owned(), entry, &mut python.rest, faults);
            python.add_logger("root", logger);
        }
        Some(_) => faults.note(None, "root", None, "must be a mapping"),
        None => {}
    }
    // An `incremental` one changes levels only; there is nothing here yet that it could change.
    let rest = ["filters", "incremental"].iter().filter(|key| {
        get(top, key).is_some_and(|value| *value != Yaml::Value(Scalar::Boolean(false)))
    });
    python.rest.extend(rest.map(ToString::to_string));
    python
}

/// Levels of lists and mappings; dictConfig has four.
const DEPTH_MAX: usize = 64;

/// Scalars, lists and mappings, with aliases replaced: many times what any file has.
const NODES_MAX: usize = 100_000;

/// Of a key that is there twice the last one counts, as in PyYAML.
fn load(text: &str) -> Result<Vec<Yaml<'_>>, ScanError> {
    check_size(text)?;
    let mut loader = YamlLoader::default();
    loader.allow_duplicate_keys(true);
    Parser::new_from_str(text).load(&mut loader, true)?;
    match loader.error() {
        Some(error) => Err(error.clone()),
        None => Ok(loader.into_documents().into_iter().map(merged).collect()),
    }
}

/// Checks the bounds of the tree that the loader will build. It calls itself for each level, and copies
/// what an alias (`*name`) stands for, so that few lines of aliases of aliases would take all memory.
fn check_size(text: &str) -> Result<(), ScanError> {
    let (mut nodes, mut open, mut sizes) = (0_usize, Vec::new(), BTreeMap::new());
    for event in Parser::new_from_str(text) {
        let (event, span) = event?;
        match event {
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                open.push((anchor, nodes));
                nodes += 1;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                sizes.extend(open.pop().map(|(anchor, before)| (anchor, nodes - before)));
            }
            Event::Scalar(_, _, anchor, _) => {
                sizes.insert(anchor, 1);
                nodes += 1;
            }
            Event::Alias(anchor) => nodes += sizes.get(&anchor).copied().unwrap_or(1),
            _ => {}
        }
        if open.len() > DEPTH_MAX {
            return Err(ScanError::new_str(span.start, "nested too deeply"));
        }
        if nodes > NODES_MAX {
            return Err(ScanError::new_str(span.start, "too large, with its aliases replaced"));
        }
    }
    Ok(())
}

/// `node` with each mapping that is merged in by `<<` in its place, as PyYAML hands it on. Keys of a
/// mapping itself count before merged ones, and earlier ones in a list of mappings before later ones.
fn merged(node: Yaml<'_>) -> Yaml<'_> {
    match node {
        Yaml::Sequence(items) => Yaml::Sequence(items.into_iter().map(merged).collect()),
        Yaml::Mapping(entries) => {
            let (merges, own): (Vec<_>, Vec<_>) = entries
                .into_iter()
                .map(|(key, value)| (key, merged(value)))
                .partition(|(key, _)| key.as_str() == Some("<<"));
            let mut all = Mapping::new();
            for (_, value) in merges {
                let mappings = match value {
                    Yaml::Sequence(mappings) => mappings,
                    mapping => vec![mapping],
                };
                let mappings = mappings.into_iter().rev();
                all.extend(mappings.filter_map(Yaml::into_mapping).flatten());
            }
            all.extend(own);
            Yaml::Mapping(all)
        }
        other => other,
    }
}

/// The value of `key`. An empty one is none, as Python has it almost everywhere.
fn get<'y>(mapping: &'y Mapping<'y>, key: &str) -> Option<&'y Yaml<'y>> {
    let found = mapping.iter().find(|(name, _)| name.as_str() == Some(key));
    found.map(|(_, value)| value).filter(|value| !value.is_null())
}

/// The mappings in the mapping `key`.
fn entries<'y>(
    top: &'y Mapping<'y>,
    key: &str,
    faults: &mut Noted<'_>,
) -> Vec<(&'y str, &'y Mapping<'y>)> {
    let mapping = match get(top, key) {
        Some(Yaml::Mapping(mapping)) => mapping,
        None => return Vec::new(),
        Some(_) => {
            faults.note(None, key, None, "must be a mapping");
            return Vec::new();
        }
    };
    let mut entries = Vec::new();
    for (name, entry) in mapping {
        match (name.as_str(), entry.as_mapping()) {
            (Some(name), Some(entry)) => entries.push((name, entry)),
            (name, _) => {
                let place = format!("{key}.{}", excerpt(name.unwrap_or("?")));
                faults.note(None, &place, None, "must be a mapping");
            }
        }
    }
    entries
}

/// The level of a logger or handler. One that refers to a Python object is not a fault, but is named
/// among the `rest` unless it is one of logging's own.
fn read_level(
    place: &str,
    entry: &Mapping<'_>,
    rest: &mut Vec<String>,
    faults: &mut Noted<'_>,
) -> Option<u32> {
    let value = get(entry, "level")?;
    let number = value.as_integer().and_then(|number| u32::try_from(number).ok());
    let text = value.as_str();
    let read = number
        .or_else(|| text.and_then(level))
        .or_else(|| text.and_then(|text| text.strip_prefix("ext://logging.")).and_then(level));
    if read.is_none() && text.is_some_and(is_reference) {
        rest.push(format!("{place}.level"));
    } else if read.is_none() {
        faults.note(None, &format!("{place}.level"), value.as_str(), LEVELS);
    }
    read
}

fn logger(
    place: String,
    entry: &Mapping<'_>,
    rest: &mut Vec<String>,
    faults: &mut Noted<'_>,
) -> Logger {
    let handlers = match get(entry, "handlers") {
        None => Vec::new(),
        Some(Yaml::Sequence(names)) => {
            names.iter().filter_map(Yaml::as_str).map(str::to_owned).collect()
        }
        Some(_) => {
            faults.note(None, &format!("{place}.handlers"), None, "must be a list of names");
            Vec::new()
        }
    };
    if get(entry, "filters").is_some() {
        rest.push(format!("{place}.filters"));
    }
    let propagate = match get(entry, "propagate") {
        Some(Yaml::Value(Scalar::Boolean(propagate))) => *propagate,
        Some(Yaml::Value(Scalar::Integer(number))) => *number != 0,
        // YAML 1.1, which PyYAML reads, has more words for it than 1.2.
        Some(value) => !matches!(value.as_str(), Some("no" | "No" | "NO" | "off" | "Off" | "OFF")),
        None => true,
    };
    Logger { level: read_level(&place, entry, rest, faults), place, handlers, propagate }
}

/// Whether a value stands for a Python object or another part of the file.
fn is_reference(value: &str) -> bool {
    ["ext://", "cfg://"].iter().any(|scheme| value.starts_with(scheme))
}

/// Keys of handlers that change nothing here.
const HARMLESS: [&str; 7] = ["class", "()", "level", "formatter", "encoding", "delay", "errors"];

/// Keys by which files are rotated, all said with one remark.
const ROTATION: [&str; 6] = ["maxBytes", "backupCount", "when", "interval", "utc", "atTime"];

fn handler(place: String, entry: &Mapping<'_>, faults: &mut Noted<'_>) -> Handler {
    let text = |key| get(entry, key).and_then(Yaml::as_str);
    let class = text("class").or_else(|| text("()")).map(Class::of);
    if class.is_none() {
        faults.note(None, &format!("{place}.class"), None, "missing");
    }
    let mut rest = Vec::new();
    let mut taken = HARMLESS.to_vec();
    let target = match class {
        Some(Class::Stream) => {
            taken.push("stream");
            match text("stream") {
                Some("ext://sys.stdout") => Target::Stdout,
                None | Some("ext://sys.stderr") => Target::Stderr,
                Some(_) => Target::Other,
            }
        }
        Some(Class::File { rotates }) => {
            taken.push("filename");
            if rotates {
                rest.push(rotation(&place));
                taken.extend(ROTATION);
            }
            if text("mode") == Some("a") {
                taken.push("mode");
            }
            match text("filename") {
                Some("") | None => {
                    let key = format!("{place}.filename");
                    faults.note(None, &key, None, "missing: the name of the file");
                    Target::Other
                }
                Some(name) if is_reference(name) => Target::Other,
                Some(name) => Target::File(name.into()),
            }
        }
        Some(Class::Other) | None => Target::Other,
    };
    let keys = entry.iter().filter_map(|(key, _)| key.as_str());
    let others = keys.filter(|key| !taken.contains(key));
    rest.extend(others.map(|key| format!("{place}.{}", excerpt(key))));
    Handler {
        level: read_level(&place, entry, &mut rest, faults).unwrap_or(0),
        formatter: text("formatter").filter(|name| !name.is_empty()).map(str::to_owned),
        place,
        target,
        rest,
    }
}
