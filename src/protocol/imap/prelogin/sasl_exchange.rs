//! The step of a SASL exchange that the client has to answer next.

use zeroize::Zeroizing;

use crate::identity::Mechanism;

/// What the next response is.
#[derive(Debug)]
pub(super) enum SaslExchange {
    Plain,
    LoginUserName,
    /// The user's name has arrived, not yet checked.
    LoginPassword(Zeroizing<Vec<u8>>),
    External,
    /// The first message of a mechanism whose others go to the server.
    First(Mechanism),
}

impl SaslExchange {
    /// The first step of `mechanism`. `None`: the command LOGIN, which has no exchange.
    pub(super) fn of(mechanism: Mechanism) -> Option<Self> {
        match mechanism {
            Mechanism::Login => None,
            Mechanism::SaslPlain => Some(Self::Plain),
            Mechanism::SaslLogin => Some(Self::LoginUserName),
            Mechanism::External => Some(Self::External),
            Mechanism::XOauth2 | Mechanism::OauthBearer | Mechanism::ScramSha1 | Mechanism::ScramSha256 => {
                Some(Self::First(mechanism))
            }
        }
    }

    /// The mechanism it is a step of.
    pub(super) fn mechanism(&self) -> Mechanism {
        match self {
            Self::Plain => Mechanism::SaslPlain,
            Self::LoginUserName | Self::LoginPassword(_) => Mechanism::SaslLogin,
            Self::External => Mechanism::External,
            Self::First(mechanism) => *mechanism,
        }
    }

    /// The line that asks for the response.
    pub(super) fn prompt(&self) -> &'static [u8] {
        match self {
            Self::Plain | Self::External | Self::First(_) => b"+ \r\n",
            // "Username:" and "Password:" in base64, as every server of this mechanism asks.
            Self::LoginUserName => b"+ VXNlcm5hbWU6\r\n",
            Self::LoginPassword(_) => b"+ UGFzc3dvcmQ6\r\n",
        }
    }
}
