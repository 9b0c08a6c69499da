//! The builds that can be asked for. They come and go all the time, as in any Zuul.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use zookeeper_client::{Acls, Client, CreateMode, Error};

use crate::lab::{Lab, ZONES};
use crate::log::{End, LINE, LONGEST, Log};
use crate::support::system::{TENANT, request, request_path};
use tokio::time::sleep;

/// Between two changes, and before another try when ZooKeeper is in trouble.
const PAUSE: Duration = Duration::from_millis(200);

/// What logs there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Short,
    Trickle,
    Bulk,
    /// Short, and cut.
    ShortCut,
    /// Bulk, and cut.
    BulkCut,
    /// Never says a word.
    Mute,
    /// Has no executor yet.
    Waiting,
}

impl Shape {
    /// How many of each there are at any time.
    const ALL: [(Self, usize); 7] = [
        (Self::Short, 60),
        (Self::Trickle, 30),
        (Self::Bulk, 20),
        (Self::ShortCut, 6),
        (Self::BulkCut, 6),
        (Self::Mute, 4),
        (Self::Waiting, 4),
    ];

    fn build(self, rng: &mut fastrand::Rng) -> String {
        let (end, length, pace) = match self {
            Self::Short | Self::Waiting => (End::Whole, rng.u32(1..8192), 0),
            // From one second to thirty.
            Self::Trickle => (End::Whole, rng.u32(20..300) * LINE as u32, rng.u16(50..100)),
            Self::Bulk => (End::Whole, rng.u32(1 << 18..LONGEST / 2), 0),
            Self::ShortCut => (End::Reset, rng.u32(1..8192), 0),
            Self::BulkCut => (End::Reset, rng.u32(1 << 18..LONGEST / 8), 0),
            Self::Mute => (End::Mute, 0, 0),
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

    /// Two short ones, of each zone, that stay.
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
        self.all.lock().expect("nobody panics with it")
    }

    /// One of this shape. It stays as long as somebody holds it.
    pub(crate) fn draw(&self, shape: Shape, rng: &mut fastrand::Rng) -> Arc<Build> {
        let all = self.all();
        let fitting: Vec<_> = all.iter().filter(|build| build.shape == shape).collect();
        Arc::clone(fitting[rng.usize(..fitting.len())])
    }

    /// Replaces one build after the other, for ever.
    pub(crate) async fn come_and_go(&self, lab: &Lab, mut rng: fastrand::Rng) {
        let mut client = lab.system.client.clone();
        loop {
            let index = rng.usize(..self.all().len());
            let fresh = new(self.all()[index].shape, &mut rng);
            while let Err(error) = add(lab, &client, &fresh).await {
                client = renewed(lab, client, error).await;
            }
            let old = std::mem::replace(&mut self.all()[index], Arc::new(fresh));
            // Nobody finds it here any more; who has found it goes first.
            while Arc::strong_count(&old) > 1 {
                sleep(PAUSE).await;
            }
            let path = request_path(Some(ZONES[old.zone]), &old.id);
            loop {
                match client.delete(&path, None).await {
                    Ok(()) | Err(Error::NoNode) => break,
                    Err(error) => client = renewed(lab, client, error).await,
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
    let worker = (build.shape != Shape::Waiting).then(|| lab.worker(build.zone));
    let content = request(Some(TENANT), Some(zone), &build.id, worker.as_ref());
    let path = request_path(Some(zone), &build.id);
    let node = CreateMode::Persistent.with_acls(Acls::anyone_all());
    let (parent, _) = path.rsplit_once('/').expect("an absolute path");
    client.mkdir(parent, &node).await?;
    match client.create(&path, content.as_bytes(), &node).await {
        // Of a try whose answer was lost.
        Ok(_) | Err(Error::NodeExists) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The client to go on with behind `error`, which trouble of ZooKeeper's explains.
async fn renewed(lab: &Lab, client: Client, error: Error) -> Client {
    sleep(PAUSE).await;
    if !matches!(error, Error::SessionExpired) {
        return client;
    }
    let (zookeeper, chroot) = (Arc::clone(&lab.zookeeper), lab.system.chroot().to_owned());
    // Panics as long as there is no ZooKeeper.
    let fresh = tokio::spawn(async move { zookeeper.client(&chroot).await });
    fresh.await.unwrap_or(client)
}
