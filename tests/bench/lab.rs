//! What all measurements share: the roles, the certificates, the programs to measure.

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
    /// Of every gateway and proxy that speaks TLS: RSA with 2048 bits, as Zuul's own tools make
    /// them.
    pub(crate) identity: Identity,
    _authority: Authority,
    /// Our gateway, and others of `--also`.
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
            executor_address: executor.answer().await?,
            executor,
            client: Role::start("client")?,
            identity: authority.identity_rsa("localhost"),
            _authority: authority,
            gateways,
        })
    }

    /// Has `clients` ask `target` for short logs.
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
        self.client.ask(&job).await
    }

    /// Ends all quiet logs; returns how many streams ended as they should.
    pub(crate) async fn end_quiet(&mut self) -> Result<usize> {
        let _: executor::Done = self.executor.ask(&executor::Job::End).await?;
        let ends: client::Ends = self.client.ask(&client::Job::Ends).await?;
        Ok(ends.clean)
    }
}
