//! A Zuul system below its own chroot: components and build requests as Zuul writes them, and the
//! entries of our gateways.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use zookeeper_client::{Acl, Acls, AuthId, Client, CreateMode, Error, Permission, Stat};

use super::proxy::Proxy;
use super::within;
use super::zookeeper::{self, ZooKeeper};

/// Tenant of builds for which the test does not need a certain one.
pub(crate) const TENANT: &str = "tenant-one";

pub(crate) const GATEWAYS: &str = "/zuul/components/fingergw";

pub(crate) struct System {
    pub(crate) zookeeper: Arc<ZooKeeper>,
    pub(crate) client: Client,
    chroot: String,
}

/// The executor of a build, as its build request names it.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) hostname: String,
    pub(crate) port: u16,
    pub(crate) zone: Option<String>,
}

/// A gateway's registry entry.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) content: Value,
    pub(crate) text: String,
    pub(crate) stat: Stat,
}

impl System {
    /// A new system in the shared ZooKeeper.
    pub(crate) async fn new() -> Self {
        Self::on(zookeeper::shared().await).await
    }

    /// A new system in the given ZooKeeper.
    pub(crate) async fn on(zookeeper: Arc<ZooKeeper>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let chroot = format!("/system{number}-{}", fastrand::u32(..));
        let root = zookeeper.client("").await;
        let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
        root.create(&chroot, b"", &node).await.expect("a chroot");
        let client = zookeeper.client(&chroot).await;
        make_kinds(&client).await;
        Self { zookeeper, client, chroot }
    }

    /// The system at the root of a ZooKeeper of its own.
    pub(crate) async fn at_root(zookeeper: &Arc<ZooKeeper>) -> Self {
        let client = zookeeper.client("").await;
        make_kinds(&client).await;
        Self { zookeeper: Arc::clone(zookeeper), client, chroot: String::new() }
    }

    /// The connect string.
    pub(crate) fn hosts(&self) -> String {
        self.zookeeper.hosts(&self.chroot)
    }

    /// The system's node.
    pub(crate) fn chroot(&self) -> &str {
        &self.chroot
    }

    /// The connect string through `proxy`.
    pub(crate) fn hosts_via(&self, proxy: &Proxy) -> String {
        format!("{}{}", proxy.address, self.chroot)
    }

    /// Writes `data` at `path` and creates the parents.
    pub(crate) async fn put(&self, path: &str, data: &[u8]) {
        let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
        let (parent, _) = path.rsplit_once('/').expect("an absolute path");
        if !parent.is_empty() {
            self.client.mkdir(parent, &node).await.expect("the parents");
        }
        match self.client.create(path, data, &node).await {
            Ok(_) => {}
            Err(Error::NodeExists) => {
                self.client.set_data(path, data, None).await.expect("new data");
            }
            Err(error) => panic!("{path}: {error}"),
        }
    }

    /// Denies all clients to read `path`. Other operations stay allowed.
    pub(crate) async fn hide(&self, path: &str) {
        let allowed =
            Permission::ADMIN | Permission::CREATE | Permission::DELETE | Permission::WRITE;
        self.set_permission(path, allowed).await;
    }

    /// Allows all clients to read `path` again.
    pub(crate) async fn show(&self, path: &str) {
        self.set_permission(path, Permission::ALL).await;
    }

    async fn set_permission(&self, path: &str, allowed: Permission) {
        let acl = [Acl::new(allowed, AuthId::anyone())];
        self.client.set_acl(path, &acl, None).await.expect("another ACL");
    }

    pub(crate) async fn remove(&self, path: &str) {
        self.client.delete(path, None).await.expect("a node to delete");
    }

    /// Writes a component of `kind` with this `model_api`. Returns its path.
    pub(crate) async fn put_component(&self, kind: &str, model_api: u64) -> String {
        let path = format!("/zuul/components/{kind}/{kind}{:010}", fastrand::u32(..));
        let content = json!({
            "hostname": kind, "kind": kind, "model_api": model_api, "state": "running",
            "version": "14.3.0",
        });
        self.put(&path, content.to_string().as_bytes()).await;
        path
    }

    /// Writes another gateway's entry. Returns its path.
    pub(crate) async fn put_gateway(
        &self,
        zone: Option<&str>,
        port: Option<u16>,
        use_ssl: bool,
        state: &str,
    ) -> String {
        let path = format!("{GATEWAYS}/localhost{:010}", fastrand::u32(..));
        let content = json!({
            "hostname": "localhost", "kind": "fingergw", "model_api": 38, "public_port": port,
            "state": state, "use_ssl": use_ssl, "version": "14.3.0", "zone": zone,
        });
        self.put(&path, content.to_string().as_bytes()).await;
        path
    }

