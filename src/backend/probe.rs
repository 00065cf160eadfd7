//! Asks servers what they offer before login, so that clients are offered just that. Called by `Backends::probe`.
//!
//! A probe is a connection that greets, asks for capabilities (after STARTTLS where that is configured), and logs out. It
//! says nothing about health: that is learnt from logins. A server that cannot be asked restricts nobody.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{self, Instant};

use super::connect::{self, Outcome, Request};
use super::{Backends, Group};
use crate::config::Limits;
use crate::imap::client_id::ClientId;
use crate::imap::tag::Tag;

/// Asks all servers again and again.
pub(super) async fn follow(backends: Arc<Backends>, interval: Duration, limits: Arc<Limits>) {
    loop {
        round(&backends, &limits).await;
        time::sleep(interval).await;
    }
}

async fn round(backends: &Backends, limits: &Limits) {
    let nothing = ClientId::default();
    let Some(tag) = Tag::new(b"probe") else { return };
    let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let request = Request {
        login: None,
        tag: &tag,
        client_id: &nothing,
        client: nobody,
        listener: nobody,
        tls: None,
        session_id: "probe",
        limits,
    };
    let mut asked = Vec::new();
    for backend in &backends.list {
        // A server that DNS has not told yet is asked in the next round.
        for server in backend.groups.iter().flat_map(Group::current) {
            let request = &request;
            asked.push(async move {
                let offer = match connect::login(backend, &server, request, Instant::now() + limits.connect).await {
                    Outcome::Seen(offer) => Some(offer.mechanisms),
                    other => {
                        tracing::debug!(server = %server.name, ?other, "server could not be asked what it offers");
                        None
                    }
                };
                server.offers(offer);
            });
        }
    }
    join_all(asked).await;
    backends.consider_offers();
}
