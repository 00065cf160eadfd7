//! The fields of ID (RFC 2971) with which a server learns about the client.

use super::Backend;
use super::request::ClientDetails;
use crate::config::ClientInfo;
use crate::protocol::imap::client_id::IdPair;

/// The x-proxy-ttl of the first proxy: how many more may follow. Dovecot begins with the same number.
const FIRST_TTL: u8 = 6;

/// ID fields for a login of this client; none if the backend's servers get no ID.
pub(super) fn id_fields(backend: &Backend, client: &ClientDetails<'_>) -> Vec<IdPair> {
    match backend.client_info {
        ClientInfo::None => Vec::new(),
        ClientInfo::ProxyV1 | ClientInfo::ProxyV2 => client.id.pairs().to_vec(),
        ClientInfo::Id => with_client_address(backend, client),
    }
}

/// The client's own fields and ours. Their names are Dovecot's, which accepts them from `login_trusted_networks`.
fn with_client_address(backend: &Backend, client: &ClientDetails<'_>) -> Vec<IdPair> {
    let ttl = client.id.ttl().map_or(FIRST_TTL, |ttl| ttl.saturating_sub(1));
    let transport = if client.tls.is_some() { "TLS" } else { "insecure" };
    let ours = [
        ("x-session-id", Some(client.session_id.to_owned())),
        ("x-originating-ip", Some(client.address.ip().to_canonical().to_string())),
        ("x-originating-port", Some(client.address.port().to_string())),
        ("x-connected-ip", Some(client.listener.ip().to_canonical().to_string())),
        ("x-connected-port", Some(client.listener.port().to_string())),
        ("x-proxy-ttl", Some(ttl.to_string())),
        ("x-client-transport", Some(transport.to_owned())),
        ("x-connected-name", client.tls.and_then(|tls| tls.server_name.as_deref()).map(str::to_owned)),
    ];
    let ours = ours.into_iter().filter_map(|(key, value)| Some((key.as_bytes().to_vec(), Some(value?.into_bytes()))));
    let forwarded = backend.forward.iter();
    let forwarded =
        forwarded.map(|(key, value)| (format!("x-forward-{key}").into_bytes(), Some(value.clone().into_bytes())));
    client.id.pairs().iter().cloned().chain(ours).chain(forwarded).collect()
}
