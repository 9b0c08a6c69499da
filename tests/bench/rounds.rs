//! Rounds: in each round every target is measured once, in random order, so that changes of the
//! machine over time affect all targets. Samples that other processes disturbed are discarded and
//! repeated.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::lab::Lab;
use crate::machine::Snapshot;
use crate::sample::{Entry, Sample};
use crate::scenarios::{self, Effort, Scenario, counts, idle};
use crate::targets::Running;

/// The most attempts at one sample.
const ATTEMPTS: usize = 4;

/// The longest wait for other processes before the next attempt.
const CALM: Duration = Duration::from_secs(60);

/// The options of all rounds.
#[derive(Clone, Debug)]
pub(crate) struct Rounds {
    pub(crate) rounds: usize,
    pub(crate) effort: Effort,
    /// The share of the machine that other processes may use, 0 to 1.
    pub(crate) threshold: f64,
    /// Do not discard samples that other processes disturbed.
    pub(crate) allow_noise: bool,
    /// The number of further builds of this gateway.
    pub(crate) also: usize,
    /// Only targets whose name contains one of these, if there are any.
    pub(crate) only: Vec<String>,
}

impl Rounds {
    /// Measures `scenario` and passes each sample to `keep`.
    pub(crate) async fn run(
        &self,
        scenario: Scenario,
        lab: &mut Lab,
        directory: &Path,
        mut keep: impl FnMut(Sample),
    ) -> Result<()> {
        let mut entries = scenario.entries(self.also);
        if !self.only.is_empty() {
            entries.retain(|entry| {
                let name = entry.to_string();
                self.only.iter().any(|only| name.contains(only.as_str()))
            });
        }
        match scenario {
            Scenario::Idle => {
                // Further rounds give the same figures.
                for round in 1..=self.rounds.min(3) {
                    idle::round(round, &entries, lab, self.effort)
                        .await?
                        .into_iter()
                        .for_each(&mut keep);
                }
            }
            Scenario::Counts => {
                let directory = directory.join("counts");
                // Results of the last run; their names contain process IDs.
                let _ = fs::remove_dir_all(&directory);
                fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
                for entry in entries {
                    let figures = counts::measure(entry, lab, self.effort, &directory).await;
                    let mut sample = Sample::empty(scenario, entry, 1);
                    match figures {
                        Ok(figures) => sample.figures = figures,
                        Err(error) => sample.error = Some(format!("{error:#}")),
                    }
                    keep(sample);
                }
            }
            _ => {
                let mut targets = HashMap::new();
                for round in 1..=self.rounds {
                    fastrand::shuffle(&mut entries);
                    for entry in &entries {
                        self.sample(scenario, *entry, round, &mut targets, lab, &mut keep).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits until other processes do not use the machine for a second, at most for [`CALM`].
    async fn wait_for_calm(&self) -> Result<()> {
        let start = Instant::now();
        let mut earlier = Snapshot::take()?;
        while start.elapsed() < CALM {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let later = Snapshot::take()?;
            if earlier.foreign(&later).share <= self.threshold {
                break;
            }
            earlier = later;
        }
        Ok(())
    }

    /// Measures until a sample counts, at most [`ATTEMPTS`] times.
    async fn sample(
        &self,
        scenario: Scenario,
        entry: Entry,
        round: usize,
        targets: &mut HashMap<Entry, Running>,
        lab: &mut Lab,
        keep: &mut impl FnMut(Sample),
    ) -> Result<()> {
        // Warm and cold requests use the same target.
        let key = Entry { cold: false, ..entry };
        for _ in 0..ATTEMPTS {
            let mut sample = Sample::empty(scenario, entry, round);
            let target = match targets.remove(&key) {
                Some(target) => Ok(target),
                None => scenarios::start(entry, lab).await,
            };
            let measured = match &target {
                Ok(target) => scenario.measure(entry, target, lab, self.effort).await,
                Err(error) => Err(anyhow!("it does not start: {error:#}")),
            };
            let failed = measured.is_err();
            match measured {
                Ok(measured) => {
                    sample.figures = measured.figures;
                    sample.foreign = measured.foreign.share;
                    sample.foreign_by = measured.foreign.by;
                    sample.refused = !self.allow_noise && sample.foreign > self.threshold;
                }
                Err(error) => sample.error = Some(format!("{error:#}")),
            }
            if failed || scenario.wants_fresh_targets() {
                // Streams of a failed measurement must not affect the next one.
                lab.end_quiet().await?;
            } else if let Ok(target) = target {
                targets.insert(key, target);
            }
            let refused = sample.refused;
            keep(sample);
            if !refused {
                break;
            }
            self.wait_for_calm().await?;
        }
        Ok(())
    }
}
