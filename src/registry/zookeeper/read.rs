//! Reads the names of the children of a directory, and the contents of many nodes, in one round
//! trip.

use zookeeper_client::{Client, Error, MultiReadResult};

use super::retry::is_connection_loss;

/// The content of a node; empty if it does not exist.
pub(super) type NodeData = Result<Vec<u8>, Error>;

/// Reads with one multi-read, which ZooKeeper supports from version 3.6 on.
pub(super) async fn multi_read(
    client: &Client,
    directory: Option<&str>,
    paths: &[String],
) -> Result<(Vec<String>, Vec<NodeData>), Error> {
    let mut reader = client.new_multi_reader();
    if let Some(directory) = directory {
        reader.add_get_children(directory)?;
    }
    for path in paths {
        reader.add_get_data(path)?;
    }
    let mut names = Vec::new();
    let mut data = Vec::with_capacity(paths.len());
    for (index, result) in reader.commit().await?.into_iter().enumerate() {
        let is_directory = directory.is_some() && index == 0;
        match result {
            MultiReadResult::Children { children } => names = children,
            MultiReadResult::Data { data: content, .. } => data.push(Ok(content)),
            MultiReadResult::Error { err: Error::NoNode } if is_directory => {}
            MultiReadResult::Error { err: Error::NoNode } => data.push(Ok(Vec::new())),
            MultiReadResult::Error { err } if is_directory => return Err(err),
            MultiReadResult::Error { err } => data.push(Err(err)),
            _ => return Err(Error::Unimplemented),
        }
    }
    Ok((names, data))
}

/// Reads with single requests, which are all sent before the first response: the client sends a
/// request when its future is created.
pub(super) async fn pipelined_read(
    client: &Client,
    directory: Option<&str>,
    paths: &[String],
) -> Result<(Vec<String>, Vec<NodeData>), Error> {
    let listing = directory.map(|directory| client.list_children(directory));
    let reads: Vec<_> = paths.iter().map(|path| client.get_data(path)).collect();
    let names = match listing {
        None => Vec::new(),
        Some(listing) => match listing.await {
            Err(Error::NoNode) => Vec::new(),
            names => names?,
        },
    };
    let mut data = Vec::with_capacity(paths.len());
    for read in reads {
        data.push(match read.await {
            Err(Error::NoNode) => Ok(Vec::new()),
            Err(error) if is_connection_loss(&error) => return Err(error),
            content => content.map(|(content, _)| content),
        });
    }
    Ok((names, data))
}
