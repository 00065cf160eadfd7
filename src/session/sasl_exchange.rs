//! The exchange of SASL challenges and responses between a server and the client, as part of step 6.

use std::time::Instant;

use zeroize::Zeroizing;

use super::attempt::{Login, Progress};
use super::attempt_result::{Interrupt, Refusal};
use super::client_io::Ending;
use super::placement::{Exchange, PlacedLogin, Placement};
use super::{Session, SessionEnded};
use crate::backend::login::LoginResponse;
use crate::failure::Reason;
use crate::metrics::LoginOutcome;
use crate::protocol::imap::prelogin::{ChallengeStep, LoginRequest, Prelogin};
use crate::protocol::imap::tag::Tag;
use crate::protocol::imap::{reply, sasl};
use crate::stream::Stream;

impl Session {
    /// Passes challenges to the client and its responses to the server, until the server has answered the login.
    pub(super) async fn exchange<'a>(
        &mut self,
        login: &Login<'_>,
        placement: &Placement<'a, '_>,
        (mut outcome, mut placed): (LoginResponse<'a>, Option<PlacedLogin>),
        stream: &mut Stream,
        prelogin: &mut Prelogin,
        progress: &mut Progress,
    ) -> Result<(LoginResponse<'a>, Option<PlacedLogin>), Interrupt> {
        let (tag, credentials) = (&login.request.tag, &login.request.credentials);
        let routed = placement.restrictions.routed;
        let mut is_token_refused = false;
        while let LoginResponse::Challenged(paused, challenge) = outcome {
            let Some(placed) = &mut placed else { return Err(Interrupt::Unavailable) };
            placement.before_challenge(placed, &challenge, progress.exchange);
            progress.exchange = Exchange::Begun;
            if sasl::is_token_refusal(credentials.mechanism, &challenge) && !is_token_refused {
                is_token_refused = true;
                self.record.refused(routed, Some(&placed.server.name));
                self.token_refused(credentials, login.began).await;
            }
            let response = tokio::select! {
                biased;
                response = self.challenge(login.request, &challenge, stream, prelogin) => response,
                () = placed.server_permit.displaced() => {
                    self.record.attempt_failed(Reason::ServersFull, LoginOutcome::Unavailable, Some(routed));
                    return Err(Refusal::uncounted(reply::exchange_cancelled(tag)).and_close().into());
                }
            };
            let Ok(response) = response else {
                self.record.abandoned(Some(routed));
                return Err(Interrupt::SessionEnded);
            };
            outcome = placement.respond(paused, placed, &response).await;
        }
        if is_token_refused && !matches!(outcome, LoginResponse::Accepted(_)) {
            return Err(Refusal::counted(reply_after_refused_token(outcome, tag)).into());
        }
        Ok((outcome, placed))
    }

    /// Sends a server's challenge to the client and returns the client's response.
    async fn challenge(
        &mut self,
        login: &LoginRequest,
        challenge: &[u8],
        stream: &mut Stream,
        prelogin: &mut Prelogin,
    ) -> Result<Zeroizing<Vec<u8>>, SessionEnded> {
        let mut out = Vec::new();
        prelogin.challenge(challenge, &mut out);
        // While the client is asked, the credentials are not complete and the connection may be shed.
        self.set_login_began(None);
        loop {
            self.send(stream, &mut out).await?;
            match prelogin.challenge_step(&login.tag, &mut out) {
                // A stop of the process or shedding ends the whole attempt.
                ChallengeStep::NeedInput => {
                    if let Err(error) = self.read(stream, prelogin).await {
                        return Err(self.end_after_read_error(error, stream, prelogin).await);
                    }
                }
                ChallengeStep::Response(response) => {
                    // The first message is kept until the login ends.
                    let longest = response.len().max(login.credentials.proof_size());
                    if self.charge_login(longest).is_err() {
                        return Err(self.end(stream, prelogin, Ending::MEMORY).await);
                    }
                    self.set_login_began(Some(Instant::now()));
                    return Ok(response);
                }
                ChallengeStep::Close(reason) => {
                    self.send(stream, &mut out).await?;
                    return self.close_as_requested(reason, stream).await;
                }
            }
        }
    }
}

/// The reply that ends an exchange in which the server refused the token.
fn reply_after_refused_token(outcome: LoginResponse<'_>, tag: &Tag) -> Vec<u8> {
    let reply = match outcome {
        LoginResponse::Refused { reply, .. } => Some(reply),
        LoginResponse::Referred(referral) => Some(referral.reply),
        LoginResponse::Unavailable(fault) => fault.reply,
        LoginResponse::Accepted(_) | LoginResponse::Challenged(..) => None,
    };
    reply.unwrap_or_else(|| reply::authentication_failed(tag, None))
}
