//! Zuul's data in a real ZooKeeper: zones, and thousands of builds.

use anyhow::{Context as _, Result};
use serde_json::json;
use zookeeper_client::{Acls, CreateMode};

use crate::support::system::{System, request_path};
use crate::support::zookeeper::ZooKeeper;

/// The most builds written in one request to ZooKeeper, whose limit is a megabyte.
const PER_REQUEST: usize = 500;

/// A Zuul system with its zones.
pub(crate) struct Zuul {
    pub(crate) system: System,
    /// The zone of all builds: the last one in ZooKeeper's list, so a gateway that reads zones in
    /// sequence reads it last.
    pub(crate) zone: String,
}

impl Zuul {
    /// Creates a system with this number of zones.
    pub(crate) async fn new(zones: usize) -> Result<Self> {
        // A heap as in production, and only Java's first compiler, which has finished when the
        // measurement begins. The second one would not finish within a sample.
        let java = &["-Xms1g", "-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"];
        let zookeeper = ZooKeeper::start_with(java).await;
        let system = System::on(zookeeper).await;
        for number in 0..zones {
            system.put(&format!("{ZONES}/zone-{number:03}/requests"), b"").await;
        }
        // Zuul's own programs expect this node.
        system.put("/zuul/executor/unzoned/requests", b"").await;
        let (names, _) = system.client.get_children(ZONES).await?;
        let zone = names.last().context("a zone")?.clone();
        Ok(Self { system, zone })
    }

    /// Writes the requests of `builds`, which run on an executor of this zone at `port`.
    pub(crate) async fn add(&self, builds: &[String], port: u16) -> Result<()> {
        let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
        for builds in builds.chunks(PER_REQUEST) {
            let mut writer = self.system.client.new_multi_writer();
            for build in builds {
                let request = json!({
                    "build_set_uuid": "a", "event_id": "b", "job_uuid": "c",
                    "pipeline_name": "gate", "precedence": 200, "result_path": null,
                    "span_context": null, "state": "running", "tenant_name": "tenant",
                    "uuid": build, "zone": self.zone,
                    "worker_info": {"hostname": "127.0.0.1", "log_port": port, "zone": self.zone},
                });
                let path = request_path(Some(&self.zone), build);
                writer.add_create(&path, request.to_string().as_bytes(), &node)?;
            }
            writer.commit().await.context("new builds in ZooKeeper")?;
        }
        Ok(())
    }

    /// Deletes the requests of `builds`.
    pub(crate) async fn remove(&self, builds: &[String]) -> Result<()> {
        for builds in builds.chunks(PER_REQUEST) {
            let mut writer = self.system.client.new_multi_writer();
            for build in builds {
                writer.add_delete(&request_path(Some(&self.zone), build), None)?;
            }
            writer.commit().await.context("deleting builds from ZooKeeper")?;
        }
        Ok(())
    }
}

const ZONES: &str = "/zuul/executor/zones";
