//! The library over loopback, against peers that are scripted to do what real ones do not do on demand.
//!
//! Ports are the system's choice, everything waited for has one deadline, nothing sleeps.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test's panic is its failure; one binary has no outside")]

mod admission;
mod answers;
mod architecture;
mod attempts;
mod balancing;
mod before_login;
mod client;
mod credentials;
mod disconnect_spread;
mod dns;
mod documented_tests;
mod endless_answers;
mod invariants;
mod language;
mod limits;
mod mechanisms;
mod operations;
mod parked_sessions;
mod proxy_protocol;
mod registry;
mod reload;
mod routes;
mod server_faults;
mod support;
mod tls;
mod tls_tickets_and_starttls;
