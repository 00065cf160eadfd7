//! Replacing the running process without refusing connections.
//!
//! The *predecessor* is the process that serves; its *successor* is `vestibule run --replace`, started by an operator or, for
//! `vestibule upgrade`, by the predecessor ([`launch`]). They talk over one connection to the control socket:
//!
//! | step | successor ([`take_over`]) | predecessor ([`hand_over`]) |
//! |---|---|---|
//! | 1 | builds everything, then sends the command `hand-over` as an HTTP upgrade | grants it, if no other successor is taking over ([`state`]) |
//! | 2 | sends `send` | sends copies of the listening sockets, and blocks reloads |
//! | 3 | binds what is missing, drops privileges, sends `ready` | sends `go` with the administrative states |
//! | 4 | starts, takes over the path of the control socket, sends `serving` | retires; sends `retiring` with the final administrative states |
//! | 5 | adopts the states and serves commands | finishes its sessions and ends |
//!
//! Both serve connections between step 4 and the retirement. Each step has a deadline. After a failure before the retirement
//! the predecessor continues as before, and takes back the path of the control socket if the successor had taken it over.

pub(super) mod connection;
pub(super) mod hand_over;
pub(crate) mod launch;
pub(crate) mod state;
pub(crate) mod take_over;
