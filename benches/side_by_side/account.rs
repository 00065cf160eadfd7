//! CPU time and memory of a process and its descendants.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use rustix::process::{Pid, setpriority_process};

/// Process ids of a process and its descendants.
fn tree(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, in parentheses, may contain any character; the parent is the second field after it.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.get(pid).into_iter().flatten());
        next += 1;
    }
    found
}

/// User and system time of the tree so far, with a resolution of one nanosecond. It excludes processes that have ended: no
/// peer ends one during a measurement.
pub(crate) fn cpu(root: u32) -> Duration {
    let mut nanoseconds = 0;
    for pid in tree(root) {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let schedstat = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            nanoseconds += schedstat.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0);
        }
    }
    Duration::from_nanos(nanoseconds)
}

/// Sets the niceness of all threads of the tree. Lowering it requires root.
pub(crate) fn renice(root: u32, niceness: i32) -> std::io::Result<()> {
    for pid in tree(root) {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let thread = task.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?));
            setpriority_process(thread, niceness)?;
        }
    }
    Ok(())
}

/// CPU time of one process, including ended threads, with a resolution of ten milliseconds. Used for the clients.
pub(crate) fn rough_cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2)).into_iter().flatten();
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// Memory of the tree in bytes: the proportional set size of anonymous pages (heaps, stacks). Pages of files do not grow
/// with the number of sessions.
pub(crate) fn memory(root: u32) -> f64 {
    let mut kilobytes = 0.0;
    for pid in tree(root) {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        kilobytes += line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0);
    }
    kilobytes * 1024.0
}
