//! Credentials with which the proxy logs in on a backend's servers in place of a client's.

use crate::config::{MasterLogin, Problem};
use crate::identity::{Secret, UserName};

/// Credentials with which the proxy logs in on a backend's servers.
#[derive(Debug)]
pub struct ProxyCredentials {
    /// The account that logs in on behalf of the user. `None`: every user has the same password.
    pub master: Option<UserName>,
    /// Password of the account, or of every user.
    pub password: Secret,
}

impl ProxyCredentials {
    /// Reads the password from its file.
    pub(super) fn read(login: &MasterLogin) -> Result<Self, Problem> {
        let password = login.password.read_secret()?;
        Ok(Self { master: login.master.clone(), password: Secret::new(password.as_bytes().to_vec()) })
    }
}
