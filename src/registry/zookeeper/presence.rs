//! Where our entry stands, from what two sides know of one session: whether it is entered, and
//! whether there is a connection.

use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::registry::Standing;

/// Puts the two sides together. Neither may publish alone: what the keeper of the entry has learnt
/// before the connection was lost can reach it after that loss.
pub(super) struct Presence<'a> {
    known: Mutex<Known>,
    standing: &'a watch::Sender<Standing>,
}

struct Known {
    connected: bool,
    /// The name of the entry, while it is there.
    entry: Option<String>,
}

impl<'a> Presence<'a> {
    /// Of a session that has just come about, without an entry. `standing` is left as it is until
    /// there is one.
    pub(super) fn new(standing: &'a watch::Sender<Standing>) -> Self {
        Self { known: Mutex::new(Known { connected: true, entry: None }), standing }
    }

    /// The connection was lost, or is back.
    pub(super) fn connection(&self, connected: bool) {
        self.learn(|known| known.connected = connected);
    }

    /// The entry is there. Says whether that is news.
    pub(super) fn registered(&self, name: &str) -> bool {
        let news = |known: &mut Known| {
            let news = known.entry.as_deref() != Some(name);
            known.entry = Some(name.to_owned());
            news
        };
        self.learn(news)
    }

    /// No service of Zuul has registered below `node`, so there is no entry either.
    pub(super) fn without_zuul(&self, node: String) {
        self.standing.send_replace(Standing::NoZuul(node));
    }

    /// The entry has been taken out on order.
    pub(super) fn withdrawn(&self) {
        self.learn(|known| known.entry = None);
        self.standing.send_replace(Standing::Withdrawn);
    }

    /// Notes something and publishes what follows.
    fn learn<T>(&self, note: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = note(&mut known);
        if let Some(name) = &known.entry {
            let now = match known.connected {
                true => Standing::Registered(name.clone()),
                false => Standing::ConnectionLost,
            };
            self.standing.send_if_modified(|standing| {
                let changed = *standing != now;
                *standing = now;
                changed
            });
        }
        noted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(name: &str) -> Standing {
        Standing::Registered(name.to_owned())
    }

    /// The keeper hears of the others in the moment in which the connection goes, and finds its entry
    /// as it should be.
    #[test]
    fn nothing_stands_without_a_connection() {
        let standing = watch::Sender::new(Standing::Connecting);
        let presence = Presence::new(&standing);
        presence.connection(false);
        assert_eq!(*standing.borrow(), Standing::Connecting);
        presence.connection(true);
        assert!(presence.registered("gw1"));
        assert_eq!(*standing.borrow(), registered("gw1"));
        presence.connection(false);
        assert_eq!(*standing.borrow(), Standing::ConnectionLost);
        assert!(!presence.registered("gw1"), "no news");
        assert_eq!(*standing.borrow(), Standing::ConnectionLost);
        assert!(presence.registered("gw2"));
        assert_eq!(*standing.borrow(), Standing::ConnectionLost);
        presence.connection(true);
        assert_eq!(*standing.borrow(), registered("gw2"));
    }

    #[test]
    fn what_is_out_stays_out() {
        let standing = watch::Sender::new(Standing::SessionLost);
        let presence = Presence::new(&standing);
        presence.registered("gw1");
        presence.withdrawn();
        for connected in [false, true] {
            presence.connection(connected);
            assert_eq!(*standing.borrow(), Standing::Withdrawn);
        }
    }
}
