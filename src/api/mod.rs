//! The operators' interface: the HTTP endpoint for metrics and health, and the control socket.

pub(crate) mod control;
pub(crate) mod http;
