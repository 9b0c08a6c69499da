//! The performance goals of this gateway.

use crate::sample::{Entry, Sample};
use crate::scenarios::Scenario;
use crate::statistics::Median;
use crate::targets::{HAPROXY, HAPROXY_1, HAPROXY_PAIR, Kind, OURS, OURS_PAIR};

/// One figure and its bound.
pub(crate) struct Goal {
    pub(crate) what: &'static str,
    pub(crate) scenario: Scenario,
    pub(crate) entry: Entry,
    pub(crate) figure: &'static str,
    pub(crate) bound: Bound,
}

/// A bound. Multiples are of the same figure of another target in the same round: of the target
/// with the best median, if there are several.
pub(crate) enum Bound {
    TimesOrMore(f64, Vec<Entry>),
    TimesOrLess(f64, Vec<Entry>),
    OwnTimesOrLess(f64, &'static str),
    Least(f64),
    Most(f64),
}

/// Whether a goal is reached.
pub(crate) struct Verdict {
    /// The measured figure.
    pub(crate) figure: Median,
    /// What is compared with the bound: the figure or a ratio.
    pub(crate) value: Median,
    pub(crate) bound: String,
    pub(crate) reached: bool,
}

/// All goals.
pub(crate) fn all() -> Vec<Goal> {
    [bulk(), requests(), first_byte(), quiet()].into_iter().flatten().collect()
}

fn goal(
    what: &'static str,
    scenario: Scenario,
    entry: Entry,
    figure: &'static str,
    bound: Bound,
) -> Goal {
    Goal { what, scenario, entry, figure, bound }
}

fn bulk() -> Vec<Goal> {
    use Bound::{TimesOrLess, TimesOrMore};
    let one = Scenario::Bulk { streams: 1 };
    let eight = Scenario::Bulk { streams: 8 };
    let (ours, pair) = (Entry::warm(OURS), Entry::warm(OURS_PAIR));
    let either = || vec![Entry::warm(HAPROXY), Entry::warm(HAPROXY_1)];
    let two = || vec![Entry::warm(HAPROXY)];
    let proxies = || vec![Entry::warm(HAPROXY_PAIR)];
    let (speed, cost) = ("MB/s", "CPU s/GiB");
    let plain = "plain, full speed";
    let tls = "zone to zone over TLS, full speed";
    vec![
        goal(plain, one, ours, speed, TimesOrMore(1.5, either())),
        goal(plain, one, ours, cost, TimesOrLess(0.65, either())),
        goal(plain, eight, ours, speed, TimesOrMore(1.2, two())),
        goal(plain, eight, ours, cost, TimesOrLess(0.8, two())),
        goal(tls, one, pair, speed, TimesOrMore(1.2, proxies())),
        goal(tls, one, pair, cost, TimesOrLess(0.8, proxies())),
        goal(tls, eight, pair, speed, TimesOrMore(1.2, proxies())),
        goal(tls, eight, pair, cost, TimesOrLess(0.8, proxies())),
    ]
}

fn requests() -> Vec<Goal> {
    use Bound::TimesOrMore;
    let sixteen = Scenario::Requests { clients: 16 };
    let either = || vec![Entry::warm(HAPROXY), Entry::warm(HAPROXY_1)];
    let rate = "requests/s";
    let zuul = |kind| vec![Entry::warm(kind)];
    let plain = "short requests, plain";
    let tls = "short requests, zone to zone";
    let (ours, pair) = (Entry::cold(OURS), Entry::cold(OURS_PAIR));
    vec![
        goal(plain, sixteen, ours, rate, TimesOrMore(0.5, either())),
        goal(plain, sixteen, Entry::warm(OURS), rate, TimesOrMore(0.9, either())),
        goal(plain, sixteen, ours, rate, TimesOrMore(15.0, zuul(Kind::Zuul))),
        goal(tls, sixteen, pair, rate, TimesOrMore(3.0, vec![Entry::warm(HAPROXY_PAIR)])),
        goal(tls, sixteen, pair, rate, TimesOrMore(12.0, zuul(Kind::ZuulPair))),
    ]
}

fn first_byte() -> Vec<Goal> {
    use Bound::{OwnTimesOrLess, TimesOrLess};
    let either = || vec![Entry::warm(HAPROXY), Entry::warm(HAPROXY_1)];
    let (cold, warm) = (Entry::cold(OURS), Entry::warm(OURS));
    let zones = |zones| Entry { zones, ..cold };
    let first = Scenario::FirstByte;
    let what = "connect to first byte";
    let many = "the build in the last of 200 zones";
    vec![
        goal(what, first, cold, "p50 ms", TimesOrLess(3.0, either())),
        goal(what, first, warm, "p50 ms", TimesOrLess(1.4, either())),
        goal(what, first, cold, "p99 ms", OwnTimesOrLess(2.0, "p50 ms")),
        goal(what, first, warm, "p99 ms", OwnTimesOrLess(2.0, "p50 ms")),
        goal(many, Scenario::Zones, zones(200), "p50 ms", TimesOrLess(2.0, vec![zones(1)])),
    ]
}

fn quiet() -> Vec<Goal> {
    use Bound::{Least, Most};
    let five = Scenario::Quiet { streams: 5000 };
    let nine = Scenario::Quiet { streams: 9000 };
    let burst = Scenario::Burst { clients: 2000 };
    let (ours, pair) = (Entry::warm(OURS), Entry::warm(OURS_PAIR));
    let resident = "resident after lines KiB/stream";
    let held = "9,000 open streams";
    let moment = "2,000 concurrent clients";
    vec![
        goal("memory of an idle stream", five, ours, resident, Most(3.3)),
        goal("memory of an idle stream, zone to zone", five, pair, resident, Most(40.0)),
        goal("no thread per stream", five, ours, "threads", Most(16.0)),
        goal(held, nine, ours, "open", Least(9000.0)),
        goal(held, nine, ours, "lines", Least(9000.0)),
        goal(moment, burst, Entry::cold(OURS), "served", Least(2000.0)),
        goal(moment, burst, Entry::cold(OURS), "refused", Most(0.0)),
        goal(moment, burst, Entry::cold(OURS), "seconds", Most(2.0)),
        goal("idle", Scenario::Idle, ours, "resident MiB", Most(10.0)),
    ]
}

impl Goal {
    /// `None` without samples.
    pub(crate) fn judge(&self, samples: &[Sample]) -> Option<Verdict> {
        let of = |entry, figure| values(samples, self.scenario, entry, figure);
        let own = of(self.entry, self.figure);
        let figure = Median::of(own.iter().map(|(_, value)| *value).collect())?;
        let verdict = |value: Median, bound: String, reached: bool| {
            Some(Verdict { figure, value, bound, reached })
        };
        match &self.bound {
            Bound::Least(least) => verdict(figure, format!("≥ {least}"), figure.median >= *least),
            Bound::Most(most) => verdict(figure, format!("≤ {most}"), figure.median <= *most),
            Bound::OwnTimesOrLess(times, other) => {
                let value = ratio(&own, &of(self.entry, other))?;
                verdict(value, format!("≤ {times} × {other}"), value.median <= *times)
            }
            Bound::TimesOrMore(times, others) => {
                let ratios = others
                    .iter()
                    .filter_map(|other| Some((other, ratio(&own, &of(*other, self.figure))?)));
                // Compares with the best of the others.
                let (other, value) =
                    ratios.min_by(|(_, a), (_, b)| a.median.total_cmp(&b.median))?;
                verdict(value, format!("≥ {times} × {other}"), value.median >= *times)
            }
            Bound::TimesOrLess(times, others) => {
                let ratios = others
                    .iter()
                    .filter_map(|other| Some((other, ratio(&own, &of(*other, self.figure))?)));
                let (other, value) =
                    ratios.max_by(|(_, a), (_, b)| a.median.total_cmp(&b.median))?;
                verdict(value, format!("≤ {times} × {other}"), value.median <= *times)
            }
        }
    }
}

/// The values of a figure in all samples that count, with their rounds.
pub(crate) fn values(
    samples: &[Sample],
    scenario: Scenario,
    entry: Entry,
    figure: &str,
) -> Vec<(usize, f64)> {
    samples
        .iter()
        .filter(|sample| sample.counts() && sample.scenario == scenario && sample.entry == entry)
        .filter_map(|sample| Some((sample.round, *sample.figures.get(figure)?)))
        .collect()
}

/// The median of the ratios between values of the same round.
pub(crate) fn ratio(of: &[(usize, f64)], to: &[(usize, f64)]) -> Option<Median> {
    let paired = of.iter().filter_map(|(round, of)| {
        let (_, to) = to.iter().find(|(other, _)| other == round)?;
        Some(of / to)
    });
    Median::of(paired.collect())
}
