//! The command line: what can be asked for, and the help that says how. Called by `main`.

use std::path::PathBuf;
use std::process::exit;

use clap::{Args, Parser, Subcommand};

/// sysexits.h EX_USAGE.
const EX_USAGE: i32 = 64;

/// IMAP proxy and load balancer: one TLS front door, the right mailbox server behind it.
#[derive(Debug, Parser)]
#[command(
    name = "vestibule",
    version,
    after_help = "Example:\n  vestibule demo\n\nExit codes: 0 done, 1 no route knows the user (route), 64 usage, 70 internal or not bound, 78 configuration"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy until SIGTERM or SIGINT
    #[command(after_help = "Example:\n  vestibule run --config /etc/vestibule/vestibule.yaml")]
    Run {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Check a configuration: build everything, bind nothing; exit 0 or 78
    #[command(
        after_help = "Example:\n  vestibule check --config /etc/vestibule/vestibule.yaml && systemctl restart vestibule"
    )]
    Check {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Tell which route answers for a user, which backend, which server now; or who would move with another configuration
    #[command(
        after_help = "Example:\n  vestibule route --config /etc/vestibule/vestibule.yaml alice@example.org\n  vestibule route --config /etc/vestibule/vestibule.yaml --diff new.yaml --users users.txt\n\nExit 0: a backend was found (--diff: nobody moves); 1: none (--diff: somebody moves); 64: that is no user name; 78: a configuration is wrong"
    )]
    Route {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// The user name as a client would send it
        #[arg(required_unless_present = "diff", conflicts_with = "diff")]
        user: Option<String>,
        /// Another configuration: list the users that it sends elsewhere
        #[arg(long, value_name = "NEW", requires = "users")]
        diff: Option<PathBuf>,
        /// The users to compare, the first word of each line; a table will do
        #[arg(long, value_name = "FILE", requires = "diff")]
        users: Option<PathBuf>,
    },
    /// Show the main job on an embedded default: two tiny mailbox servers, a certificate, the proxy in front
    #[command(
        after_help = "Example:\n  vestibule demo\n  vestibule demo --tls-port 0 --starttls-port 0 --admin-port 0 --once"
    )]
    Demo(DemoOptions),
}

/// Options of the demo.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Port for implicit TLS; a taken port, or 0, is replaced by a free one
    #[arg(long, default_value_t = 1993)]
    pub tls_port: u16,
    /// Port for STARTTLS; likewise
    #[arg(long, default_value_t = 1143)]
    pub starttls_port: u16,
    /// Port for metrics and health; likewise
    #[arg(long, default_value_t = 9143)]
    pub admin_port: u16,
    /// Folder for the configuration and the certificate; a new one under the system's temporary folder otherwise
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
    /// Read a message of each user through the proxy, print the metrics it left, and end
    #[arg(long)]
    pub once: bool,
}

/// Reads the process's arguments; ends the process where they are wrong (64) or ask for help (0).
pub fn parse() -> Command {
    match Arguments::try_parse() {
        Ok(arguments) => arguments.command,
        Err(error) => {
            // There is nobody left to tell if standard output or error is closed.
            let _ = error.print();
            exit(if error.use_stderr() { EX_USAGE } else { 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_help_has_an_example_that_parses() {
        let mut command = Arguments::command();
        command.build();
        let mut examples = 0;
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help").chain([&command]) {
            let help = sub.get_after_help().unwrap_or_else(|| panic!("{} has no example", sub.get_name())).to_string();
            for line in help.lines().filter_map(|line| line.strip_prefix("  ")) {
                let line = line.split(" &&").next().unwrap_or_default();
                Arguments::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
                examples += 1;
            }
        }
        assert!(examples >= 6, "{examples} examples");
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for wrong in [
            &["vestibule"][..],
            &["vestibule", "run"],
            &["vestibule", "route", "-c", "x"],
            &["vestibule", "route", "-c", "x", "--diff", "y"],
            &["vestibule", "dance"],
        ] {
            assert!(Arguments::try_parse_from(wrong).unwrap_err().use_stderr(), "{wrong:?}");
        }
        assert!(!Arguments::try_parse_from(["vestibule", "run", "--help"]).unwrap_err().use_stderr());
    }
}
