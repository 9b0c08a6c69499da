//! Dropping root privileges, which are needed only to bind sockets.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{
    Gid, Uid, User, getegid, geteuid, getgroups, getresgid, getresuid, setegid, seteuid, setgid,
    setgroups, setuid,
};
use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, set_dumpable_behavior, umask};
use rustix::thread::set_no_new_privs;
use tracing::{debug, info};

/// Why the process cannot run as the configured user. Trying again does not help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegeError {
    #[error("user = {0}: there is no such user; create it or name another")]
    UnknownUser(String),
    #[error("user = {user}: cannot look the user up: {source}")]
    Lookup { user: String, source: Errno },
    #[error(
        "user = {user}: {call}: {source} (needs CAP_SETUID and CAP_SETGID; or start it as that user)"
    )]
    Refused { user: String, call: &'static str, source: Errno },
    #[error("user = {0}: root privileges cannot be dropped for good on this system")]
    Recoverable(String),
    /// One line for each file.
    #[error("{0}")]
    Unreadable(String),
}

/// Protects the keys in memory: no core dumps, no access by other processes of the same user, and
/// no privileges for programs that this process starts. Must be called while there is one thread.
pub(crate) fn harden() {
    // Both are in every supported kernel, and neither is a reason not to start.
    if let Err(error) = set_no_new_privs(true) {
        debug!(%error, "cannot set PR_SET_NO_NEW_PRIVS");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        debug!(%error, "cannot set PR_SET_DUMPABLE");
    }
}

/// The user that a process started by root runs as.
pub(crate) struct RunAsUser {
    name: String,
    uid: Uid,
    gid: Gid,
}

impl RunAsUser {
    /// Looks the user called `name` up. Returns `None` without a name and in a process that is not
    /// root: it cannot change its user, which may not even have a name in a container.
    ///
    /// # Errors
    /// There is no such user.
    pub(crate) fn find(name: Option<&str>) -> Result<Option<Self>, PrivilegeError> {
        let Some(name) = name.filter(|_| geteuid().is_root()) else { return Ok(None) };
        let name = name.to_owned();
        match User::from_name(&name) {
            Ok(Some(User { uid, gid, .. })) => Ok(Some(Self { name, uid, gid })),
            // ENOENT: there is no /etc/passwd, as in an empty container.
            Ok(None) | Err(Errno::ENOENT) => Err(PrivilegeError::UnknownUser(name)),
            Err(source) => Err(PrivilegeError::Lookup { user: name, source }),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the IDs of the user and of its group.
    pub(crate) fn ids(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Runs `action` with the user's effective IDs, so that the kernel checks its permissions
    /// instead of root's: files in directories of the user may be links to anywhere. Must be called
    /// while there is one thread.
    ///
    /// # Errors
    /// The kernel refuses a change of IDs.
    pub(crate) fn impersonate<T>(&self, action: impl FnOnce() -> T) -> Result<T, PrivilegeError> {
        let refused = |source| self.refused("cannot act as that user", source);
        let user = geteuid();
        let group = getegid();
        let groups = getgroups().map_err(refused)?;
        setgroups(&[]).map_err(refused)?;
        setegid(self.gid).map_err(refused)?;
        seteuid(self.uid).map_err(refused)?;
        let result = action();
        seteuid(user).map_err(refused)?;
        setegid(group).map_err(refused)?;
        setgroups(&groups).map_err(refused)?;
        Ok(result)
    }

    /// Changes the user of this process for good, and verifies that. Must be called while there is
    /// one thread.
    ///
    /// # Errors
    /// The kernel refuses, or the process could become root again.
    pub(crate) fn drop_privileges(&self) -> Result<(), PrivilegeError> {
        // Groups first: setgroups and setgid need root.
        setgroups(&[]).map_err(|source| self.refused("setgroups", source))?;
        setgid(self.gid).map_err(|source| self.refused("setgid", source))?;
        setuid(self.uid).map_err(|source| self.refused("setuid", source))?;
        if !self.is_permanent() {
            return Err(PrivilegeError::Recoverable(self.name.clone()));
        }
        // A change of user resets the dumpable attribute to fs.suid_dumpable.
        harden();
        umask(Mode::from_raw_mode(0o022));
        let (uid, gid) = self.ids();
        info!(user = self.name, uid, gid, "root privileges dropped");
        Ok(())
    }

    /// Returns whether real, effective and saved IDs are the user's, no supplementary group is
    /// left, and setuid to root fails (it would not if CAP_SETUID was kept; see securebits in
    /// capabilities(7)).
    fn is_permanent(&self) -> bool {
        let uids = getresuid().is_ok_and(|ids| {
            [ids.real, ids.effective, ids.saved].iter().all(|uid| *uid == self.uid)
        });
        let gids = getresgid().is_ok_and(|ids| {
            [ids.real, ids.effective, ids.saved].iter().all(|gid| *gid == self.gid)
        });
        let no_groups = getgroups().is_ok_and(|groups| groups.is_empty());
        let root_again = !self.uid.is_root() && setuid(Uid::from_raw(0)).is_ok();
        uids && gids && no_groups && !root_again
    }

    fn refused(&self, call: &'static str, source: Errno) -> PrivilegeError {
        PrivilegeError::Refused { user: self.name.clone(), call, source }
    }

    /// Checks that the user can read each of `files`. Must be called as that user.
    ///
    /// # Errors
    /// All files that cannot be read.
    pub(crate) fn check_readable<'f>(
        &self,
        files: impl IntoIterator<Item = &'f Path>,
    ) -> Result<(), PrivilegeError> {
        // A set, because one file may be named twice.
        let mut unreadable = BTreeSet::new();
        for file in files {
            if let Err(error) = File::open(file) {
                let file = file.display();
                unreadable.insert(format!("{file}: cannot be read by user {}: {error}", self.name));
            }
        }
        if unreadable.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = unreadable.into_iter().collect();
        Err(PrivilegeError::Unreadable(lines.join("\n")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_configured_user_nothing_is_looked_up() {
        assert!(RunAsUser::find(None).expect("no error").is_none());
    }

    #[test]
    fn unknown_user_is_an_error_only_for_root() {
        let user = RunAsUser::find(Some("no-such-user"));
        if geteuid().is_root() {
            let error = user.err().expect("an error").to_string();
            assert!(error.contains("no-such-user"), "{error}");
        } else {
            assert!(user.expect("no error").is_none());
        }
    }
}
