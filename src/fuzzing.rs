//! The checks of the fuzz targets in `tests/fuzz`, one function each. They accept any bytes, and
//! panic if the program would log or do something wrong. The unit tests replay the corpus.

use std::fmt::Debug;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use serde_json::json;
use tokio::io::AsyncReadExt;

pub use crate::config::fuzzing::{log_config, toml, zuul_conf};
use crate::control::protocol::Request;
use crate::gateway::protocol::request::{REQUEST_MAX, RequestError, RequestFormat, read_request};
use crate::gateway::session::proxy_protocol::{HEADER_MAX, HeaderParser};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation, Executor};
use crate::model::component::{Component, FINGERGW, Gateway, OwnComponent, State};

/// Panics unless `text` can be logged: on one line, printable and not too long.
pub(crate) fn presentable(text: &str) {
    assert!(!text.is_empty(), "no text");
    assert!(!text.contains(char::is_control), "control characters: {text:?}");
    assert!(text.chars().count() < 1000, "too long: {text:?}");
}

/// The finger request. The first byte is the position at which the rest is split into two reads,
/// which must not make a difference.
pub fn query(data: &[u8]) {
    let Some((&split, request)) = data.split_first() else { return };
    let (first, second) = request.split_at(usize::from(split).min(request.len()));
    let read = |format| {
        let whole = now(read_request(&mut &*request, format));
        let parts = now(read_request(&mut first.chain(second), format));
        assert_eq!(format!("{whole:?}"), format!("{parts:?}"), "split at {split}");
        whole
    };
    if let Ok(parsed) = read(RequestFormat::Peer) {
        let line = parsed.to_line(RequestFormat::Peer);
        assert!(line.len() <= REQUEST_MAX);
        let again = now(read_request(&mut line.as_bytes(), RequestFormat::Peer));
        let again = again.expect("a line of ours");
        assert!(again.build == parsed.build && again.forwarded == parsed.forwarded);
        assert!(again.zone == parsed.zone || again.zone.is_none());
    }
    let whole = read(RequestFormat::Finger).map(|request| request.build);

    let line = request.iter().take(REQUEST_MAX).position(|byte| *byte == b'\n');
    match whole {
        Ok(build) => {
            let line = std::str::from_utf8(&request[..line.expect("a whole line")]);
            // As Python's `str.strip`.
            let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
            let asked = line.expect("text").trim_end_matches(is_space).as_bytes();
            let id = build.as_str().as_bytes();
            assert!((1..=BuildId::MAX).contains(&id.len()));
            assert!(id.iter().all(u8::is_ascii_hexdigit));
            let before = asked.strip_suffix(id).expect("the requested build");
            let verbose = before.trim_ascii_end().eq_ignore_ascii_case(b"/W");
            assert!(before.is_empty() || verbose && before[2] == b' ');
        }
        Err(RequestError::Malformed(excerpt)) => {
            assert!(line.is_some());
            assert!(excerpt.to_string().bytes().all(|byte| (b' '..=b'~').contains(&byte)));
        }
        Err(RequestError::TooLong) => assert!(line.is_none() && request.len() >= REQUEST_MAX),
        Err(RequestError::Closed) => assert!(line.is_none() && request.len() < REQUEST_MAX),
        Err(RequestError::Io(error)) => panic!("memory cannot fail: {error}"),
    }
}

