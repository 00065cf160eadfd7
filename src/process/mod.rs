//! Operating-system concerns of the process: limits, privileges, inherited sockets, signals, worker threads, watched files.

pub(crate) mod drain;
pub(crate) mod file_watch;
pub(crate) mod privileges;
pub(crate) mod rlimits;
pub(crate) mod signals;
pub(crate) mod socket_handover;
pub(crate) mod workers;
