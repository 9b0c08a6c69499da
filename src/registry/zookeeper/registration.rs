//! Our own entry in the component registry: created once per session, kept up to date, deleted on
//! request.
//!
//! Rules of Zuul's readers (`zuul/zk/components.py`): the entry is an ephemeral sequential node
//! below `/zuul/components/fingergw/`, changes are written in place (a reader ignores a version
//! that is not higher than the one it knows), and a new session means a new node.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::{info, warn};
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use super::component_watcher::{COMPONENTS, Components, ComponentsSnapshot, DIRECTORY};
use super::retry::{retry, wait_to_retry};
use crate::model::component::{FINGERGW, OwnComponent, State};
use crate::registry::RegistrationStatus;

const ENTRY: CreateOptions<'static> = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());

/// What outlives the session of an entry.
#[derive(Default)]
pub(super) struct EntryHistory {
    /// The name of the entry that was created last, unless it was deleted since. It ends with its
    /// session, which still exists if it was given up for another one.
    last_entry: Option<String>,
    announced_model_api: AnnouncedModelApi,
}

/// The highest data model that our entries have announced.
///
/// Never lowered: if an older component joins, its own entry already holds the system at its
/// version, and ours might be written after it has left.
#[derive(Default)]
struct AnnouncedModelApi(u64);

impl AnnouncedModelApi {
    /// Returns what to announce in a system that uses `model_api`.
    fn observe(&mut self, model_api: u64) -> u64 {
        self.0 = self.0.max(model_api);
        self.0
    }
}

/// An entry that exists.
struct Entry {
    name: String,
    /// The state and data model that it announces; unknown after the response to its creation was
    /// lost.
    content: Option<(State, u64)>,
}

/// Our own entry during one session.
pub(super) struct OwnEntry<'a> {
    client: &'a Client,
    own: &'a OwnComponent,
    tracker: &'a StatusTracker<'a>,
    history: &'a mut EntryHistory,
    entry: Option<Entry>,
}

impl<'a> OwnEntry<'a> {
    pub(super) fn new(
        client: &'a Client,
        own: &'a OwnComponent,
        tracker: &'a StatusTracker<'a>,
        history: &'a mut EntryHistory,
    ) -> Self {
        Self { client, own, tracker, history, entry: None }
    }

