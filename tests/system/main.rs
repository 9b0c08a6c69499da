//! Parts of a deployment, each tested with the tools that use it: units and packages in booted
//! machines, the container image, Quadlet and Kubernetes manifests, alerts and the dashboard.
//! `tests/run system` installs those tools and runs this.

mod boot;
mod container;
mod empty_root;
mod kubernetes;
mod monitoring;
mod packages;
mod quadlet;
#[allow(dead_code, reason = "shared with the other test binaries")]
#[path = "../support/mod.rs"]
mod support;
