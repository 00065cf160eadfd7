//! `admin`: the HTTP endpoint for metrics and health, and the control socket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::yaml::Section;

/// Maximum length of the control socket's path. A Unix socket address has 108 bytes (unix(7)), of which the program needs
/// some for a process id and the final zero.
const MAX_SOCKET_PATH: usize = 90;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AdminSection {
    address: Option<String>,
    control: Option<PathBuf>,
}

impl AdminSection {
    /// Returns the HTTP address and the path of the control socket.
    pub(super) fn check(self, section: &mut Section<'_>) -> (Option<SocketAddr>, Option<PathBuf>) {
        let address = self.address.and_then(|text| section.socket_address("address", &text, "127.0.0.1:9143"));
        let control = self.control.map(|path| section.file("control", &path).value);
        if control.as_ref().is_some_and(|path| path.as_os_str().len() > MAX_SOCKET_PATH) {
            section
                .problem("control", format!("the path is too long for a Unix socket: at most {MAX_SOCKET_PATH} bytes"));
        }
        if control.as_deref().is_some_and(ends_in_number) {
            section.problem("control", "a name that ends in a number is reserved for the sockets of single processes");
        }
        (address, control)
    }
}

fn ends_in_number(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.as_encoded_bytes().iter().all(u8::is_ascii_digit))
}
