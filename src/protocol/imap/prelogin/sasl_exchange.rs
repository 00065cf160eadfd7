//! The SASL response that the client has to send next.

use zeroize::Zeroizing;

use crate::identity::{Mechanism, RelayedMechanism, UserName};

/// The step of an exchange that waits for a response.
#[derive(Debug)]
pub(super) enum SaslExchange {
    Plain,
    LoginUserName,
    /// Carries the user name of the previous step, which is not checked yet.
    LoginPassword(Zeroizing<Vec<u8>>),
    /// Carries the owner of the client certificate.
    External(UserName),
    /// The first message of a mechanism whose later messages go to the server.
    First(RelayedMechanism),
}

impl SaslExchange {
    /// The first step of `mechanism`, or `None` if it cannot be used: the command LOGIN has no exchange, and EXTERNAL needs a
    /// client certificate.
    pub(super) fn new(mechanism: Mechanism, certificate: Option<&UserName>) -> Option<Self> {
        match mechanism {
            Mechanism::Login => None,
            Mechanism::SaslPlain => Some(Self::Plain),
            Mechanism::SaslLogin => Some(Self::LoginUserName),
            Mechanism::External => certificate.cloned().map(Self::External),
            Mechanism::XOauth2 | Mechanism::OauthBearer | Mechanism::ScramSha1 | Mechanism::ScramSha256 => {
                mechanism.relayed().map(Self::First)
            }
        }
    }

    pub(super) fn mechanism(&self) -> Mechanism {
        match self {
            Self::Plain => Mechanism::SaslPlain,
            Self::LoginUserName | Self::LoginPassword(_) => Mechanism::SaslLogin,
            Self::External(_) => Mechanism::External,
            Self::First(mechanism) => (*mechanism).into(),
        }
    }

    /// The continuation request that asks for the response.
    pub(super) fn prompt(&self) -> &'static [u8] {
        match self {
            Self::Plain | Self::External(_) | Self::First(_) => b"+ \r\n",
            // "Username:" and "Password:" in base64, which every server with this mechanism sends.
            Self::LoginUserName => b"+ VXNlcm5hbWU6\r\n",
            Self::LoginPassword(_) => b"+ UGFzc3dvcmQ6\r\n",
        }
    }
}
