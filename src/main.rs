//! The `vestibule` program.

mod allocator;

use std::process::ExitCode;

fn main() -> ExitCode {
    vestibule::app::run()
}