    /// Changes zone and state of such an entry.
    pub(crate) async fn change_gateway(&self, path: &str, zone: &str, state: &str) {
        let (content, _) = self.client.get_data(path).await.expect("the entry");
        let mut content: Value = serde_json::from_slice(&content).expect("JSON");
        content["zone"] = zone.into();
        content["state"] = state.into();
        self.put(path, content.to_string().as_bytes()).await;
    }

    /// Writes a build request to the queue of `queue_zone`, accepted by `worker` if there is one.
    /// Returns the build's UUID.
    pub(crate) async fn put_build(
        &self,
        queue_zone: Option<&str>,
        worker: Option<&Worker>,
    ) -> String {
        let build = format!("{:032x}", fastrand::u128(..));
        self.place_build(queue_zone, &build, worker).await;
        build
    }

    /// Like [`Self::put_build`] for a build that may exist already on another worker.
    pub(crate) async fn place_build(
        &self,
        queue_zone: Option<&str>,
        build: &str,
        worker: Option<&Worker>,
    ) {
        self.place_build_of(Some(TENANT), queue_zone, build, worker).await;
    }

    /// Like [`Self::place_build`] for a build of another tenant or without one.
    pub(crate) async fn place_build_of(
        &self,
        tenant: Option<&str>,
        queue_zone: Option<&str>,
        build: &str,
        worker: Option<&Worker>,
    ) {
        let request = request(tenant, queue_zone, build, worker);
        self.put(&request_path(queue_zone, build), request.as_bytes()).await;
    }

    /// Returns all gateways' entries.
    pub(crate) async fn entries(&self) -> Vec<Entry> {
        let names = match self.client.list_children(GATEWAYS).await {
            Err(Error::NoNode) => Vec::new(),
            names => names.expect("the gateways' entries"),
        };
        let mut entries = Vec::new();
        for name in names {
            match self.client.get_data(&format!("{GATEWAYS}/{name}")).await {
                Ok((data, stat)) => {
                    let text = String::from_utf8(data).expect("UTF-8");
                    let content = serde_json::from_str(&text).unwrap_or(Value::Null);
                    entries.push(Entry { name, content, text, stat });
                }
                Err(Error::NoNode) => {}
                Err(error) => panic!("{name}: {error}"),
            }
        }
        entries
    }

    /// Waits until the gateways' entries satisfy `wanted`. Watches trigger each check.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&[Entry]) -> bool) -> Vec<Entry> {
        let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
        self.client.mkdir(GATEWAYS, &node).await.expect("the gateways' directory");
        within(what, async {
            loop {
                let mut watches = tokio::task::JoinSet::new();
                let listing = self.client.get_and_watch_children(GATEWAYS).await;
                let (names, _, watch) = listing.expect("the gateways' entries");
                watches.spawn(watch.changed());
                for name in names {
                    let path = format!("{GATEWAYS}/{name}");
                    if let Ok((_, _, watch)) = self.client.get_and_watch_data(&path).await {
                        watches.spawn(watch.changed());
                    }
                }
                let entries = self.entries().await;
                if wanted(&entries) {
                    return entries;
                }
                watches.join_next().await;
            }
        })
        .await
    }
}

/// Creates the nodes that each service of Zuul creates when it starts (`zuul/zk/components.py`).
async fn make_kinds(client: &Client) {
    let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
    for kind in ["scheduler", "executor", "merger", "fingergw", "web", "launcher"] {
        let path = format!("/zuul/components/{kind}");
        client.mkdir(&path, &node).await.expect("the nodes of a live Zuul");
    }
}

/// Returns a build request as Zuul writes it; without a `tenant`, which Zuul always writes.
pub(crate) fn request(
    tenant: Option<&str>,
    queue_zone: Option<&str>,
    build: &str,
    worker: Option<&Worker>,
) -> String {
    let worker = worker.map(|worker| {
        json!({
            "hostname": worker.hostname, "log_port": worker.port, "zone": worker.zone,
        })
    });
    let mut request = json!({
        "build_set_uuid": "a", "event_id": "b", "job_uuid": "c", "pipeline_name": "gate",
        "precedence": 200, "result_path": null, "span_context": null, "state": "running",
        "tenant_name": tenant, "uuid": build, "worker_info": worker, "zone": queue_zone,
    });
    if tenant.is_none() {
        request.as_object_mut().expect("an object").remove("tenant_name");
    }
    request.to_string()
}

/// Returns the path of the request of `build`.
pub(crate) fn request_path(zone: Option<&str>, build: &str) -> String {
    match zone {
        Some(zone) => format!("/zuul/executor/zones/{zone}/requests/{build}"),
        None => format!("/zuul/executor/unzoned/requests/{build}"),
    }
}
