//! What all measurements share: roles, certificates, and the programs to measure.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::client::{self, Requests};
use crate::executor;
use crate::log::SHORT;
use crate::role::Role;
use crate::support::certificates::{Authority, Identity};
use crate::targets::Running;

pub(crate) struct Lab {
    pub(crate) executor: Role,
    pub(crate) executor_address: SocketAddr,
    pub(crate) client: Role,
    /// The identity of every gateway and proxy with TLS: RSA with 2048 bits, as Zuul's tools
    /// create.
    pub(crate) identity: Identity,
    _authority: Authority,
    /// This gateway, then those of `--also`.
    pub(crate) gateways: Vec<PathBuf>,
}

impl Lab {
    pub(crate) async fn new(gateways: Vec<PathBuf>) -> Result<Self> {
        for gateway in &gateways {
            let there = gateway.is_file().then_some(());
            there.with_context(|| {
                format!("{} is missing (tests/bench/run builds it)", gateway.display())
            })?;
        }
        let authority = Authority::new();
        let mut executor = Role::start("executor")?;
        Ok(Self {
            executor_address: executor.reply().await?,
            executor,
            client: Role::start("client")?,
            identity: authority.identity_rsa("localhost"),
            _authority: authority,
            gateways,
        })
    }

    /// Lets `clients` request short logs from `target`.
    pub(crate) async fn requests(
        &mut self,
        target: &Running,
        builds: &[String],
        once: bool,
        clients: usize,
        milliseconds: u64,
    ) -> Result<Requests> {
        let job = client::Job::Requests {
            address: target.address,
            builds: builds.to_vec(),
            once,
            clients,
            milliseconds,
            bytes: SHORT as usize,
        };
        self.client.run(&job).await
    }

    /// Ends all idle streams. Returns how many ended cleanly.
    pub(crate) async fn end_quiet(&mut self) -> Result<usize> {
        let _: executor::Done = self.executor.run(&executor::Job::End).await?;
        let ends: client::Ends = self.client.run(&client::Job::Ends).await?;
        Ok(ends.clean)
    }
}
