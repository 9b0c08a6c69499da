//! The finger protocol on the wire: requests and replies.
//!
//! A client sends one line with a build ID and reads until the end of the connection (RFC 1288;
//! `zuul/lib/fingergw.py`, `zuul/lib/streamer_utils.py`). Instead of a log it may get one line, see
//! [`reply`].
//!
//! # Between peer gateways
//!
//! Over TLS, two instances of this program negotiate the peer protocol
//! [`PEER_PROTOCOL`](crate::tls::PEER_PROTOCOL) by ALPN. The request line then carries parameters:
//!
//! ```text
//! request   = build *( 1*SP parameter ) CRLF     ; at most 1023 bytes
//! parameter = key [ "=" value ]
//! key       = 1*( ALPHA / DIGIT / "-" )
//! value     = *( unreserved / pct-encoded )      ; UTF-8 (RFC 3986, section 2)
//! ```
//!
//! For example `25f6e270b80e4331891413c0ca6dc9fc zone=west hops=1`.
//!
//! - `zone` is the zone that the asking gateway wants: that of the build's executor. A gateway of
//!   another zone answers [`WrongZone`](reply::ErrorReason::WrongZone), if the asking gateway has
//!   shown a certificate. Left out if the line would become too long.
//! - `hops` is the number of gateways that have sent this request, the asking one included. Beyond
//!   [`MAX_HOPS`](request::MAX_HOPS) the answer is [`Loop`](reply::ErrorReason::Loop).
//!
//! A parameter that is missing is not checked. Unknown keys are ignored, so that later versions can
//! add some; a change that a receiver must not ignore needs another ALPN name. A known key that
//! occurs twice or has a malformed value makes the line malformed.
//!
//! The same ALPN name negotiates TLS records of full size and session resumption, and the end of a
//! stream without close_notify then counts as a failure.

pub(crate) mod reply;
pub(crate) mod request;
