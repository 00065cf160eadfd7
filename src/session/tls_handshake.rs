//! Step 2 of a session: the TLS handshake with the client.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::client_io::is_out_of_memory;
use super::proxy_header_warning::is_header_before_tls;
use super::{Session, SessionEnded};
use crate::admission::PreloginTicket;
use crate::deadline::Deadline;
use crate::failure::Reason;
use crate::stream::{Encrypted, Stream};
use crate::tls::downstream::HandshakeError;
use crate::tls::extraction::TrafficSecrets;

impl Session {
    /// Encrypts the connection within `limits.handshake`. If that fails, the connection closes without a reply.
    pub(super) async fn encrypt(&mut self, socket: TcpStream) -> Result<Stream, SessionEnded> {
        let began = Instant::now();
        let deadline = self.login_deadline.min(Deadline::after(self.snapshot.limits.handshake));
        let error = tokio::select! {
            result = deadline.limit(self.handshake(socket)) => match result {
                Ok(Ok(stream)) => {
                    let duration = began.elapsed();
                    self.snapshot.metrics.listener(self.listener).tls_handshake(duration);
                    self.record.encrypted(duration, stream.tls_info());
                    return Ok(stream);
                }
                Ok(Err(error)) => error,
                Err(_) => system_error(io::ErrorKind::TimedOut),
            },
            ending = self.termination() => {
                self.record.record_failure(ending.reason);
                return Err(SessionEnded);
            }
        };
        if is_header_before_tls(&error.first_bytes) {
            self.record_unexpected_proxy_header();
        } else {
            let is_out_of_memory = is_out_of_memory(error.kind());
            self.record.set_detail(error.to_string());
            self.record.record_failure(if is_out_of_memory { Reason::ShedForMemory } else { Reason::Handshake });
        }
        Err(SessionEnded)
    }

    async fn handshake(&self, socket: TcpStream) -> Result<Stream, HandshakeError> {
        let Some(tls) = &self.snapshot.tls else { return Err(system_error(io::ErrorKind::Unsupported)) };
        let secrets = Arc::new(TrafficSecrets::default());
        let memory = self.prelogin_ticket.as_ref().map(PreloginTicket::charge);
        // Wait for the first byte before taking a handshake permit, so that silent clients cannot exhaust the permits. Readiness of
        // the socket would not be enough.
        socket.peek(&mut [0]).await.map_err(|error| HandshakeError::of_system(&error))?;
        let permits = self.snapshot.admission.handshake_permits();
        let _permit = permits.acquire_owned().await.map_err(|_| system_error(io::ErrorKind::Other))?;
        let tls = tls.accept(self.listener, socket, secrets.clone(), memory).await?;
        Ok(Stream::Tls(Box::new(Encrypted { tls, secrets })))
    }
}

fn system_error(kind: io::ErrorKind) -> HandshakeError {
    HandshakeError::of_system(&kind.into())
}