    /// Keeps the entry as `state` and `components` require, until the session ends. Returns why it
    /// ended.
    pub(super) async fn keep(
        mut self,
        mut state: watch::Receiver<State>,
        mut components: watch::Receiver<Components>,
    ) -> Error {
        if let Err(error) = self.delete_last_entry().await {
            return error;
        }
        loop {
            let wanted = *state.borrow_and_update();
            let known = components.borrow_and_update().clone();
            let result = match (wanted, known) {
                (State::Stopped, _) => self.withdraw().await,
                (_, Components::Unknown) => Ok(()),
                (_, Components::NoZuul(node)) => {
                    self.tracker.set_entry(RegistrationStatus::NoZuul(node));
                    Ok(())
                }
                (_, Components::Known(snapshot)) => self.update(wanted, &snapshot).await,
            };
            if let Err(error) = result {
                return error;
            }
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return Error::ClientClosed },
                changed = components.changed() => if changed.is_err() { return Error::ClientClosed },
            }
        }
    }

    /// Deletes the entry of an earlier session: one process has at most one entry.
    async fn delete_last_entry(&mut self) -> Result<(), Error> {
        let Some(name) = &self.history.last_entry else { return Ok(()) };
        let path = path_of(name);
        match retry(|| self.client.delete(&path, None)).await {
            Ok(()) | Err(Error::NoNode) => {
                self.history.last_entry = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Creates the entry, or updates it in place.
    async fn update(&mut self, state: State, snapshot: &ComponentsSnapshot) -> Result<(), Error> {
        self.forget_if_deleted(snapshot).await?;
        let model_api = self.history.announced_model_api.observe(snapshot.model_api);
        let content = (state, model_api);
        let json = self.own.to_json(state, model_api);
        let name = loop {
            let Some(entry) = &mut self.entry else {
                self.entry = Some(self.create(&json, content).await?);
                continue;
            };
            if entry.content == Some(content) {
                break entry.name.clone();
            }
            let path = path_of(&entry.name);
            match retry(|| self.client.set_data(&path, json.as_bytes(), None)).await {
                Ok(_) => entry.content = Some(content),
                Err(Error::NoNode) => self.entry = None,
                Err(error) => return Err(error),
            }
        };
        self.history.last_entry = Some(name.clone());
        if self.tracker.set_entry(RegistrationStatus::Registered(name.clone())) {
            info!(session = %self.client.session_id(), "registered as {name}");
        }
        Ok(())
    }

    /// Forgets our entry if it does not exist any more.
    async fn forget_if_deleted(&mut self, snapshot: &ComponentsSnapshot) -> Result<(), Error> {
        let Some(entry) = &self.entry else { return Ok(()) };
        if snapshot.gateways.contains(&entry.name) {
            return Ok(());
        }
        // It may also be missing because the list is older than the entry.
        let path = path_of(&entry.name);
        if retry(|| self.client.check_stat(&path)).await?.is_none() {
            warn!(name = entry.name, "our registry entry was deleted, registering again");
            self.entry = None;
        }
        Ok(())
    }

    /// Creates one entry. After a lost response, looks for an entry of this session before it
    /// creates another one.
    async fn create(&self, json: &str, content: (State, u64)) -> Result<Entry, Error> {
        let prefix = path_of(&self.own.hostname);
        loop {
            match self.client.create(&prefix, json.as_bytes(), &ENTRY).await {
                Ok((_, sequence)) => {
                    let name = format!("{}{sequence}", self.own.hostname);
                    return Ok(Entry { name, content: Some(content) });
                }
                Err(Error::NoNode) => {
                    let parent = format!("{COMPONENTS}/{FINGERGW}");
                    retry(|| self.client.mkdir(&parent, &DIRECTORY)).await?;
                }
                Err(error) if wait_to_retry(&error).await => {
                    if let Some(name) = self.find_entry_of_session().await? {
                        return Ok(Entry { name, content: None });
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Finds the entry that belongs to this session.
    async fn find_entry_of_session(&self) -> Result<Option<String>, Error> {
        let client = self.client;
        let parent = format!("{COMPONENTS}/{FINGERGW}");
        // The server of this connection may not know the entry yet.
        retry(|| client.sync(&parent)).await?;
        let names = retry(|| client.list_children(&parent)).await?;
        for name in names.into_iter().filter(|name| name.starts_with(&self.own.hostname)) {
            let path = path_of(&name);
            let stat = retry(|| client.check_stat(&path)).await?;
            if stat.is_some_and(|stat| stat.ephemeral_owner == client.session_id().0) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Announces `stopped`, then deletes the entry.
    async fn withdraw(&mut self) -> Result<(), Error> {
        if let Some(entry) = self.entry.take() {
            let client = self.client;
            let path = path_of(&entry.name);
            let json = self.own.to_json(State::Stopped, self.history.announced_model_api.0);
            match retry(|| client.set_data(&path, json.as_bytes(), None)).await {
                Ok(_) | Err(Error::NoNode) => {}
                Err(error) => return Err(error),
            }
            match retry(|| client.delete(&path, None)).await {
                Ok(()) | Err(Error::NoNode) => {}
                Err(error) => return Err(error),
            }
            info!(name = entry.name, "registry entry deleted");
        }
        self.tracker.set_entry(RegistrationStatus::Withdrawn);
        Ok(())
    }
}

fn path_of(name: &str) -> String {
    format!("{COMPONENTS}/{FINGERGW}/{name}")
}

/// Derives the status of our registration in one session from the state of the entry and of the
/// connection.
///
/// Both are needed for every change: that the entry exists can become known after the connection
/// was lost.
pub(super) struct StatusTracker<'a> {
    known: Mutex<Known>,
    status: &'a watch::Sender<RegistrationStatus>,
}

struct Known {
    is_connected: bool,
    /// Registered, not registered or withdrawn; `None` until the first result.
    entry: Option<RegistrationStatus>,
}

impl<'a> StatusTracker<'a> {
    /// For a new session, which has a connection and no entry. `status` keeps its value until there
    /// is an entry.
    pub(super) fn new(status: &'a watch::Sender<RegistrationStatus>) -> Self {
        let known = Known { is_connected: true, entry: None };
        Self { known: Mutex::new(known), status }
    }

    pub(super) fn set_connected(&self, is_connected: bool) {
        let mut known = self.lock();
        known.is_connected = is_connected;
        self.publish(&known);
    }

    /// Returns whether `entry` differs from what was known. After a withdrawal it is ignored, as no
    /// other entry is created in this session.
    fn set_entry(&self, entry: RegistrationStatus) -> bool {
        let mut known = self.lock();
        let is_withdrawn = known.entry == Some(RegistrationStatus::Withdrawn);
        if is_withdrawn || known.entry.as_ref() == Some(&entry) {
            return false;
        }
        known.entry = Some(entry);
        self.publish(&known);
        true
    }

    /// Whether this session had an entry or was ready for one.
    pub(super) fn has_result(&self) -> bool {
        self.lock().entry.is_some()
    }

    fn publish(&self, known: &Known) {
        let now = match &known.entry {
            None => return,
            Some(RegistrationStatus::Withdrawn) => RegistrationStatus::Withdrawn,
            Some(_) if !known.is_connected => RegistrationStatus::ConnectionLost,
            Some(entry) => entry.clone(),
        };
        self.status.send_if_modified(|status| mem::replace(status, now.clone()) != now);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Consistent after each statement, so it can be used after a panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(name: &str) -> RegistrationStatus {
        RegistrationStatus::Registered(name.to_owned())
    }

    #[test]
    fn announced_data_model_rises_and_never_falls() {
        let mut announced = AnnouncedModelApi::default();
        for (system, expected) in [(36, 36), (30, 36), (38, 38), (37, 38), (40, 40), (15, 40)] {
            assert_eq!(announced.observe(system), expected);
        }
    }

    #[test]
    fn entry_that_becomes_known_after_the_connection_was_lost_is_not_reported() {
        let status = watch::Sender::new(RegistrationStatus::Connecting);
        let tracker = StatusTracker::new(&status);
        tracker.set_connected(false);
        assert_eq!(*status.borrow(), RegistrationStatus::Connecting);
        tracker.set_connected(true);
        assert!(tracker.set_entry(registered("gw1")));
        assert_eq!(*status.borrow(), registered("gw1"));
        tracker.set_connected(false);
        assert_eq!(*status.borrow(), RegistrationStatus::ConnectionLost);
        assert!(!tracker.set_entry(registered("gw1")), "known already");
        assert_eq!(*status.borrow(), RegistrationStatus::ConnectionLost);
        assert!(tracker.set_entry(registered("gw2")));
        assert_eq!(*status.borrow(), RegistrationStatus::ConnectionLost);
        tracker.set_connected(true);
        assert_eq!(*status.borrow(), registered("gw2"));
    }

    #[test]
    fn withdrawn_entry_stays_withdrawn() {
        let status = watch::Sender::new(RegistrationStatus::SessionLost);
        let tracker = StatusTracker::new(&status);
        tracker.set_entry(registered("gw1"));
        tracker.set_entry(RegistrationStatus::Withdrawn);
        tracker.set_entry(RegistrationStatus::NoZuul("/zuul/components".to_owned()));
        assert_eq!(*status.borrow(), RegistrationStatus::Withdrawn);
        for is_connected in [false, true] {
            tracker.set_connected(is_connected);
            assert_eq!(*status.borrow(), RegistrationStatus::Withdrawn);
        }
    }

    #[test]
    fn missing_zuul_is_not_reported_while_the_connection_is_lost() {
        let status = watch::Sender::new(RegistrationStatus::Connecting);
        let tracker = StatusTracker::new(&status);
        let no_zuul = RegistrationStatus::NoZuul("/zuul/components".to_owned());
        tracker.set_entry(no_zuul.clone());
        assert_eq!(*status.borrow(), no_zuul);
        tracker.set_connected(false);
        assert_eq!(*status.borrow(), RegistrationStatus::ConnectionLost);
        tracker.set_connected(true);
        assert_eq!(*status.borrow(), no_zuul);
        assert!(tracker.set_entry(registered("gw1")));
        assert_eq!(*status.borrow(), registered("gw1"));
    }
}
