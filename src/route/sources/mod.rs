//! The kinds of sources, one file each. A source maps a user to a route decision.

pub(super) mod auth_http;
pub(super) mod director;
pub(super) mod dns;
pub(super) mod domain;
pub(super) mod hash;
pub(super) mod http;
pub(super) mod ldap;
pub(super) mod redis;
pub(super) mod regex;
pub(super) mod sql;
pub(super) mod table;
mod table_index;
