//! The finger protocol on the wire: requests and replies.

pub(crate) mod request;
