//! The cost of a table of many users: load time, memory after loading, and lookup time.
//!
//! `cargo bench --profile dist --bench tables` creates tables of a thousand, a million and ten million users in random order in a temporary
//! folder, loads each in a separate process, and looks up random names, known and unknown. The memory is that of the loaded
//! table: the difference of anonymous pages after and before loading.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use vestibule::config;
use vestibule::metrics::{Metrics, Names};
use vestibule::route::{LookupRequest, RouteError, Router};

/// The allocator of the program, so that memory is measured as the program would use it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const SIZES: [usize; 3] = [1_000, 1_000_000, 10_000_000];
const LOOKUPS: usize = 1_000_000;

fn main() -> ExitCode {
    let result = match std::env::var("VESTIBULE_BENCH_TABLE") {
        Ok(folder) => measure(Path::new(&folder)),
        Err(_) => all(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tables: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> anyhow::Result<()> {
    println!("| users | file | load | memory | per user | lookup, known | lookup, unknown |");
    println!("|---|---|---|---|---|---|---|");
    for users in SIZES {
        let folder = tempfile::tempdir()?;
        write_table(folder.path(), users)?;
        let mut child = Command::new(std::env::current_exe()?);
        // The settings of src/allocator.rs.
        child.env("MALLOC_CONF", "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0");
        ensure!(child.env("VESTIBULE_BENCH_TABLE", folder.path()).status()?.success(), "the measuring process failed");
    }
    Ok(())
}

/// Reproducible pseudo-random numbers: SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A realistic user name: first name, last name, number, and one of a thousand domains.
fn name(number: u64) -> String {
    const FIRST: [&str; 16] = [
        "anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo", "ida", "jonas", "klara", "liam", "mia",
        "noah", "olivia", "paul",
    ];
    const LAST: [&str; 16] = [
        "meyer", "smith", "rossi", "novak", "garcia", "larsen", "dubois", "kowalski", "silva", "jansen", "weber",
        "moreau", "costa", "nagy", "popov", "khan",
    ];
    let (first, last) = (FIRST[(number % 16) as usize], LAST[(number / 16 % 16) as usize]);
    format!("{first}.{last}{}@domain{}.example", number / 256, number % 997)
}

fn write_table(folder: &Path, users: usize) -> anyhow::Result<()> {
    let mut order: Vec<u32> = (0..u32::try_from(users)?).collect();
    let mut state = 1;
    for index in (1..order.len()).rev() {
        order.swap(index, usize::try_from(random(&mut state) % (index as u64 + 1))?);
    }
    let mut text = String::new();
    for number in order {
        let number = u64::from(number);
        let _ = writeln!(text, "{} shard-{}", name(number), random(&mut number.clone()) % 8);
    }
    fs::write(folder.join("users.txt"), text)?;
    let backends: Vec<String> =
        (0..8).map(|number| format!("shard-{number}: {{servers: ['10.0.0.{number}:143']}}")).collect();
    let text = format!(
        "listeners: [{{address: '127.0.0.1:1143', tls: none}}]\nbackends: {{{}}}\nroutes: [{{table: users.txt}}]\n",
        backends.join(", ")
    );
    Ok(fs::write(folder.join("vestibule.yaml"), text)?)
}

fn measure(folder: &Path) -> anyhow::Result<()> {
    let config = config::load(&folder.join("vestibule.yaml"))?;
    let metrics = Metrics::new(&Names { routes: vec!["table".to_owned()], ..Names::default() });
    let file = fs::metadata(folder.join("users.txt"))?.len();
    let before = anonymous_pages()?;
    let began = Instant::now();
    let router = Router::build(&config, &metrics, None).map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
    let load = began.elapsed();
    // Wait until the allocator has returned the memory used for loading.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let memory = anonymous_pages()?.saturating_sub(before);
    let users = fs::read_to_string(folder.join("users.txt"))?.lines().count() as u64;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let known = runtime.block_on(lookups(&router, &metrics, |random| name(random % users), true))?;
    let unknown = runtime.block_on(lookups(&router, &metrics, |random| name(users + random % users), false))?;
    println!(
        "| {users} | {:.1} MB | {:.2} s | {:.1} MB | {:.1} B | {known:.2} µs | {unknown:.2} µs |",
        file as f64 / 1e6,
        load.as_secs_f64(),
        memory as f64 / 1e6,
        memory as f64 / users as f64
    );
    Ok(())
}

/// Microseconds per lookup, without the time to generate the names.
async fn lookups(
    router: &Router,
    metrics: &Metrics,
    name: impl Fn(u64) -> String,
    expected: bool,
) -> anyhow::Result<f64> {
    let mut state = 7;
    let requests: Vec<LookupRequest> = (0..LOOKUPS)
        .map(|_| LookupRequest { user: Arc::from(name(random(&mut state))), login_context: None })
        .collect();
    let began = Instant::now();
    let mut found = 0;
    for request in &requests {
        match router.route(request, metrics).await {
            Ok(_) => found += 1,
            Err(RouteError::Unknown) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let duration = began.elapsed();
    ensure!(found == if expected { LOOKUPS } else { 0 }, "{found} users found");
    Ok(duration.as_secs_f64() * 1e6 / LOOKUPS as f64)
}

fn anonymous_pages() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024)
}
