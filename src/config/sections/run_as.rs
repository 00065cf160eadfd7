//! `run_as`: the user and group that the process changes to after binding all ports.

use serde::Deserialize;

use crate::config::error::Located;
use crate::config::yaml::Section;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunAsSection {
    user: String,
    group: Option<String>,
}

/// The user and group to change to, by name.
#[derive(Debug, Clone, PartialEq)]
pub struct RunAs {
    /// Name of the user.
    pub user: Located<String>,
    /// Name of the group; `None` means the user's primary group.
    pub group: Option<Located<String>>,
}

impl RunAsSection {
    pub(super) fn check(self, section: &mut Section<'_>) -> RunAs {
        RunAs {
            user: check_name(section, "user", self.user),
            group: self.group.map(|group| check_name(section, "group", group)),
        }
    }
}

fn check_name(section: &mut Section<'_>, key: &str, name: String) -> Located<String> {
    if name.is_empty() || name.contains(['\0', ':', '/']) {
        section.problem(key, "expected a name, like vestibule");
    }
    section.located(key, name)
}
