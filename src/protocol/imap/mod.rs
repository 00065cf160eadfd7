//! IMAP before the login is answered, decided without a socket and without a clock.
//!
//! Bytes go in, steps come out: [`prelogin`] talks to the client until it has brought credentials, [`backend_login`] to
//! the server until it has accepted or refused them. After that nothing is parsed any more, so that extensions nobody
//! has heard of pass. The room reads with a scanner of its own instead of imap-codec, because it must accept what real
//! clients and servers send and the grammar does not allow (trailing spaces, bare LF, an OK without text), and because
//! passwords must stay in memory that is wiped; the codec is the oracle of its tests and the voice of the demo's servers. Called by
//! `session` and `backend::connect`.

pub mod backend_login;
pub mod capability;
pub mod client_id;
mod framing;
pub mod prelogin;
pub mod refusal;
pub mod reply;
pub mod sasl;
pub mod tag;
