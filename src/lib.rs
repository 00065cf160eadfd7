//! Vestibule: an IMAP proxy and load balancer.
pub mod cli;
pub mod config;
pub mod demo;
pub mod failure;
pub mod identity;
pub mod imap;
pub mod metrics;
pub mod relay;
pub mod rendezvous;
pub mod route;
pub mod stream;
pub mod tls;
