//! Servers that are replaced together: the fixed ones of a backend, or those of one SRV record.

use std::sync::Arc;

use tokio::sync::watch;

use super::Server;
use super::first_value::{first_value, set_empty_if_unset};
use super::server::ServerSettings;

/// Servers that are replaced together.
#[derive(Debug)]
pub(super) struct ServerGroup {
    /// Name of the SRV record; `None` for the fixed servers.
    pub(super) srv_name: Option<String>,
    pub(super) settings: ServerSettings,
    /// `None` until DNS has answered or failed for the first time.
    servers: watch::Sender<Option<Vec<Arc<Server>>>>,
}

impl ServerGroup {
    /// The servers that the configuration lists by address or name.
    pub(super) fn fixed(servers: Vec<Arc<Server>>, settings: ServerSettings) -> Self {
        Self { srv_name: None, settings, servers: watch::Sender::new(Some(servers)) }
    }

    /// The servers of an SRV record. Those of `previous`, a group of the previous configuration, are used until DNS answers.
    pub(super) fn of_srv_record(srv_name: String, settings: ServerSettings, previous: Option<&Self>) -> Self {
        let known = previous.and_then(|previous| previous.servers.borrow().clone());
        let known = known.map(|servers| servers.iter().map(|server| server.with_settings(settings)).collect());
        Self { srv_name: Some(srv_name), settings, servers: watch::Sender::new(known) }
    }

    /// The servers that are known now.
    pub(super) fn current(&self) -> Vec<Arc<Server>> {
        self.servers.borrow().clone().unwrap_or_default()
    }

    /// The servers, as soon as they are known.
    pub(super) async fn first_known(&self) -> Vec<Arc<Server>> {
        first_value(&self.servers).await
    }

    /// Ends the wait of logins for the first DNS answer, because a lookup has failed. Has no effect after an answer.
    pub(super) fn stop_waiting_for_first_answer(&self) {
        set_empty_if_unset(&self.servers);
    }

    pub(super) fn replace(&self, servers: Vec<Arc<Server>>) {
        self.servers.send_replace(Some(servers));
    }
}
