//! Where our entry stands, from what two sides know of one session: whether it is entered, and
//! whether there is a connection.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::registry::RegistrationStatus;

/// Puts the two sides together. Neither may publish alone: what the keeper of the entry has learnt
/// before the connection was lost can reach it after that loss.
pub(crate) struct StatusTracker<'a> {
    known: Mutex<Known>,
    standing: &'a watch::Sender<RegistrationStatus>,
}

struct Known {
    connected: bool,
    /// Whether the entry is there, or why not, as long as there is a connection; `None` before that
    /// is known.
    entry: Option<RegistrationStatus>,
    /// The entry has been taken out on order: this session enters nothing more.
    withdrawn: bool,
}

impl<'a> StatusTracker<'a> {
    /// Of a session that has just come about, without an entry. `standing` is left as it is until
    /// there is one.
    pub(crate) fn new(standing: &'a watch::Sender<RegistrationStatus>) -> Self {
        Self {
            known: Mutex::new(Known { connected: true, entry: None, withdrawn: false }),
            standing,
        }
    }

    /// The connection was lost, or is back.
    pub(crate) fn connection(&self, connected: bool) {
        self.learn(|known| known.connected = connected);
    }

    /// The entry is there. Says whether that is news.
    pub(crate) fn registered(&self, name: &str) -> bool {
        self.enter(RegistrationStatus::Registered(name.to_owned()))
    }

    /// No service of Zuul has registered below `node`, so there is no entry either.
    pub(crate) fn without_zuul(&self, node: String) {
        self.enter(RegistrationStatus::NoZuul(node));
    }

    /// Whether an entry of this session is in the registry, as far as is known.
    pub(crate) fn is_registered(&self) -> bool {
        matches!(self.lock().entry, Some(RegistrationStatus::Registered(_)))
    }

    fn enter(&self, entry: RegistrationStatus) -> bool {
        self.learn(|known| {
            let news = !known.withdrawn && known.entry.as_ref() != Some(&entry);
            if news {
                known.entry = Some(entry);
            }
            news
        })
    }

    /// The entry has been taken out on order.
    pub(crate) fn withdrawn(&self) {
        self.learn(|known| {
            known.entry = None;
            known.withdrawn = true;
        });
        self.standing.send_replace(RegistrationStatus::Withdrawn);
    }

    /// Notes something and publishes what follows.
    fn learn<T>(&self, note: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.lock();
        let noted = note(&mut known);
        if let Some(entry) = &known.entry {
            let now = match known.connected {
                true => entry.clone(),
                false => RegistrationStatus::ConnectionLost,
            };
            self.standing.send_if_modified(|standing| {
                let changed = *standing != now;
                *standing = now;
                changed
            });
        }
        noted
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Consistent between any two statements.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(name: &str) -> RegistrationStatus {
        RegistrationStatus::Registered(name.to_owned())
    }

    /// The keeper hears of the others in the moment in which the connection goes, and finds its entry
    /// as it should be.
    #[test]
    fn nothing_stands_without_a_connection() {
        let standing = watch::Sender::new(RegistrationStatus::Connecting);
        let presence = StatusTracker::new(&standing);
        presence.connection(false);
        assert_eq!(*standing.borrow(), RegistrationStatus::Connecting);
        presence.connection(true);
        assert!(presence.registered("gw1"));
        assert_eq!(*standing.borrow(), registered("gw1"));
        presence.connection(false);
        assert_eq!(*standing.borrow(), RegistrationStatus::ConnectionLost);
        assert!(!presence.registered("gw1"), "no news");
        assert_eq!(*standing.borrow(), RegistrationStatus::ConnectionLost);
        assert!(presence.registered("gw2"));
        assert_eq!(*standing.borrow(), RegistrationStatus::ConnectionLost);
        presence.connection(true);
        assert_eq!(*standing.borrow(), registered("gw2"));
    }

    #[test]
    fn what_is_out_stays_out() {
        let standing = watch::Sender::new(RegistrationStatus::SessionLost);
        let presence = StatusTracker::new(&standing);
        presence.registered("gw1");
        presence.withdrawn();
        presence.without_zuul("/zuul/components".to_owned());
        assert_eq!(*standing.borrow(), RegistrationStatus::Withdrawn);
        for connected in [false, true] {
            presence.connection(connected);
            assert_eq!(*standing.borrow(), RegistrationStatus::Withdrawn);
        }
    }

    #[test]
    fn a_missing_zuul_is_not_reported_while_the_connection_is_lost() {
        let standing = watch::Sender::new(RegistrationStatus::Connecting);
        let presence = StatusTracker::new(&standing);
        let without_zuul = RegistrationStatus::NoZuul("/zuul/components".to_owned());
        presence.without_zuul("/zuul/components".to_owned());
        assert_eq!(*standing.borrow(), without_zuul);
        presence.connection(false);
        assert_eq!(*standing.borrow(), RegistrationStatus::ConnectionLost);
        assert!(!presence.is_registered());
        presence.connection(true);
        assert_eq!(*standing.borrow(), without_zuul);
        assert!(presence.registered("gw1"));
        assert!(presence.is_registered());
    }
}
