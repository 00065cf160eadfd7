//! The program `vestibule`. All of it is in the library, except the allocator.

mod allocator;

use std::process::ExitCode;

fn main() -> ExitCode {
    vestibule::app::run()
}
