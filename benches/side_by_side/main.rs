//! Vestibule beside nginx mail, HAProxy and Dovecot's login proxy: what a login, a gigabyte, a NOOP and an idle session cost.
//!
//! `benches/run` installs the peers and starts this. All of them get the same certificate, the same stand-in server and
//! the same load, one after the other, over and over, so that a noisy machine is noisy for all; the table shows medians,
//! and ratios are what travels between machines. The program is three: the driver, which reads clocks and memory of the
//! proxy's whole process tree; the load (`load`) and the stand-in (`standin`), which run as processes of their own.
//! `benches/routes` uses the latter two alone. Everything stays on loopback and stops by itself.

mod account;
mod certificate;
mod driver;
mod load;
mod peers;
mod report;
mod standin;

use std::process::ExitCode;

/// Tells a child of the driver what it is.
pub(crate) const ROLE: &str = "VESTIBULE_BENCH_ROLE";

fn main() -> ExitCode {
    let result = match std::env::var(ROLE).as_deref() {
        Ok("standin") => standin::run(),
        Ok("load") => load::run(),
        Ok("certificate") => std::env::args().nth(1).map_or(Ok(()), |folder| certificate::write(folder.as_ref())),
        _ => driver::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("side_by_side: {error:#}");
            ExitCode::FAILURE
        }
    }
}
