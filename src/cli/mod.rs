//! The command line: its arguments and help texts. The submodules run `route` and the commands to a running process.

pub mod explain;
pub(crate) mod operate;

use std::path::PathBuf;
use std::process::exit;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::admin_state::AdminState;

/// Exit code for invalid arguments, from sysexits.h.
const EX_USAGE: i32 = 64;

/// IMAP proxy and load balancer: terminates TLS and connects each user to the right mailbox server.
#[derive(Debug, Parser)]
#[command(
    name = "vestibule",
    version,
    after_help = "Example:\n  vestibule demo\n\nExit codes:\n 0 success\n 1 no route knows the user (route), or the running process reported a failure\n 64 invalid arguments\n 70 internal error, an address cannot be bound, or no process answers\n 77 admin.control belongs to another user\n 78 invalid configuration"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy until SIGTERM or SIGINT
    #[command(
        after_help = "Example:\n  vestibule run --config /etc/vestibule/vestibule.yaml\n\nSIGHUP reloads the configuration. SIGTERM and SIGINT stop the process; a second signal skips the rest of limits.ready_delay or limits.drain."
    )]
    Run {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Replace the running process without refusing connections: inherit its listening sockets. Its sessions continue there
        /// until they end, or for limits.drain
        #[arg(long)]
        replace: bool,
    },
    /// Check a configuration without binding anything; exit 0 or 78
    #[command(
        after_help = "Example:\n  vestibule check --config /etc/vestibule/vestibule.yaml && systemctl reload vestibule\n\nConnects to servers with TLS, for at most three seconds, and warns of certificates that are not trusted. Servers that cannot be reached are not reported, and warnings do not change the exit code."
    )]
    Check {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Do not connect to servers
        #[arg(long)]
        offline: bool,
    },
    /// Show the route, backend and server of a user, or list the users whose route differs in another configuration
    #[command(
        after_help = "Example:\n  vestibule route --config /etc/vestibule/vestibule.yaml alice@example.org\n  vestibule route --config /etc/vestibule/vestibule.yaml --diff new.yaml --users users.txt\n\nExit 0: a backend was found (--diff: no route differs); 1: no backend (--diff: routes differ); 64: invalid user name; 78: invalid configuration"
    )]
    Route {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// The user name as sent by a client
        #[arg(required_unless_present = "diff", conflicts_with = "diff")]
        user: Option<String>,
        /// Another configuration file: list the users that it routes elsewhere
        #[arg(long, value_name = "NEW", requires = "users")]
        diff: Option<PathBuf>,
        /// A file with the users to compare, as the first word of each line; a table is accepted
        #[arg(long, value_name = "FILE", requires = "diff")]
        users: Option<PathBuf>,
    },
    /// A command to the running process.
    #[command(flatten)]
    Operate(OperatorCommand),
    /// Demonstrate the proxy with two built-in mailbox servers and a generated certificate
    #[command(
        after_help = "Example:\n  vestibule demo\n  vestibule demo --tls-port 0 --starttls-port 0 --admin-port 0 --once"
    )]
    Demo(DemoOptions),
}

