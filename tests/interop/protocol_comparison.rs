//! The same conversations with Zuul's gateway and with ours. Every difference between the replies
//! is in the table of `docs/migrating.md`, and every row of that table is a difference.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, unreachable};
use crate::support::gateway::Builder;
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

const MIGRATING: &str = include_str!("../../docs/migrating.md");

/// What a client sends: pieces, each in a write of its own, and whether it then closes its side.
struct Conversation {
    name: &'static str,
    pieces: Vec<Vec<u8>>,
    half_close: bool,
}

/// Builds that the conversations request.
struct Builds {
    running: String,
    waiting: String,
    unreachable: String,
}

fn conversations(builds: &Builds) -> Vec<Conversation> {
    let id = builds.running.as_str();
    let one = |name, text: String| Conversation {
        name,
        pieces: vec![text.into_bytes()],
        half_close: false,
    };
    let bytes =
        |name, bytes: &[u8]| Conversation { name, pieces: vec![bytes.to_vec()], half_close: false };
    vec![
        one("LF", format!("{id}\n")),
        one("CRLF", format!("{id}\r\n")),
        one("blanks after the ID", format!("{id}  \t\r\n")),
        one("more lines after the request", format!("{id}\nmore\nlines\n")),
        Conversation {
            name: "a byte at a time",
            pieces: format!("{id}\r\n").bytes().map(|byte| vec![byte]).collect(),
            half_close: false,
        },
        Conversation {
            name: "sending side closed after the request",
            pieces: vec![format!("{id}\n").into_bytes()],
            half_close: true,
        },
        one("unknown id", "0123456789abcdef\n".to_owned()),
        one("build not started", format!("{}\n", builds.waiting)),
        one("executor refuses", format!("{}\n", builds.unreachable)),
        one("blank before the id", format!(" {id}\n")),
        one("`/W` before the id", format!("/W {id}\r\n")),
        one("`id@host`", format!("{id}@host\n")),
        one("id in capitals", format!("{}\n", id.to_uppercase())),
        one("CRLF alone", "\r\n".to_owned()),
        one("blank alone", " \n".to_owned()),
        one("LF alone", "\n".to_owned()),
        one("LF, then the id", format!("\n{id}\n")),
        one("NUL in the id", format!("ab\0{id}\n")),
        one("UTF-8 beyond ASCII", "h\u{e9}llo\n".to_owned()),
        bytes("bytes that are not UTF-8", b"\xff\xfe\n"),
        one("`.`", ".\n".to_owned()),
        one("`..`", "..\n".to_owned()),
        one("`id/../id`", format!("{id}/../{id}\n")),
        one("`id/`", format!("{id}/\n")),
        one("`/id`", format!("/{id}\n")),
        one("`id/cancel`", format!("{id}/cancel\n")),
        one("1,000 letters", format!("{}\n", "a".repeat(1000))),
        one("1,022 letters", format!("{}\n", "a".repeat(1022))),
        one("1,023 letters", format!("{}\n", "a".repeat(1023))),
        one("2,000 letters without LF", "a".repeat(2000)),
        bytes("1 MB of NUL", &vec![0; 1_000_000]),
        one("nothing for 10 s", String::new()),
        one("half an id for 10 s", id[..16].to_owned()),
        Conversation { name: "closed without a request", pieces: Vec::new(), half_close: true },
        Conversation {
            name: "closed within a request",
            pieces: vec![id.as_bytes()[..16].to_vec()],
            half_close: true,
        },
    ]
}

/// Returns a gateway's reply as text.
async fn answer(gateway: SocketAddr, conversation: &Conversation) -> String {
    let mut client = Client::connect(gateway).await;
    for piece in &conversation.pieces {
        // The gateway may have replied and closed already.
        if client.stream.write_all(piece).await.is_err() {
            break;
        }
    }
    if conversation.half_close {
        client.half_close().await;
    }
    let (bytes, ending) = client.rest().await;
    // Zuul's gateway resets after its reply if it has not read everything.
    let cut = if ending == Ending::Reset && bytes.is_empty() { "(reset)" } else { "" };
    String::from_utf8_lossy(&bytes).into_owned() + cut
}

/// Returns the rows below "## Replies that differ": conversation, reply of Zuul's gateway, reply of
/// ours.
fn documented() -> BTreeMap<String, (String, String)> {
    let (_, section) = MIGRATING.split_once("## Replies that differ").expect("the section");
    let section = section.split("\n## ").next().expect("its text");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")).skip(1);
    rows.map(|row| {
        let cells: Vec<_> = row.split(" | ").collect();
        let text = |cell: &str| cell.trim_matches('`').to_owned();
        (cells[0].to_owned(), (text(cells[1]), text(cells[2])))
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_difference_from_zuuls_gateway_is_documented() {
    let system = System::new().await;
    let executor = Executor::start().await;
    let refusing = unreachable(None).await;
    let builds = Builds {
        running: system.put_build(None, Some(&executor.worker(None))).await,
        waiting: system.put_build(None, None).await,
        unreachable: system.put_build(None, Some(&refusing)).await,
    };
    tokio::spawn(async move {
        loop {
            executor.serve(b"the log").await;
        }
    });
    let theirs = ZuulGateway::start(&system, &ZuulConf::gateway(&system, "east", "")).await;
    let ours = Builder::new(&system).zone("east").ready().await;

    // Concurrently, as some replies of Zuul's gateway take ten seconds, but no more than fit into
    // its listen backlog of five.
    let places = Arc::new(Semaphore::new(5));
    let mut talks = JoinSet::new();
    let (their_address, our_address) = (theirs.address, ours.address());
    for conversation in conversations(&builds) {
        let places = Arc::clone(&places);
        talks.spawn(async move {
            let _place = places.acquire_owned().await;
            let (theirs, ours) = tokio::join!(
                answer(their_address, &conversation),
                answer(our_address, &conversation),
            );
            (conversation.name, theirs, ours)
        });
    }
    let mut documented = documented();
    let mut errors = Vec::new();
    let mut same = 0;
    while let Some(talk) = talks.join_next().await {
        let (name, theirs, ours) = talk.expect("a conversation");
        // The text above the table covers this for all rows: our own replies end in CRLF.
        let ours = ours.trim_end_matches("\r\n").to_owned();
        match documented.remove(name) {
            None if theirs == ours => same += 1,
            Some(row) if row == (theirs.clone(), ours.clone()) && theirs != ours => {}
            row => {
                errors.push(format!("{name}: Zuul {theirs:?}, ours {ours:?}, documented {row:?}"))
            }
        }
    }
    errors.extend(documented.keys().map(|name| format!("{name}: documented, but not tested")));
    assert!(errors.is_empty(), "{errors:#?}");
    assert!(same > 15, "only {same} conversations are the same");
}
