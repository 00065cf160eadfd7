//! The table file of users. Any bytes are a valid table or lead to a list of errors.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::{env, fs, process};

use vestibule::config::{self, Config};
use vestibule::metrics::{Metrics, Names};
use vestibule::route::Router;

/// The path of the table file, and the configuration that names it.
struct Fixture {
    path: PathBuf,
    config: Config,
    metrics: Metrics,
}

pub fn run(table: &[u8]) {
    static FIXTURE: LazyLock<Fixture> = LazyLock::new(Fixture::new);
    let fixture = &*FIXTURE;
    fs::write(&fixture.path, table).expect("the folder is writable");
    let built = Router::build(&fixture.config, &fixture.metrics, None);
    fs::remove_file(&fixture.path).expect("the file exists");
    if let Err(problems) = built {
        assert!(!problems.is_empty());
        for problem in &problems {
            assert!(!format!("{problem:?}").is_empty());
        }
    }
}

impl Fixture {
    fn new() -> Self {
        // In memory if possible, because the file is written for each input.
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { env::temp_dir() };
        let path = folder.join(format!("vestibule-fuzz-{}", process::id()));
        let text = format!(
            "listeners: [{{address: \"127.0.0.1:0\", tls: none}}]\n\
             backends: {{shard-a: {{servers: [\"127.0.0.1:1\"]}}, shard-b: {{servers: [\"127.0.0.1:2\"]}}}}\n\
             routes: [{{table: {}}}]\n",
            path.display()
        );
        let config = config::parse(&folder.join("vestibule.yaml"), &text).expect("the configuration is valid");
        let metrics = Metrics::new(&Names { routes: vec!["table".to_owned()], ..Names::default() });
        Self { path, config, metrics }
    }
}
