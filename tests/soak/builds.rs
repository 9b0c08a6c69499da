//! The builds that clients request. They are replaced all the time, as in a real Zuul.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use zookeeper_client::{Acls, Client, CreateMode, Error};

use crate::lab::{Lab, ZONES};
use crate::log::{End, LINE, LONGEST, Log};
use crate::support::system::{TENANT, request, request_path};
use tokio::time::sleep;

/// The pause between two changes, and before a retry after an error of ZooKeeper.
const PAUSE: Duration = Duration::from_millis(200);

/// The kinds of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Short,
    Slow,
    Bulk,
    /// Short, and aborted by the executor.
    ShortAborted,
    /// Bulk, and aborted by the executor.
    BulkAborted,
    /// Closed by the executor before any data.
    Empty,
    /// Not yet taken by an executor.
    Queued,
}

impl Shape {
    /// The number of builds of each kind at any time.
    const ALL: [(Self, usize); 7] = [
        (Self::Short, 60),
        (Self::Slow, 30),
        (Self::Bulk, 20),
        (Self::ShortAborted, 6),
        (Self::BulkAborted, 6),
        (Self::Empty, 4),
        (Self::Queued, 4),
    ];

    fn build(self, rng: &mut fastrand::Rng) -> String {
        let (end, length, pace) = match self {
            Self::Short | Self::Queued => (End::Complete, rng.u32(1..8192), 0),
            // From 1 to 30 seconds.
            Self::Slow => (End::Complete, rng.u32(20..300) * LINE as u32, rng.u16(50..100)),
            Self::Bulk => (End::Complete, rng.u32(1 << 18..LONGEST / 2), 0),
            Self::ShortAborted => (End::Reset, rng.u32(1..8192), 0),
            Self::BulkAborted => (End::Reset, rng.u32(1 << 18..LONGEST / 8), 0),
            Self::Empty => (End::Empty, 0, 0),
        };
        Log::build(rng, end, length, pace)
    }
}

pub(crate) struct Build {
    pub(crate) id: String,
    pub(crate) zone: usize,
    pub(crate) shape: Shape,
}

pub(crate) struct Builds {
    all: Mutex<Vec<Arc<Build>>>,
}

impl Builds {
    pub(crate) async fn new(lab: &Lab, rng: &mut fastrand::Rng) -> Self {
        let mut all = Vec::new();
        for (shape, count) in Shape::ALL {
            for _ in 0..count {
                let build = new(shape, rng);
                add(lab, &lab.system.client, &build).await.expect("a new build");
                all.push(Arc::new(build));
            }
        }
        Self { all: Mutex::new(all) }
    }

    /// Creates a short build in each zone that is not replaced.
    pub(crate) async fn probes(lab: &Lab, rng: &mut fastrand::Rng) -> [String; 2] {
        let mut probes = Vec::new();
        for zone in 0..ZONES.len() {
            let build = Build { zone, ..new(Shape::Short, rng) };
            add(lab, &lab.system.client, &build).await.expect("a new build");
            probes.push(build.id);
        }
        probes.try_into().expect("two zones")
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Build>>> {
        self.all.lock().expect("no panic while it is locked")
    }

    /// A random build of this shape. It is not deleted before the returned reference is dropped.
    pub(crate) fn draw(&self, shape: Shape, rng: &mut fastrand::Rng) -> Arc<Build> {
        let all = self.all();
        let fitting: Vec<_> = all.iter().filter(|build| build.shape == shape).collect();
        Arc::clone(fitting[rng.usize(..fitting.len())])
    }

    /// Replaces random builds forever.
    pub(crate) async fn replace_forever(&self, lab: &Lab, mut rng: fastrand::Rng) {
        let mut client = lab.system.client.clone();
        loop {
            let index = rng.usize(..self.all().len());
            let fresh = new(self.all()[index].shape, &mut rng);
            while let Err(error) = add(lab, &client, &fresh).await {
                client = client_after(lab, client, error).await;
            }
            let old = std::mem::replace(&mut self.all()[index], Arc::new(fresh));
            // No client finds the old build now; those that have found it finish first.
            while Arc::strong_count(&old) > 1 {
                sleep(PAUSE).await;
            }
            let path = request_path(Some(ZONES[old.zone]), &old.id);
            loop {
                match client.delete(&path, None).await {
                    Ok(()) | Err(Error::NoNode) => break,
                    Err(error) => client = client_after(lab, client, error).await,
                }
            }
            sleep(PAUSE).await;
        }
    }
}

fn new(shape: Shape, rng: &mut fastrand::Rng) -> Build {
    Build { id: shape.build(rng), zone: rng.usize(..ZONES.len()), shape }
}

async fn add(lab: &Lab, client: &Client, build: &Build) -> Result<(), Error> {
    let zone = ZONES[build.zone];
    let worker = (build.shape != Shape::Queued).then(|| lab.worker(build.zone));
    let content = request(Some(TENANT), Some(zone), &build.id, worker.as_ref());
    let path = request_path(Some(zone), &build.id);
    let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
    let (parent, _) = path.rsplit_once('/').expect("an absolute path");
    client.mkdir(parent, &node).await?;
    match client.create(&path, content.as_bytes(), &node).await {
        // It exists if the response to an earlier attempt was lost.
        Ok(_) | Err(Error::NodeExists) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns the client to continue with after `error`, which a failure of ZooKeeper caused.
async fn client_after(lab: &Lab, client: Client, error: Error) -> Client {
    sleep(PAUSE).await;
    if !matches!(error, Error::SessionExpired) {
        return client;
    }
    let (zookeeper, chroot) = (Arc::clone(&lab.zookeeper), lab.system.chroot().to_owned());
    // The task panics while ZooKeeper is not available.
    let fresh = tokio::spawn(async move { zookeeper.client(&chroot).await });
    fresh.await.unwrap_or(client)
}
