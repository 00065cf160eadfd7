//! What a server is logged in with, from what the client sent and what the route answered.

use crate::backend::Backend;
use crate::identity::{Credentials, PasswordLogin, Proof, Secret, ServerLogin, UserName, UserNames};
use crate::protocol::imap::sasl;
use crate::route::{Destination, IssuedCredentials};
use crate::snapshot::Snapshot;

/// `alice*admin` asks for alice's mailbox with admin's password, as PLAIN can say too.
pub(super) fn split_master(snapshot: &Snapshot, credentials: &mut Credentials) {
    if credentials.authzid.is_none()
        && matches!(credentials.proof, Proof::Password(_))
        && let Some((mailbox, master)) = snapshot.config.naming.split_master(&credentials.user)
    {
        credentials.authzid = Some(mailbox);
        credentials.user = master;
    }
}

/// A token's message under the name the user has there, where that is another.
pub(super) fn with_user(credentials: &Credentials, place: &Destination, names: &UserNames) -> Option<Secret> {
    let Proof::Message { mechanism, first } = &credentials.proof else { return None };
    let there = place.user.as_ref().unwrap_or(&names.server);
    if there == &credentials.user { None } else { sasl::with_user(*mechanism, first, there) }
}

/// The credentials that the route hands out for this login. They would open the mailbox to any password if nothing had
/// verified the client's. A verified client is verified under its own name: whether it may act for another user is the
/// server's decision.
fn handed_out<'a>(credentials: &Credentials, place: &'a Destination) -> Option<&'a IssuedCredentials> {
    let is_verified = place.verification.is_confirmed() || matches!(credentials.proof, Proof::Certificate);
    place.credentials.as_ref().filter(|_| is_verified && credentials.authzid.is_none())
}

/// Whether [`server_login`] uses another password than the client's.
pub(super) fn has_own_login(credentials: &Credentials, place: &Destination) -> bool {
    matches!(credentials.proof, Proof::Certificate) || handed_out(credentials, place).is_some()
}

/// What the server is logged in with; `authcid` is the name for it of the user who logs in on behalf of another. `None`: there
/// is no proof that the server would take.
pub(super) fn server_login<'a>(
    credentials: &'a Credentials,
    place: &'a Destination,
    names: &'a UserNames,
    authcid: &'a UserName,
    backend: &'a Backend,
    renamed: Option<&'a Secret>,
) -> Option<ServerLogin<'a>> {
    let mailbox = place.user.as_ref().unwrap_or(&names.server);
    let on_behalf = |master: Option<&'a UserName>, password: &'a Secret| {
        ServerLogin::Password(PasswordLogin {
            user: master.unwrap_or(mailbox),
            authzid: master.is_some().then_some(mailbox),
            password,
        })
    };
    if let Some(login) = handed_out(credentials, place) {
        return Some(on_behalf(login.master.as_ref(), &login.password));
    }
    match &credentials.proof {
        Proof::Password(password) => Some(ServerLogin::Password(PasswordLogin {
            user: if credentials.authzid.is_some() { authcid } else { mailbox },
            authzid: credentials.authzid.is_some().then_some(mailbox),
            password,
        })),
        Proof::Message { mechanism, first } => {
            // SCRAM proves a password for one name: under another it would prove nothing.
            let (first, user) = match (renamed, &place.user) {
                (Some(renamed), _) => (renamed, mailbox),
                (None, Some(user)) if *user != credentials.user => return None,
                (None, _) => (first, &credentials.user),
            };
            Some(ServerLogin::Relayed { mechanism: *mechanism, first, user, authzid: credentials.authzid.as_ref() })
        }
        Proof::Certificate => backend.credentials.as_ref().map(|own| on_behalf(own.master.as_ref(), &own.password)),
    }
}