/// A PROXY protocol header and the bytes after it. The first byte is the position at which the rest
/// is split into two reads. The parser consumes exactly the header, and its result is the same for
/// any split.
pub fn proxy_header(data: &[u8]) {
    let Some((&split, bytes)) = data.split_first() else { return };
    let read = |pieces: [&[u8]; 2]| {
        let (mut header, mut taken) = (HeaderParser::default(), 0);
        for piece in pieces {
            let part = header.take(piece)?;
            assert!(part.count <= piece.len() && (part.whole || part.count == piece.len()));
            taken += part.count;
            if part.whole {
                return Ok(Some((taken, header.client())));
            }
        }
        Ok(None)
    };
    let whole: Result<_, &str> = read([bytes, b""]);
    let parts = read(bytes.split_at(usize::from(split).min(bytes.len())).into());
    assert_eq!(whole, parts, "split at {split}");
    match whole {
        Err(why) | Ok(Some((_, Err(why)))) => presentable(why),
        Ok(None) => assert!(bytes.len() < HEADER_MAX, "a header has an end"),
        Ok(Some((length, Ok(_)))) => {
            assert!((15..=HEADER_MAX).contains(&length));
            let alone = read([&bytes[..length], b""]);
            assert_eq!(alone, whole, "depends on the bytes after it");
            assert_eq!(
                read([&bytes[..length - 1], b""]),
                Ok(None),
                "complete without its last byte"
            );
        }
    }
}

/// The result of a future that never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing here waits"),
    }
}

/// The entry of a component; that of a gateway if the first byte is odd. The entry that we would
/// write for a gateway that can be dialed must give the same gateway.
pub fn component(data: &[u8]) {
    let Some((&first, json)) = data.split_first() else { return };
    let kind = if first % 2 == 1 { FINGERGW } else { "executor" };
    let component = match Component::from_json(kind, "gw0000000001", json) {
        Ok(component) => component,
        Err(error) => return presentable(&error.to_string()),
    };
    let Some(Gateway { hostname, port, zone, tls }) = component.gateway.clone() else { return };
    assert!(kind == FINGERGW && port != 0 && !hostname.is_empty());
    let own = OwnComponent { hostname, public_port: Some(port), zone, use_ssl: tls };
    let entry = own.to_json(State::Running, component.model_api);
    reads_back(Component::from_json(FINGERGW, "other", entry.as_bytes()), component);
}

/// A build request. A request that is written for its executor must give the same build.
pub fn build_request(data: &[u8]) {
    let build = match Build::from_json(data) {
        Ok(build) => build,
        Err(error) => return presentable(&error.to_string()),
    };
    assert_eq!(build.is_none(), data.is_empty());
    let Some(Build {
        tenant,
        location: BuildLocation::Executor(Executor { hostname, port, zone }),
        ..
    }) = &build
    else {
        return;
    };
    assert!(!hostname.is_empty() && *port != 0 && zone.as_deref() != Some(""));
    let worker = json!({"hostname": hostname, "log_port": port, "zone": zone});
    let request = json!({"worker_info": worker, "tenant_name": tenant.as_deref()}).to_string();
    // The trace parent is not written.
    let build = build.map(|build| Build { trace_parent: None, ..build });
    reads_back(Build::from_json(request.as_bytes()), build);
}

/// A line that the command socket received.
pub fn command(data: &[u8]) {
    match Request::parse(data) {
        Ok(request) => reads_back(Request::parse(format!("{request}\n").as_bytes()), request),
        Err(error) => presentable(&error),
    }
}

fn reads_back<T: Debug + PartialEq, E: Debug + PartialEq>(read: Result<T, E>, written: T) {
    assert_eq!(read, Ok(written));
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// Checks every file of the corpus of one target.
    fn replay(target: &str, check: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
        let mut files = 0;
        for file in fs::read_dir(corpus).expect("a corpus") {
            let path = file.expect("a file").path();
            println!("{}", path.display());
            check(&fs::read(path).expect("its content"));
            files += 1;
        }
        assert!(files >= 10, "{files}");
    }

    #[test]
    fn corpus_of_each_target_passes() {
        replay("build_request", super::build_request);
        replay("command", super::command);
        replay("component", super::component);
        replay("log_config", super::log_config);
        replay("proxy_header", super::proxy_header);
        replay("query", super::query);
        replay("toml", super::toml);
        replay("zuul_conf", super::zuul_conf);
    }
}
