//! The command line: what can be asked for, and the help that says how. Called by `main`.

pub mod explain;
pub mod operate;

use std::path::PathBuf;
use std::process::exit;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::admin_state::AdminState;

/// sysexits.h EX_USAGE.
const EX_USAGE: i32 = 64;

/// IMAP proxy and load balancer: one TLS front door, the right mailbox server behind it.
#[derive(Debug, Parser)]
#[command(
    name = "vestibule",
    version,
    after_help = "Example:\n  vestibule demo\n\nExit codes: 0 done, 1 no route knows the user (route) or not done (commands to the running process), 64 usage, 70 internal or not bound, 77 another user's process or file at admin.control, 78 configuration"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy until SIGTERM or SIGINT
    #[command(
        after_help = "Example:\n  vestibule run --config /etc/vestibule/vestibule.yaml\n\nSIGHUP loads the configuration again; SIGTERM and SIGINT stop; a second one skips limits.ready_delay, or limits.drain if that is over or none."
    )]
    Run {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Take the place of the process that runs with this configuration: its listening sockets first, so that no connection
        /// is refused; its sessions stay with it until they end, or limits.drain is over
        #[arg(long)]
        replace: bool,
    },
    /// Check a configuration: build everything, look up run_as, bind nothing; exit 0 or 78
    #[command(
        after_help = "Example:\n  vestibule check --config /etc/vestibule/vestibule.yaml && systemctl reload vestibule\n\nServers that speak TLS are connected to for three seconds at most, to warn of certificates that are not trusted. Warnings do not change the exit code, and a server that cannot be reached is not reported."
    )]
    Check {
        /// The configuration file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        /// Connect to no server
        #[arg(long)]
        offline: bool,
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
    /// Load the configuration again, in the running process; exit 0, or 78 and nothing changed
    #[command(
        after_help = "Example:\n  vestibule reload\n  vestibule reload --control /run/vestibule/control\n\nThe same as SIGHUP, but tells what is wrong."
    )]
    Reload {
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Replace the running process by the installed program without refusing connections; exit 0 once it serves
    #[command(
        after_help = "Example:\n  vestibule upgrade\n  vestibule upgrade --timeout 10m\n\nExit 1: the new process did not take over, for the reason that is printed, and the running one goes on. When it has been replaced, the running process ends with its last session, or after limits.drain."
    )]
    Upgrade {
        /// Time within which the new process must serve, tables read; then it is ended
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "3m")]
        timeout: Duration,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Tell how the running process and its servers are
    #[command(after_help = "Example:\n  vestibule status\n  vestibule status --json")]
    Status {
        /// For programs
        #[arg(long)]
        json: bool,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// List who is logged in where
    #[command(after_help = "Example:\n  vestibule sessions alice@example.org\n  vestibule sessions --json")]
    Sessions {
        /// Only this user
        user: Option<String>,
        /// For programs
        #[arg(long)]
        json: bool,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// End all sessions of a user; the user may come back at once
    #[command(after_help = "Example:\n  vestibule kick alice@example.org")]
    Kick {
        /// The user name as a client would send it
        user: String,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Take a server out of service: no new logins, and with --over its sessions are ended evenly
    #[command(
        after_help = "Example:\n  vestibule drain 10.0.0.11:143\n  vestibule drain 10.0.0.11:143 --over 10m\n  vestibule drain shard-a/10.0.0.11:143 --reason new-disks\n\nWith --over it waits until no session is left. vestibule server NAME up brings the server back."
    )]
    Drain {
        /// As configured, or as metrics call it; BACKEND/SERVER: in this backend alone
        server: String,
        /// End its sessions, spread over this time
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        over: Option<Duration>,
        /// Shown by status, with who set the state and when
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
        /// As configured, or as metrics call it; BACKEND/SERVER: in this backend alone
        server: String,
        /// The state to set
        state: StateArgument,
        /// Shown by status, with who set the state and when
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Bring a user to another backend: keep new logins waiting, end the sessions, route afresh, let the user in again
    #[command(
        after_help = "Example:\n  vestibule move alice@example.org shard-b\n  vestibule move alice@example.org shard-b --while ./copy-mailbox-and-change-the-table\n\nThe routes must name the new backend: change them before, or in the command given with --while, which runs while the user is kept out. Tables are read again and cached answers forgotten; the move fails if the routes do not name the new backend within --timeout."
    )]
    Move {
        /// The user name as a client would send it
        user: String,
        /// Where the routes send the user from now on
        backend: String,
        /// Run by sh while no session is open; if it fails, the user is let in again and nothing is claimed
        #[arg(long = "while", value_name = "COMMAND")]
        command: Option<String>,
        /// How long to wait until the routes name the new backend
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// The running process.
        #[command(flatten)]
        control: ControlPath,
    },
    /// Show the main job on an embedded default: two tiny mailbox servers, a certificate, the proxy in front
    #[command(
        after_help = "Example:\n  vestibule demo\n  vestibule demo --tls-port 0 --starttls-port 0 --admin-port 0 --once"
    )]
    Demo(DemoOptions),
}

/// Where the running process is reached.
#[derive(Debug, Clone, Args)]
pub struct ControlPath {
    /// The running process's admin.control
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
            &["vestibule", "server", "h:1", "dry"],
        ] {
            assert!(Arguments::try_parse_from(wrong).unwrap_err().use_stderr(), "{wrong:?}");
        }
        assert!(!Arguments::try_parse_from(["vestibule", "run", "--help"]).unwrap_err().use_stderr());
    }
}
