//! Kinds of refused logins.

/// Whether a refused login is a failed login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The credentials are wrong: the reply is delayed, the failure is logged for fail2ban, and `limits.failed_logins` counts it.
    FailedLogin,
    /// The credentials may be right: a limit, maintenance, a closed account or a referral.
    NotCounted,
}
