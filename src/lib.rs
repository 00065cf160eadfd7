//! Vestibule: an IMAP proxy and load balancer.
//!
//! ```text
//!             ┌───────────────────── Vestibule ──────────────────────┐
//!   client ──▶│ listener ▶ session ▶ route ▶ backend ▶ relay         │──▶ mailbox server
//!             └──────────────────────────────────────────────────────┘
//! ```
//!
//! # Words
//! A *listener* is a port that clients connect to. A *backend* is a named set of equivalent *servers*. A *route* is one source that
//! maps users to backends. A *connection* is a client's TCP connection; a *session* is a connection that has logged in. A *snapshot*
//! is one loaded configuration with everything built from it.
//!
//! # The life of a session
//! | step | modules |
//! |---|---|
//! | accept the connection, apply access lists and limits | `listener`, `admission` |
//! | read the PROXY header, if one is configured | `session::proxy_header`, [`protocol::proxy_protocol`] |
//! | TLS handshake, at once or after STARTTLS | `session`, [`tls`] |
//! | read commands until a login is complete | `session`, [`protocol::imap`] |
//! | normalize the user name, apply login limits and the policy service | `session::attempt`, [`identity`], `admission`, `auth_policy` |
//! | look up the backend | [`route`] |
//! | select a server, and the next one after a failure | [`backend`] |
//! | connect and log in there | [`backend`], [`protocol::imap`] |
//! | register the session | [`session_registry`] |
//! | take over the TLS keys from rustls | `stream`, [`tls`], [`record_layer`] |
//! | relay bytes both ways; park the session while it is silent | `relay` |
//! | write one log record | `session::log_record` |
//!
//! `session` alone knows this order. [`server`] builds everything from a [`config::Config`], starts it, reloads and stops it. [`api`]
//! is the interface for operators, [`cli`] the command line, [`app`] the start-up.
//!
//! # Invariants
//! - Everything is built before anything is bound; the command `check` runs the same code.
//! - Bytes that arrive between STARTTLS and TLS close the connection, on both sides, and state from before TLS is discarded.
//! - Bytes after the login belong to the session: those of the client go to the server, and those of the server to the client, in
//!   order.
//! - Nothing is parsed after a login, and nothing is relayed after a refusal.
//! - "User unknown" and "lookup failed" are different results. Only the first continues with the next route.
//! - A route names a declared backend. A looked-up string becomes a network address only within the networks that the
//!   configuration of that route allows.
//! - A login does not affect the user's other sessions until a server has accepted it ([`session_registry`]).
//! - Credentials of a route or of the configuration are used only for clients with a verified identity: by a password that the
//!   route's service confirmed in the same lookup, or by a certificate.
//! - A session stays on the worker thread that accepted it, and keeps no memory of its login.
//! - Secrets are [`identity::Secret`] or buffers that are wiped. They appear in no log, metric or error text.
//! - Errors that clients can trigger never mark a server down.

#![forbid(unsafe_code)]

pub mod admin_state;
mod admission;
pub mod api;
pub mod app;
mod auth_policy;
pub mod backend;
pub mod cli;
pub mod config;
mod deadline;
mod demo;
mod failure;
mod generations;
pub mod identity;
mod listener;
mod logging;
mod lookup;
pub mod metrics;
mod process;
pub mod protocol;
pub mod record_layer;
mod relay;
mod rendezvous;
pub mod route;
pub mod server;
mod session;
pub mod session_registry;
pub mod snapshot;
mod stream;
pub mod template;
pub mod tls;
