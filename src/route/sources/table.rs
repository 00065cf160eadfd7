//! Routes by a text file with one user per line.
//!
//! ```text
//! # comment
//! alice@example.org   shard-a                        one user
//! bob@example.org     shard-a server=10.0.0.11:143   an answer in text form, see `answer`
//! carol@example.org   refuse: The account was closed.
//! @example.net        shard-b                        all users of a domain
//! *                   shard-c                        all other users
//! ```
//!
//! The exact name takes precedence over its domain, and the domain over `*`. ASCII case is ignored. The file is watched: a
//! changed file is loaded beside the old content and replaces it completely, or not at all if it contains an error; every invalid line is
//! reported with its number.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::time;

use super::table_index::{LineError, TableIndex};
use crate::config::{Located, Problem};
use crate::metrics::RouteMetrics;
use crate::process::file_watch::{FileWatch, POLL_INTERVAL};
use crate::route::LookupResult;
use crate::route::answer::DeclaredBackends;

/// When an operator waits for a reload, a file that has not changed for this long counts as completely written.
const SETTLE_TIME: Duration = Duration::from_millis(100);

/// A table and its file.
#[derive(Debug)]
pub(in crate::route) struct Table {
    path: Located<PathBuf>,
    declared: DeclaredBackends,
    file_watch: Mutex<FileWatch>,
    /// Locked while the file is loaded.
    loading: tokio::sync::Mutex<()>,
    index: RwLock<Arc<TableIndex>>,
}

impl Table {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// The file cannot be read, or contains invalid lines: each becomes a [`Problem`] with the file name and the line number.
    pub(in crate::route) fn load(path: &Located<PathBuf>, declared: &DeclaredBackends) -> Result<Self, Vec<Problem>> {
        // Created before the file is read, so that a later change is detected.
        let file_watch = Mutex::new(FileWatch::new(vec![path.value.clone()]));
        let index = read(&path.value, declared).map_err(|errors| {
            let problem = |error| path.location.problem(FileError { path: &path.value, error }.to_string());
            errors.iter().map(problem).collect::<Vec<_>>()
        })?;
        let index = RwLock::new(Arc::new(index));
        let (path, declared) = (path.clone(), declared.clone());
        Ok(Self { path, declared, file_watch, loading: tokio::sync::Mutex::default(), index })
    }

    /// Whether loading `path` again would give the same table: neither the file nor the backends have changed.
    pub(in crate::route) fn is_current(&self, path: &Path, declared: &DeclaredBackends) -> bool {
        self.path.value == path && self.declared == *declared && self.file_watch().is_unchanged()
    }

    pub(in crate::route) fn lookup(&self, user: &str) -> LookupResult {
        self.index().lookup(user).map_or(LookupResult::Unknown, LookupResult::Found)
    }

    /// Number of entries.
    pub(in crate::route) fn len(&self) -> usize {
        self.index().len()
    }

    fn index(&self) -> Arc<TableIndex> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reloads the file whenever it has changed. Never returns.
    pub(in crate::route) async fn watch(self: Arc<Self>, metrics: RouteMetrics) {
        loop {
            time::sleep(POLL_INTERVAL).await;
            let loading = self.loading.lock().await;
            if self.file_watch().is_due() {
                // Errors are logged.
                let _ = self.reload(&metrics).await;
            }
            drop(loading);
        }
    }

    /// Reloads the file if it has changed, as soon as it is completely written. The caller sets the deadline.
    ///
    /// # Errors
    /// The first problem of the file; the previous table stays in use.
    pub(in crate::route) async fn refresh(self: &Arc<Self>, metrics: &RouteMetrics) -> Result<(), String> {
        // Waits for a reload that [`Table::watch`] has begun.
        let _loading = self.loading.lock().await;
        if self.file_watch().is_unchanged() {
            return Ok(());
        }
        loop {
            self.file_watch().observe();
            time::sleep(SETTLE_TIME).await;
            if self.file_watch().is_settled() {
                return self.reload(metrics).await;
            }
        }
    }

    /// Reloads the file. The caller has locked `loading`.
    async fn reload(self: &Arc<Self>, metrics: &RouteMetrics) -> Result<(), String> {
        let table = self.clone();
        // Sorting millions of names takes seconds, which would block a runtime thread.
        let loaded = tokio::task::spawn_blocking(move || table.replace_index()).await;
        let loaded = loaded.unwrap_or_else(|_| Err(vec![LineError::of_file("could not be loaded")]));
        metrics.set_users(self.len());
        metrics.set_load_failed(loaded.is_err());
        let errors = match loaded {
            Ok(()) => {
                let file = self.path.value.display();
                tracing::info!(%file, entries = self.len(), "table loaded");
                return Ok(());
            }
            Err(errors) => errors,
        };
        self.file_watch().failed();
        let texts = errors.iter().map(|error| FileError { path: &self.path.value, error });
        let texts: Vec<String> = texts.map(|error| format!("{error}; the old table stays in use")).collect();
        texts.iter().for_each(|text| tracing::error!("{text}"));
        Err(texts.into_iter().next().unwrap_or_default())
    }

    fn replace_index(&self) -> Result<(), Vec<LineError>> {
        let index = read(&self.path.value, &self.declared)?;
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
        Ok(())
    }

    fn file_watch(&self) -> MutexGuard<'_, FileWatch> {
        // A poisoned lock is safe: no critical section can panic halfway through a change.
        self.file_watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(path: &Path, declared: &DeclaredBackends) -> Result<TableIndex, Vec<LineError>> {
    let bytes = fs::read(path).map_err(|error| vec![LineError::of_file(error.to_string())])?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        vec![LineError::at(line + 1, "not UTF-8")]
    })?;
    TableIndex::parse(&mut text, declared)
}

/// An error with the file it is in: `users.txt:7: message`, or `users.txt: message` if it concerns the whole file.
struct FileError<'a> {
    path: &'a Path,
    error: &'a LineError,
}

impl Display for FileError<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (path, message) = (self.path.display(), &self.error.message);
        match self.error.line {
            Some(line) => write!(f, "{path}:{line}: {message}"),
            None => write!(f, "{path}: {message}"),
        }
    }
}
