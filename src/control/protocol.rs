//! The requests and replies of the command socket.
//!
//! A connection carries one request: a command, optionally a space and a JSON array of strings, and
//! a newline, as Zuul's programs send it (`zuul/lib/commandsocket.py`). The reply is one line of
//! JSON, a [`Reply`]. Zuul's programs know only `stop` and expect no reply to it, so `stop` has
//! none.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::build_id::BuildId;

/// The length limit of a request, in bytes, including its newline.
pub(crate) const REQUEST_MAX: u64 = 1024;

/// A command for a running gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Stop, as on SIGTERM. There is no reply.
    Stop,
    /// Reload the configuration, as on SIGHUP. The reply carries a [`ReloadReport`].
    Reload,
    /// Report the state of the gateway. The reply carries a
    /// [`StatusReport`](super::status::StatusReport).
    Status,
    /// Explain how a request for this build would be routed. The reply carries a
    /// [`RouteReport`](crate::gateway::routing::explain::RouteReport).
    Resolve(BuildId),
}

/// Writes the request as it is sent, without the newline.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stop => f.write_str("stop"),
            Self::Reload => f.write_str("reload"),
            Self::Status => f.write_str("status"),
            Self::Resolve(build) => write!(f, "resolve [\"{build}\"]"),
        }
    }
}

impl Request {
    /// Parses a request line.
    ///
    /// # Errors
    /// The line is not a request; the message is one line and repeats nothing of what was sent.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(format!("a request is one line of at most {REQUEST_MAX} bytes"));
        };
        let line = str::from_utf8(line).map_err(|_| "a request is UTF-8 text".to_owned())?.trim();
        let (command, arguments) = line.split_once(' ').unwrap_or((line, "[]"));
        let arguments: Vec<String> = serde_json::from_str(arguments)
            .map_err(|_| "expected a JSON array of strings after the command".to_owned())?;
        match (command, arguments.as_slice()) {
            ("stop", []) => Ok(Self::Stop),
            ("reload", []) => Ok(Self::Reload),
            ("status", []) => Ok(Self::Status),
            ("resolve", [build]) => match BuildId::new(build) {
                Some(build) => Ok(Self::Resolve(build)),
                None => Err("resolve: not the UUID of a build".to_owned()),
            },
            ("stop" | "reload" | "status" | "resolve", _) => {
                Err(format!("{command}: wrong number of arguments"))
            }
            _ => {
                Err("unknown command; known are stop, reload, status and resolve [\"UUID\"]"
                    .to_owned())
            }
        }
    }
}

/// A reply: one JSON object with `status` and the members of `content`. Programs read it, so
/// members are added and never renamed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reply<T> {
    pub(crate) status: ReplyStatus,
    #[serde(flatten)]
    pub(crate) content: T,
}

/// The result of a command. The exit status of the command line depends on this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReplyStatus {
    /// The gateway did what it was asked for.
    Ok,
    /// No executor has the build.
    NotFound,
    /// The command failed; `error` has the reason.
    Failed,
    /// The request was not understood; `error` has the reason.
    InvalidRequest,
}

impl<T: Serialize> Reply<T> {
    /// Returns the reply as it is sent: one line of JSON.
    pub(crate) fn to_line(&self) -> String {
        // Serialization fails only for maps with keys that are not strings; there are none.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }
}

/// The content of a reply to a command that failed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrorReport {
    /// The reason; one or more lines.
    pub(crate) error: String,
}

/// The result of a successful reload.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReloadReport {
    /// The configuration file.
    pub(crate) configuration: String,
    /// What has changed and is in use now.
    pub(crate) changed: Vec<String>,
    /// What differs from the running configuration and takes effect after a restart.
    pub(crate) needs_restart: Vec<String>,
    /// Findings about the configuration and its certificates that did not prevent the reload.
    pub(crate) warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn build() -> BuildId {
        BuildId::new("ab").expect("a build id")
    }

    #[test]
    fn parse_accepts_each_command_with_its_arguments() {
        let good: [(&[u8], Request); 7] = [
            (b"resolve [\"ab\"]\n", Request::Resolve(build())),
            (b" resolve  [ \"ab\" ] \n", Request::Resolve(build())),
            (b"stop\n", Request::Stop),
            (b"stop\r\n", Request::Stop),
            (b"stop []\n", Request::Stop),
            (b"reload\n", Request::Reload),
            (b"status\n", Request::Status),
        ];
        for (line, request) in good {
            assert_eq!(Request::parse(line), Ok(request), "{}", line.escape_ascii());
        }
    }

    #[test]
    fn parse_refuses_everything_else() {
        let bad: [&[u8]; 14] = [
            b"resolve\n",
            b"resolve [\"x\"]\n",
            b"resolve [\"ab\", \"text\"]\n",
            b"",
            b"\n",
            b"stop",
            b"stopp\n",
            b"STOP\n",
            b"_stop\n",
            b"stop [1]\n",
            b"stop [\"x\"]\n",
            b"stop x\n",
            b"status {}\n",
            b"\xff\n",
        ];
        for line in bad {
            assert!(Request::parse(line).is_err(), "{}", line.escape_ascii());
        }
    }

    #[test]
    fn request_survives_display_and_parse() {
        let all = [Request::Stop, Request::Reload, Request::Status, Request::Resolve(build())];
        for request in all {
            assert_eq!(Request::parse(format!("{request}\n").as_bytes()), Ok(request));
        }
    }

    #[test]
    fn reply_is_one_line_that_begins_with_its_status() {
        let content = ErrorReport { error: "one\ntwo".to_owned() };
        let reply = Reply { status: ReplyStatus::InvalidRequest, content };
        let line = reply.to_line();
        assert_eq!(line, "{\"status\":\"invalid_request\",\"error\":\"one\\ntwo\"}\n");
        assert_eq!(serde_json::from_str::<Reply<ErrorReport>>(&line).expect("a reply"), reply);
    }

    proptest! {
        #[test]
        fn error_is_one_line_and_repeats_nothing_of_the_request(
            word in "[a-z]{8,20}", rest in prop::collection::vec(any::<u8>(), 0..64)
        ) {
            let line = [word.as_bytes(), &rest, b"\n"].concat();
            let error = Request::parse(&line).expect_err("not a command");
            prop_assert!(!error.is_empty() && !error.contains('\n'));
            prop_assert!(!error.contains(&word), "{}", error);
        }
    }
}
