//! Zuul's side of a measurement: zones, and builds by the thousand, in a real ZooKeeper.

use anyhow::{Context as _, Result};
use serde_json::json;
use zookeeper_client::{Acls, CreateMode};

use crate::support::system::{System, request_path};
use crate::support::zookeeper::ZooKeeper;

/// Written in one request to ZooKeeper, which takes a megabyte.
const AT_ONCE: usize = 500;

/// A system of Zuul's, with its zones.
pub(crate) struct Zuul {
    pub(crate) system: System,
    /// Where builds are: the one that a gateway which asks for zones one after the other asks last.
    pub(crate) zone: String,
}

impl Zuul {
    /// A new one with so many zones.
    pub(crate) async fn new(zones: usize) -> Result<Self> {
        // As large as production's. Each sample has a new one, which Java's second compiler would
        // never get warm within; the first one has finished when the measurement begins.
        let java = &["-Xms1g", "-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"];
        let zookeeper = ZooKeeper::start_with(java).await;
        let system = System::on(zookeeper).await;
        for number in 0..zones {
            system.put(&format!("{ZONES}/zone-{number:03}/requests"), b"").await;
        }
        // What Zuul's own programs expect to be there.
        system.put("/zuul/executor/unzoned/requests", b"").await;
        let (names, _) = system.client.get_children(ZONES).await?;
        let zone = names.last().context("a zone")?.clone();
        Ok(Self { system, zone })
    }

    /// Writes the requests of `builds`, which run on an executor of this zone at `port`.
    pub(crate) async fn add(&self, builds: &[String], port: u16) -> Result<()> {
        let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
        for builds in builds.chunks(AT_ONCE) {
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

    /// Takes the requests of `builds` out again.
    pub(crate) async fn remove(&self, builds: &[String]) -> Result<()> {
        for builds in builds.chunks(AT_ONCE) {
            let mut writer = self.system.client.new_multi_writer();
            for build in builds {
                writer.add_delete(&request_path(Some(&self.zone), build), None)?;
            }
            writer.commit().await.context("builds out of ZooKeeper")?;
        }
        Ok(())
    }
}

const ZONES: &str = "/zuul/executor/zones";
