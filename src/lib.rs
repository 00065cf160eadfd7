//! Vestibule: an IMAP proxy and load balancer.
pub mod cli;
pub mod config;
pub mod demo;
pub mod identity;
pub mod imap;
pub mod metrics;
