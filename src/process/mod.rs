//! Operating-system concerns of the process: memory, limits, privileges, inherited sockets, signals, worker threads, watched files.

pub(crate) mod file_watch;
pub(crate) mod privileges;
pub(crate) mod rlimits;
pub(crate) mod shutdown;
pub(crate) mod socket_handover;
pub(crate) mod workers;
