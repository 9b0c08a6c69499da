//! The shipped units in a machine that systemd has booted.

use crate::support::debian_root::{Root, beside_debian};

/// What installs packages and starts units in such machines can trust them.
#[test]
fn machines_that_systemd_runs() {
    beside_debian(async || {
        let [first, second] = [Root::new(), Root::new()];
        first.write("/etc/mark", "the first\n");
        let one = first.boot(&[]).await;
        let other = second.boot(&[]).await;
        for machine in [&one, &other] {
            assert_eq!(machine.succeeds("systemctl is-system-running --wait").await, "running\n");
        }
        assert_eq!(one.succeeds("cat /etc/mark").await, "the first\n");
        assert_eq!(other.succeeds("cat /etc/mark || echo none").await, "none\n");
        drop(one);
        other.succeeds("systemctl is-active multi-user.target").await;
    });
}
