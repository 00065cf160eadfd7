//! The table file of users: any bytes are a table or a list of what is wrong, a line each.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::{env, fs, process};

use vestibule::config;
use vestibule::metrics::{Metrics, Names};
use vestibule::route::Router;

pub fn run(table: &[u8]) {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    let metrics = METRICS.get_or_init(|| Metrics::new(&Names { routes: vec!["table".to_owned()], ..Names::default() }));
    // In memory where there is such a folder: it is written at each turn.
    let memory = PathBuf::from("/dev/shm");
    let folder = if memory.is_dir() { memory } else { env::temp_dir() };
    let path = folder.join(format!("vestibule-fuzz-{}", process::id()));
    fs::write(&path, table).expect("the folder can be written");
    let text = format!(
        "listeners: [{{address: \"127.0.0.1:0\", tls: none}}]\n\
         backends: {{shard-a: {{servers: [\"127.0.0.1:1\"]}}, shard-b: {{servers: [\"127.0.0.1:2\"]}}}}\n\
         routes: [{{table: {}}}]\n",
        path.display()
    );
    let config = config::parse(&folder.join("vestibule.yaml"), &text).expect("the configuration is good");
    if let Err(problems) = Router::build(&config, metrics) {
        assert!(!problems.is_empty());
        for problem in &problems {
            assert!(!format!("{problem:?}").is_empty());
        }
    }
}
