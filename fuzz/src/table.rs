//! The table file of users: any bytes are a table or a list of what is wrong, a line each.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::{env, fs, process};

use vestibule::config::{self, Config};
use vestibule::metrics::{Metrics, Names};
use vestibule::route::Router;

/// What does not change: where the file is, and what names it.
struct Around {
    path: PathBuf,
    config: Config,
    metrics: Metrics,
}

pub fn run(table: &[u8]) {
    static AROUND: LazyLock<Around> = LazyLock::new(Around::new);
    let around = &*AROUND;
    fs::write(&around.path, table).expect("the folder can be written");
    let built = Router::build(&around.config, &around.metrics, None);
    fs::remove_file(&around.path).expect("it is there");
    if let Err(problems) = built {
        assert!(!problems.is_empty());
        for problem in &problems {
            assert!(!format!("{problem:?}").is_empty());
        }
    }
}

impl Around {
    fn new() -> Self {
        // In memory where there is such a folder: it is written at each turn.
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { env::temp_dir() };
        let path = folder.join(format!("vestibule-fuzz-{}", process::id()));
        let text = format!(
            "listeners: [{{address: \"127.0.0.1:0\", tls: none}}]\n\
             backends: {{shard-a: {{servers: [\"127.0.0.1:1\"]}}, shard-b: {{servers: [\"127.0.0.1:2\"]}}}}\n\
             routes: [{{table: {}}}]\n",
            path.display()
        );
        let config = config::parse(&folder.join("vestibule.yaml"), &text).expect("the configuration is good");
        let metrics = Metrics::new(&Names { routes: vec!["table".to_owned()], ..Names::default() });
        Self { path, config, metrics }
    }
}
