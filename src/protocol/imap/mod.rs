//! IMAP up to the answer to a login, without sockets and clocks.
//!
//! [`prelogin`] is the dialogue with the client until it sends credentials, [`backend_login`] the dialogue with the server until
//! it accepts or refuses them. Both take bytes and return steps. After the login nothing is parsed, so that unknown extensions
//! pass. The module has its own scanner instead of using imap-codec, because it must accept what real clients and servers send
//! against the grammar (trailing spaces, bare LF, an OK without text), and because passwords must stay in memory that is wiped.
//! The tests compare it with imap-codec, and the demo's servers use imap-codec.

pub mod backend_login;
pub mod capability;
pub mod client_id;
mod framing;
pub mod prelogin;
pub mod refusal;
pub mod reply;
pub mod sasl;
pub mod tag;
