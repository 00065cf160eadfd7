//! Vestibule: an IMAP proxy and load balancer.
//!
//! ```text
//!             ┌─────────────────────────── Vestibule ───────────────────────────┐
//!   client ──▶│ listener ▶ session ▶ imap::prelogin ▶ route ▶ backend ▶ relay   │──▶ mailbox server
//!             └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! # Words
//! A *listener* is a port clients connect to. A *backend* is a named set of equivalent *servers*. A *route* is one source
//! that maps a user to a backend. A *session* is one client connection from accept to close.
//!
//! # The life of a session
//! | step | where |
//! |---|---|
//! | accepted, one permit, and who may come in | [`listener::Listener::run`], [`guard::Guard::admit`] |
//! | whose connection a balancer passes on | [`proxy_protocol::parse`] |
//! | TLS, if it begins at once or by STARTTLS | `session::Session::encrypt`, [`tls::downstream`] |
//! | commands until a login is complete | [`imap::prelogin::Prelogin::step`] |
//! | what the user is called | [`identity::NamingRules::names`] |
//! | whether it may try | [`guard::Guard::may_try`], [`policy::Policy::allow`] |
//! | which backend | [`route::Router::route`] |
//! | which server, and which next | [`backend::Backend::candidates`], [`backend::Failover::next`] |
//! | connect and log in there | [`backend::login::login`], [`imap::backend_login::BackendLogin::step`] |
//! | rustls lets go of both connections | [`stream::Stream::into_leg`], [`tls::extraction`] |
//! | bytes both ways | [`relay::Relay::run`], [`record_layer`] |
//! | silence: two sockets and their keys | [`waiting::IdlePoller`] |
//! | one record | `session::record::Record`, when it drops |
//!
//! [`session`] alone knows this order. [`server`] builds everything from a [`config::Config`] and starts it.
//!
//! # What always holds
//! - Nothing is bound before everything is built; `check` runs the same code.
//! - Bytes that came with STARTTLS are never looked at, on either side; what was learnt in clear is forgotten.
//! - Leftover is data: what followed the login goes to the server, what followed its OK to the client, in order.
//! - After a login nothing is parsed. After a refusal nothing is relayed.
//! - "Unknown user" and "lookup failed" are different answers, and only the first goes on to the next route.
//! - A route names a declared backend; what was looked up becomes a network address only within the networks that the
//!   configuration of that route spells out.
//! - A login has no effect on the user's other sessions before a server has accepted it ([`sessions`]).
//! - Credentials that a route or the configuration holds are used only for a client whose identity is verified: by a password
//!   that the route's service confirmed in the same lookup, or by a certificate.
//! - A session lives on the worker that accepted it ([`workers`]); nothing of its login stays allocated behind it.
//! - Secrets are [`identity::Secret`] or wiped buffers; they reach no log, metric or error text.
//! - What a client can provoke never makes a server look dead.

#![forbid(unsafe_code)]

pub mod admin_state;
mod admission;
mod api;
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