/// A command to the running process.
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Reload the configuration of the running process; exit 0, or 78 if it is invalid and nothing changed
    #[command(
        after_help = "Example:\n  vestibule reload\n  vestibule reload --control /run/vestibule/control\n\nThe same as SIGHUP, but waits for the result and prints the errors."
    )]
    Reload {
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Replace the running process by the installed binary without refusing connections; exit 0 once the new process serves
    #[command(
        after_help = "Example:\n  vestibule upgrade\n  vestibule upgrade --timeout 10m\n\nExit 1: the new process did not take over, for the reason that is printed, and the old one continues. A process that has been replaced ends with its last session, or after limits.drain."
    )]
    Upgrade {
        /// Time for the new process to start, including its tables; after it the new process is terminated
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "3m")]
        timeout: Duration,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Show the state of the running process and its servers
    #[command(after_help = "Example:\n  vestibule status\n  vestibule status --json")]
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// List the sessions with their servers
    #[command(after_help = "Example:\n  vestibule sessions alice@example.org\n  vestibule sessions --json")]
    Sessions {
        /// List only the sessions of this user
        user: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// End all sessions of a user, who may log in again at once
    #[command(after_help = "Example:\n  vestibule kick alice@example.org")]
    Kick {
        /// The user name as sent by a client
        user: String,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Stop new logins on a server; with --over, also end its sessions, spread over a time
    #[command(
        after_help = "Example:\n  vestibule drain 10.0.0.11:143\n  vestibule drain 10.0.0.11:143 --over 10m\n  vestibule drain shard-a/10.0.0.11:143 --reason new-disks\n\nWith --over the command waits until no session is left. vestibule server NAME up ends the drain."
    )]
    Drain {
        /// The server's name in the configuration or in the metrics; BACKEND/SERVER for one backend only
        server: String,
        /// End the server's sessions, spread over this time
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        over: Option<Duration>,
        /// The reason, which status shows with the operator and the time
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Override a server's configured state
    #[command(
        after_help = "Example:\n  vestibule server 10.0.0.11:143 up\n  vestibule server 10.0.0.11:143 as-configured"
    )]
    Server {
        /// The server's name in the configuration or in the metrics; BACKEND/SERVER for one backend only
        server: String,
        /// The state to set
        state: StateArgument,
        /// The reason, which status shows with the operator and the time
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Move a user to another backend: end the sessions, and delay new logins until the routes name the backend
    #[command(
        after_help = "Example:\n  vestibule move alice@example.org shard-b\n  vestibule move alice@example.org shard-b --while ./copy-mailbox-and-change-the-table\n\nThe routes must name the new backend: change them before, or in the command of --while. Tables are read again and cached results discarded. The move fails if the routes do not name the new backend within --timeout."
    )]
    Move {
        /// The user name as sent by a client
        user: String,
        /// The new backend
        backend: String,
        /// A command for sh, run while the user's logins are delayed; if it fails, the move is aborted
        #[arg(long = "while", value_name = "COMMAND")]
        command: Option<String>,
        /// Time to wait for the routes to name the new backend
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
}

/// The control socket of the running process.
#[derive(Debug, Clone, Args)]
pub struct ControlPath {
    /// The control socket of the running process (admin.control)
    #[arg(long = "control", value_name = "PATH", default_value = "/run/vestibule/control")]
    pub path: PathBuf,
}

/// An administrative state as an argument, or `None` for `as-configured`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateArgument(pub Option<AdminState>);

impl ValueEnum for StateArgument {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self(Some(AdminState::Up)), Self(Some(AdminState::Drain)), Self(Some(AdminState::Down)), Self(None)]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self.0 {
            Some(AdminState::Up) => "The server receives logins",
            Some(AdminState::Drain) => "No new logins; existing sessions continue",
            Some(AdminState::Down) => "No new logins and no checks",
            None => "The state in the configuration",
        };
        Some(PossibleValue::new(self.0.map_or("as-configured", AdminState::as_str)).help(help))
    }
}

/// Options of the demo.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Port for implicit TLS; a port in use, or 0, is replaced by a free one
    #[arg(long, default_value_t = 1993)]
    pub tls_port: u16,
    /// Port for STARTTLS, chosen in the same way
    #[arg(long, default_value_t = 1143)]
    pub starttls_port: u16,
    /// Port for metrics and health, chosen in the same way
    #[arg(long, default_value_t = 9143)]
    pub admin_port: u16,
    /// Directory for the configuration and the certificate; default: a new temporary directory
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
    /// Read a message of each user through the proxy, print the resulting metrics, and exit
    #[arg(long)]
    pub once: bool,
}

/// Parses the arguments of the process. Exits if they are invalid (64) or request help (0).
pub fn parse() -> Command {
    match Arguments::try_parse() {
        Ok(arguments) => arguments.command,
        Err(error) => {
            // An error means that standard output or standard error is closed, so it cannot be reported.
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
    fn invalid_arguments_are_usage_errors() {
        for wrong in [
            &["vestibule"][..],
            &["vestibule", "run"],
            &["vestibule", "route", "-c", "x"],
            &["vestibule", "route", "-c", "x", "--diff", "y"],
            &["vestibule", "dance"],
            &["vestibule", "server", "h:1", "dry"],
        ] {
            assert!(Arguments::try_parse_from(wrong).unwrap_err().use_stderr(), "{wrong:?}");
        }
        assert!(!Arguments::try_parse_from(["vestibule", "run", "--help"]).unwrap_err().use_stderr());
    }
}
