//! The protocols that Vestibule speaks, without sockets and clocks.

pub mod imap;
pub mod proxy_protocol;
