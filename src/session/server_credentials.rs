//! The credentials for a server, made from those of the client and the decision of the route.

use crate::backend::Backend;
use crate::identity::{Credentials, PasswordLogin, Proof, Secret, ServerLogin, UserName, UserNames};
use crate::protocol::imap::sasl;
use crate::route::{Destination, IssuedCredentials};
use crate::snapshot::Snapshot;

/// Splits a user name such as `alice*admin`, which requests the mailbox of alice with the password of admin, as PLAIN with an
/// authorization identity does.
pub(super) fn split_master(snapshot: &Snapshot, credentials: &mut Credentials) {
    if credentials.authzid.is_none()
        && matches!(credentials.proof, Proof::Password(_))
        && let Some((mailbox, master)) = snapshot.config.naming.split_master(&credentials.user)
    {
        credentials.authzid = Some(mailbox);
        credentials.user = master;
    }
}

/// The client's message with the name that the user has on the server, if that is another.
pub(super) fn with_user(credentials: &Credentials, destination: &Destination, names: &UserNames) -> Option<Secret> {
    let Proof::Message { mechanism, first } = &credentials.proof else { return None };
    let user = destination.user.as_ref().unwrap_or(&names.server);
    if user == &credentials.user { None } else { sasl::with_user(*mechanism, first, user) }
}

/// The credentials that the route issues for this login. They are used only if the client has been verified, because otherwise
/// any password would open the mailbox. A client is verified under its own name only: whether it may act for another user is
/// decided by the server.
fn issued_credentials<'a>(credentials: &Credentials, destination: &'a Destination) -> Option<&'a IssuedCredentials> {
    let is_verified = destination.verification.is_confirmed() || matches!(credentials.proof, Proof::Certificate);
    destination.credentials.as_ref().filter(|_| is_verified && credentials.authzid.is_none())
}

/// Whether [`server_login`] replaces the client's credentials.
pub(super) fn uses_own_login(credentials: &Credentials, destination: &Destination) -> bool {
    matches!(credentials.proof, Proof::Certificate) || issued_credentials(credentials, destination).is_some()
}

/// The credentials for the server, or `None` if the client has sent none that the server would accept. `authcid` is the name that
/// the server knows of the user who logs in, if that is on behalf of another.
pub(super) fn server_login<'a>(
    credentials: &'a Credentials,
    destination: &'a Destination,
    names: &'a UserNames,
    authcid: &'a UserName,
    backend: &'a Backend,
    with_other_user: Option<&'a Secret>,
) -> Option<ServerLogin<'a>> {
    let mailbox = destination.user.as_ref().unwrap_or(&names.server);
    let on_behalf = |master: Option<&'a UserName>, password: &'a Secret| {
        ServerLogin::Password(PasswordLogin {
            user: master.unwrap_or(mailbox),
            authzid: master.is_some().then_some(mailbox),
            password,
        })
    };
    if let Some(login) = issued_credentials(credentials, destination) {
        return Some(on_behalf(login.master.as_ref(), &login.password));
    }
    match &credentials.proof {
        Proof::Password(password) => Some(ServerLogin::Password(PasswordLogin {
            user: if credentials.authzid.is_some() { authcid } else { mailbox },
            authzid: credentials.authzid.is_some().then_some(mailbox),
            password,
        })),
        Proof::Message { mechanism, first } => {
            // A SCRAM message is valid only for the name that it contains.
            let (first, user) = match (with_other_user, &destination.user) {
                (Some(first), _) => (first, mailbox),
                (None, Some(user)) if *user != credentials.user => return None,
                (None, _) => (first, &credentials.user),
            };
            Some(ServerLogin::Relayed { mechanism: *mechanism, first, user, authzid: credentials.authzid.as_ref() })
        }
        Proof::Certificate => backend.credentials.as_ref().map(|own| on_behalf(own.master.as_ref(), &own.password)),
    }
}
