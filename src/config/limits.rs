//! `limits`, and bounds for every number, size and duration. Called by `check`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::Limits;
use super::file::LimitsMap;
use super::read::Reader;
use super::values::{DurationText, Size};

/// Absent keys have their defaults.
pub(super) fn limits(reader: &mut Reader<'_>, written: &LimitsMap) -> Limits {
    let default = Limits::default();
    let hour = 3600;
    let day = 24 * hour;
    let mut limits = Limits {
        proxy_header: bounded(
            reader,
            "limits.proxy_header",
            written.proxy_header,
            default.proxy_header,
            seconds(0, 60),
        ),
        handshake: bounded(reader, "limits.handshake", written.handshake, default.handshake, seconds(1, 300)),
        login: bounded(reader, "limits.login", written.login, default.login, seconds(1, hour)),
        lookup: bounded(reader, "limits.lookup", written.lookup, default.lookup, seconds(0, 300)),
        connect: bounded(reader, "limits.connect", written.connect, default.connect, seconds(0, 300)),
        server_login: bounded(
            reader,
            "limits.server_login",
            written.server_login,
            default.server_login,
            seconds(0, 600),
        ),
        half_close: bounded(reader, "limits.half_close", written.half_close, default.half_close, seconds(1, hour)),
        stall: bounded(reader, "limits.stall", written.stall, default.stall, seconds(10, day)),
        max_disconnect_delay: or_off(
            reader,
            "limits.max_disconnect_delay",
            written.max_disconnect_delay,
            default.max_disconnect_delay,
            seconds(1, hour),
        ),
        // Unlike for a deadline, none at all makes sense.
        ready_delay: bounded(
            reader,
            "limits.ready_delay",
            written.ready_delay,
            default.ready_delay,
            Duration::ZERO..=Duration::from_secs(hour),
        ),
        drain: bounded(reader, "limits.drain", written.drain, default.drain, seconds(0, 7 * day)),
        idle: or_off(reader, "limits.idle", written.idle, default.idle, seconds(1800, 30 * day)),
        keepalive: or_off(reader, "limits.keepalive", written.keepalive, default.keepalive, seconds(10, day)),
        line: size(reader, "limits.line", written.line, default.line, 1024..=16 << 20),
        literal: size(reader, "limits.literal", written.literal, default.literal, 256..=16 << 20),
        untagged_bytes: size(
            reader,
            "limits.untagged_bytes",
            written.untagged_bytes,
            default.untagged_bytes,
            1024..=16 << 20,
        ),
        ..default
    };
    limits.bad_commands = number(reader, "limits.bad_commands", written.bad_commands, limits.bad_commands, 1..=1000);
    limits.failed_logins =
        number(reader, "limits.failed_logins", written.failed_logins, limits.failed_logins, 1..=1000);
    let sessions = number(reader, "limits.sessions", written.sessions, 100_000, 1..=10_000_000);
    let workers = number(reader, "limits.workers", written.workers, limits.workers as u32, 1..=1024);
    let lines = number(reader, "limits.untagged_lines", written.untagged_lines, 64, 1..=100_000);
    (limits.sessions, limits.workers) = (sessions as usize, workers as usize);
    limits.untagged_lines = lines as usize;
    limits
}

/// From `least` to `most`, in seconds.
pub(super) fn seconds(least: u64, most: u64) -> RangeInclusive<Duration> {
    // No deadline is nothing at all: a tenth of a second is what "0 s or more" means.
    let least = if least == 0 { Duration::from_millis(100) } else { Duration::from_secs(least) };
    least..=Duration::from_secs(most)
}

/// A duration that cannot be off.
pub(super) fn bounded(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<DurationText>,
    default: Duration,
    bounds: RangeInclusive<Duration>,
) -> Duration {
    let Some(DurationText(span)) = written else { return default };
    let within = span.filter(|span| bounds.contains(span));
    within.unwrap_or_else(|| {
        let (least, most) = (humantime::format_duration(*bounds.start()), humantime::format_duration(*bounds.end()));
        reader.problem(key, format!("expected a duration from {least} to {most}"));
        default
    })
}

/// A duration, or none.
pub(super) fn or_off(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<DurationText>,
    default: Option<Duration>,
    bounds: RangeInclusive<Duration>,
) -> Option<Duration> {
    match written {
        None => default,
        Some(DurationText(None)) => None,
        Some(DurationText(Some(span))) if bounds.contains(&span) => Some(span),
        Some(_) => {
            let (least, most) =
                (humantime::format_duration(*bounds.start()), humantime::format_duration(*bounds.end()));
            reader.problem(key, format!("expected off or a duration from {least} to {most}"));
            default
        }
    }
}

fn size(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<Size>,
    default: usize,
    bounds: RangeInclusive<usize>,
) -> usize {
    match written {
        None => default,
        Some(Size(size)) if bounds.contains(&size) => size,
        Some(_) => {
            reader.problem(key, format!("expected a size from {} to {} bytes", bounds.start(), bounds.end()));
            default
        }
    }
}

/// A number within bounds.
pub(super) fn number(
    reader: &mut Reader<'_>,
    key: &str,
    written: Option<i64>,
    default: u32,
    bounds: RangeInclusive<u32>,
) -> u32 {
    let Some(written) = written else { return default };
    let within = u32::try_from(written).ok().filter(|number| bounds.contains(number));
    within.unwrap_or_else(|| {
        reader.problem(key, format!("expected a number from {} to {}", bounds.start(), bounds.end()));
        default
    })
}
