//! A sandbox that denies system calls, as container runtimes do: seccomp(2).

use std::collections::BTreeMap;
use std::thread;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// System calls that a sandbox denies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Denied {
    /// splice(2).
    Splice,
    /// The options of tcp(7) that a sandbox with an incomplete TCP lacks: keepalive times,
    /// TCP_QUICKACK.
    OptionalTcpOptions,
}

impl Denied {
    fn rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        let is = |argument, value| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
                .expect("a condition")
        };
        let tcp_option = |option: i32| {
            let (level, option) = (libc::IPPROTO_TCP as u64, option as u64);
            SeccompRule::new(vec![is(1, level), is(2, option)]).expect("a rule")
        };
        let (call, rules) = match self {
            Self::Splice => (libc::SYS_splice, Vec::new()),
            Self::OptionalTcpOptions => {
                let options = [
                    libc::TCP_KEEPIDLE,
                    libc::TCP_KEEPINTVL,
                    libc::TCP_KEEPCNT,
                    libc::TCP_QUICKACK,
                ];
                (libc::SYS_setsockopt, options.map(tcp_option).to_vec())
            }
        };
        BTreeMap::from([(call, rules)])
    }
}

/// Runs an asynchronous test in a thread in which `denied` fails with `errno`, also in all
/// processes that the test starts.
pub(crate) fn without(denied: Denied, errno: i32, test: impl AsyncFnOnce() + Send + 'static) {
    let run = move || {
        let action = SeccompAction::Errno(errno.cast_unsigned());
        let arch = std::env::consts::ARCH.try_into().expect("an architecture with seccomp");
        let filter = SeccompFilter::new(denied.rules(), SeccompAction::Allow, action, arch);
        let filter: BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
        seccompiler::apply_filter(&filter).expect("seccomp(2)");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(test());
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}
