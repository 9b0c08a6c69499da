//! Giving up root: what was started as root to bind port 79 need not stay it.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
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

/// Makes the process keep its keys to itself: no core dumps, no reading of its memory by other
/// processes of the same user, and no program that it starts gains privileges. Call while there is one
/// thread.
pub(crate) fn harden() {
    // Neither can fail on a Linux that this program runs on, and neither is worth not to start.
    if let Err(error) = set_no_new_privs(true) {
        debug!(%error, "cannot set PR_SET_NO_NEW_PRIVS");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        debug!(%error, "cannot set PR_SET_DUMPABLE");
    }
}

/// Why the process cannot run as the configuration wants it to: for the operator to mend, trying
/// again does not help.
#[derive(Debug)]
pub(crate) struct PrivilegeError(String);

impl PrivilegeError {
    /// `reason` names the file, key or user, and what to do about it.
    pub(crate) fn new(reason: String) -> Self {
        Self(reason)
    }
}

impl fmt::Display for PrivilegeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for PrivilegeError {}

/// A user to become.
pub(crate) struct RunAsUser {
    name: String,
    uid: Uid,
    gid: Gid,
}

impl RunAsUser {
    /// The user called `name`; `None` where there is nothing to give up. Somebody who is not root
    /// cannot become another, and needs no entry among the users.
    ///
    /// # Errors
    /// There is no such user.
    pub(crate) fn of(name: Option<&str>) -> Result<Option<Self>, PrivilegeError> {
        let Some(name) = name.filter(|_| geteuid().is_root()) else { return Ok(None) };
        match User::from_name(name) {
            Ok(Some(User { uid, gid, .. })) => Ok(Some(Self { name: name.to_owned(), uid, gid })),
            // The latter without a list of users, as in an empty root.
            Ok(None) | Err(Errno::ENOENT) => Err(PrivilegeError(format!(
                "user = {name}: there is no such user; create it or name another"
            ))),
            Err(error) => {
                Err(PrivilegeError(format!("user = {name}: cannot be looked up: {error}")))
            }
        }
    }

    /// The user's and the group's number.
    pub(crate) fn ids(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Runs `action` with the user's effective ids, so that the kernel checks its permissions instead
    /// of root's: files in directories of the user may be links to anywhere. Call while there is one
    /// thread.
    ///
    /// # Errors
    /// The kernel refuses a change of ids.
    pub(crate) fn impersonate<T>(&self, action: impl FnOnce() -> T) -> Result<T, PrivilegeError> {
        let refused = |error| {
            PrivilegeError(format!(
                "user = {}: cannot act as that user: {error} (needs CAP_SETUID and CAP_SETGID; or \
                 start it as that user)",
                self.name
            ))
        };
        let (user, group) = (geteuid(), getegid());
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

    /// Makes this process the user's, for good, and looks whether it is. Call while there is one
    /// thread.
    ///
    /// # Errors
    /// The kernel refuses, or root could be had back.
    pub(crate) fn drop_privileges(&self) -> Result<(), PrivilegeError> {
        let refused = |call| {
            move |error| {
                PrivilegeError(format!(
                    "user = {}: {call}: {error} (needs CAP_SETUID and CAP_SETGID; or start it as \
                     that user)",
                    self.name
                ))
            }
        };
        // In this order: who is no longer root may change no group.
        setgroups(&[]).map_err(refused("setgroups"))?;
        setgid(self.gid).map_err(refused("setgid"))?;
        setuid(self.uid).map_err(refused("setuid"))?;
        self.verify()?;
        // A change of user sets the process's dumpable attribute to fs.suid_dumpable.
        harden();
        umask(Mode::from_raw_mode(0o022));
        info!(user = self.name, uid = self.uid.as_raw(), gid = self.gid.as_raw(), "root given up");
        Ok(())
    }

    /// Real, effective and saved numbers are the user's, no group is left, and root is out of
    /// reach (with CAP_SETUID kept it would not be; see securebits in capabilities(7)).
    fn verify(&self) -> Result<(), PrivilegeError> {
        let users = getresuid().is_ok_and(|ids| {
            [ids.real, ids.effective, ids.saved].iter().all(|uid| *uid == self.uid)
        });
        let groups = getresgid().is_ok_and(|ids| {
            [ids.real, ids.effective, ids.saved].iter().all(|gid| *gid == self.gid)
        });
        let no_more = getgroups().is_ok_and(|groups| groups.is_empty());
        let root_again = !self.uid.is_root() && setuid(Uid::from_raw(0)).is_ok();
        if users && groups && no_more && !root_again {
            return Ok(());
        }
        Err(PrivilegeError(format!("user = {}: root cannot be given up for good here", self.name)))
    }

    /// Looks whether the user can read each of `files`. Call when that is who we are.
    ///
    /// # Errors
    /// All that cannot be read.
    pub(crate) fn check_readable<'f>(
        &self,
        files: impl IntoIterator<Item = &'f Path>,
    ) -> Result<(), PrivilegeError> {
        // One file may be named twice.
        let mut faults = BTreeSet::new();
        for file in files {
            if let Err(error) = File::open(file) {
                let file = file.display();
                faults.insert(format!("{file}: cannot be read by user {}: {error}", self.name));
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(PrivilegeError(faults.into_iter().collect::<Vec<_>>().join("\n")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_asked_nothing_to_do() {
        assert!(RunAsUser::of(None).expect("no fault").is_none());
    }

    /// An unknown user is a fault for root alone.
    #[test]
    fn a_user_that_does_not_exist() {
        let account = RunAsUser::of(Some("no-such-user"));
        if geteuid().is_root() {
            let unfit = account.err().expect("a fault").to_string();
            assert!(unfit.contains("no-such-user"), "{unfit}");
        } else {
            assert!(account.expect("no fault").is_none());
        }
    }
}
