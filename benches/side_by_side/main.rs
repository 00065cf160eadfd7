//! Compares Vestibule with nginx mail, HAProxy and Dovecot's login proxy: the cost of a login, a gigabyte, a NOOP and an
//! idle session.
//!
//! `benches/run` installs the peers and starts this program. All peers use the same certificate, stand-in server and load,
//! and take turns in several rounds, so that other activity of the machine affects all of them. The tables show medians;
//! only ratios are comparable between machines. The driver measures CPU time and memory of the process tree of the proxy;
//! the clients (`load`) and the stand-in server (`standin`) are separate processes, which `benches/routes` also uses.
//! Everything runs on loopback.

mod account;
mod certificate;
mod driver;
mod load;
mod peers;
mod report;
mod standin;

use std::process::ExitCode;

/// Environment variable with the role of a child process.
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
