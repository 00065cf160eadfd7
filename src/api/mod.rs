//! The interface for operators: typed operations on the running process, and the control socket that other processes reach
//! them by.
//!
//! ```text
//!   vestibule status, kick … ─ client ──┐                       ┌─▶ operations (this process)
//!                                       ├─▶ control_server ▶ request ▶ commands
//!   a successor's commands ─── client ──┘   (control_socket)    ├─▶ predecessors ─ client ──▶ control sockets of predecessors
//!                                                               └─▶ succession (handover, upgrade)
//! ```
//!
//! One HTTP request carries one command; both directions are JSON (`message`). [`operations`] returns typed values ([`views`]);
//! only `report` turns them into text and JSON. A Unix socket that only the process's own user and root may open is the access
//! control: there are no other permissions. Each process also listens on a socket of its own name, by which its successor
//! forwards commands to it.

mod body;
pub(crate) mod client;
mod commands;
pub(crate) mod context;
pub(crate) mod control_server;
pub(crate) mod control_socket;
pub(crate) mod message;
pub mod operations;
mod predecessors;
mod report;
mod request;
pub(crate) mod succession;
pub mod views;
