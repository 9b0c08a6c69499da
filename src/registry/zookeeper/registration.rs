//! Our own entry: made once a session, kept true, taken out on order.
//!
//! Rules of Zuul's readers (`zuul/zk/components.py`): the name is an ephemeral sequence below
//! `/zuul/components/fingergw/`, changes are written in place (a reader ignores a version that is
//! not higher), a new session means a new node.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tracing::{info, warn};
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error};

use super::component_watcher::{COMPONENTS, ComponentsSnapshot, DIRECTORY};
use super::registration_status::StatusTracker;
use super::session::{is_connection_loss, retry};
use crate::model::component::{FINGERGW, OwnComponent, State};

const ENTRY: CreateOptions<'static> = CreateMode::EphemeralSequential.with_acls(Acls::anyone_all());

/// An entry that is there.
struct Entry {
    name: String,
    /// What it says of our state and data model; unknown for one that was adopted.
    written: Option<(State, u64)>,
}

/// The data model that our entries announce: it rises with the system's and never falls. Where somebody
/// older joins, that one's own entry holds the system back for as long as it is there; ours, written
/// when it may be gone again, would do so alone.
#[derive(Default)]
pub(crate) struct ModelApi(AtomicU64);

impl ModelApi {
    /// What to announce in a system that speaks `model_api`.
    fn raised_to(&self, model_api: u64) -> u64 {
        self.0.fetch_max(model_api, Ordering::Relaxed).max(model_api)
    }

    /// What an entry of ours says at most.
    fn announced(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Keeps the entry as `wanted` and the other components say, in place of the one that an earlier
/// session may have `left_behind`, and tells `presence`. Ends only with the session.
pub(crate) async fn keep(
    client: &Client,
    announcement: &OwnComponent,
    mut wanted: watch::Receiver<State>,
    presence: &StatusTracker<'_>,
    mut snapshot: watch::Receiver<Option<ComponentsSnapshot>>,
    left_behind: &watch::Sender<Option<String>>,
    model_api: &ModelApi,
) -> Error {
    if let Err(error) = remove_left_behind(client, left_behind).await {
        return error;
    }
    let mut entry = None;
    loop {
        let state = *wanted.borrow_and_update();
        let others = snapshot.borrow_and_update().clone();
        let step = match others {
            _ if state == State::Stopped => withdraw(client, announcement, entry.take(), model_api)
                .await
                .map(|()| presence.withdrawn()),
            // Not before it is known which data model the system speaks.
            None => Ok(()),
            Some(others) => {
                let current = (state, model_api.raised_to(others.model_api));
                renew(client, announcement, &mut entry, current, &others).await.map(|name| {
                    left_behind.send_replace(Some(name.clone()));
                    if presence.registered(&name) {
                        info!(session = %client.session_id(), "registered as {name}");
                    }
                })
            }
        };
        if let Err(error) = step {
            return error;
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return Error::ClientClosed },
            changed = snapshot.changed() => if changed.is_err() { return Error::ClientClosed },
        }
    }
}

/// Takes out the entry of a session that was given up before it ended: one process has one entry.
async fn remove_left_behind(
    client: &Client,
    left_behind: &watch::Sender<Option<String>>,
) -> Result<(), Error> {
    let Some(name) = left_behind.borrow().clone() else { return Ok(()) };
    let path = path_of(&name);
    match retry(|| client.delete(&path, None)).await {
        Ok(()) | Err(Error::NoNode) => {
            left_behind.send_replace(None);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Makes the entry or brings it up to date; returns its name.
async fn renew(
    client: &Client,
    announcement: &OwnComponent,
    entry: &mut Option<Entry>,
    (state, model_api): (State, u64),
    others: &ComponentsSnapshot,
) -> Result<String, Error> {
    if let Some(ours) = entry
        && !others.gateways.contains(&ours.name)
    {
        // Not listed yet, or not any more: somebody may take it out before it was ever listed.
        let path = path_of(&ours.name);
        if retry(|| client.check_stat(&path)).await?.is_none() {
            warn!(name = ours.name, "our entry was taken out by somebody; registering again");
            *entry = None;
        }
    }
    let current = Some((state, model_api));
    let content = announcement.to_json(state, model_api);
    loop {
        if let Some(ours) = entry {
            if ours.written == current {
                return Ok(ours.name.clone());
            }
            let path = path_of(&ours.name);
            match retry(|| client.set_data(&path, content.as_bytes(), None)).await {
                Ok(_) => ours.written = current,
                Err(Error::NoNode) => *entry = None,
                Err(error) => return Err(error),
            }
        } else {
            *entry = Some(create(client, &announcement.hostname, &content, current).await?);
        }
    }
}

/// Makes one entry, and only one: where the connection broke before the answer, the entry of this
/// session is looked for before another is made.
async fn create(
    client: &Client,
    hostname: &str,
    content: &str,
    written: Option<(State, u64)>,
) -> Result<Entry, Error> {
    let prefix = path_of(hostname);
    loop {
        match client.create(&prefix, content.as_bytes(), &ENTRY).await {
            Ok((_, sequence)) => {
                return Ok(Entry { name: format!("{hostname}{sequence}"), written });
            }
            Err(error) if is_connection_loss(&error) => {
                if let Some(name) = own_entry(client, hostname).await? {
                    return Ok(Entry { name, written: None });
                }
            }
            Err(Error::NoNode) => {
                let directory = format!("{COMPONENTS}/{FINGERGW}");
                retry(|| client.mkdir(&directory, &DIRECTORY)).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The entry that belongs to this session, if there is one.
async fn own_entry(client: &Client, hostname: &str) -> Result<Option<String>, Error> {
    let directory = format!("{COMPONENTS}/{FINGERGW}");
    // Another server may not have heard of the entry yet.
    retry(|| client.sync(&directory)).await?;
    let names = retry(|| client.list_children(&directory)).await?;
    for name in names.into_iter().filter(|name| name.starts_with(hostname)) {
        let path = path_of(&name);
        let stat = retry(|| client.check_stat(&path)).await?;
        if stat.is_some_and(|stat| stat.ephemeral_owner == client.session_id().0) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Says `stopped`, then takes the entry out.
async fn withdraw(
    client: &Client,
    announcement: &OwnComponent,
    entry: Option<Entry>,
    model_api: &ModelApi,
) -> Result<(), Error> {
    let Some(entry) = entry else { return Ok(()) };
    let path = path_of(&entry.name);
    // Going away changes nothing else.
    let content = announcement.to_json(State::Stopped, model_api.announced());
    for step in [
        retry(|| client.set_data(&path, content.as_bytes(), None)).await.map(|_| ()),
        retry(|| client.delete(&path, None)).await,
    ] {
        match step {
            Ok(()) | Err(Error::NoNode) => {}
            Err(error) => return Err(error),
        }
    }
    info!(name = entry.name, "entry taken out of the component registry");
    Ok(())
}

fn path_of(name: &str) -> String {
    format!("{COMPONENTS}/{FINGERGW}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_model_rises_and_never_falls() {
        let model_api = ModelApi::default();
        for (system, announced) in [(36, 36), (30, 36), (38, 38), (37, 38), (40, 40), (15, 40)] {
            assert_eq!(model_api.raised_to(system), announced);
            assert_eq!(model_api.announced(), announced);
        }
    }
}
