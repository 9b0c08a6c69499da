//! The service manager's notification protocol (sd_notify(3)). Without a manager all of it does
//! nothing.

use sd_notify::NotifyState;
use tracing::debug;

/// One line on how things stand, as `systemctl status` shows it.
pub(crate) fn status(line: &str) {
    notify(&[NotifyState::Status(line)]);
}

/// Ready: listening and registered.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// On the way out.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!(%error, "service manager not notified");
    }
}
