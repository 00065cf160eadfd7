//! The fuzz targets without libFuzzer: the tests run them with the committed corpus and with mutations of it.
//!
//! Without coverage feedback this finds less per minute than libFuzzer (see fuzz/README.md). But the corpus contains the inputs that
//! libFuzzer has found interesting, and mutating them takes seconds and no second build. The mutations are the same in every run;
//! `FUZZ_SEED` selects other ones, and `FUZZ_ROUNDS` sets their number.

#![expect(unreachable_pub, clippy::unwrap_used, reason = "a test's panic is its failure; one binary has no outside")]

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs, io};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Number of mutations for a fast target.
const ROUNDS: u64 = 60_000;
/// Number of mutations for slow targets, which seal without optimisation, parse YAML several times, write a file or compile a pattern.
const SLOW: [(&str, u64); 4] = [("records", 20_000), ("configuration", 5_000), ("table", 10_000), ("template", 20_000)];
/// Maximum size of a mutation: longer inputs are slow and find nothing new.
const MAX_INPUT: usize = 4096;
/// Minimum number of files in a corpus.
const MIN_CORPUS: usize = 20;

/// Creates a test for each target, so that targets run in parallel and can be selected.
macro_rules! tests {
    ($($target:ident)*) => {
        $(#[test] fn $target() { run(stringify!($target)); })*

        #[test]
        fn every_target_has_a_test_and_a_program() {
            let mut tested = [$(stringify!($target)),*];
            tested.sort_unstable();
            let mut targets: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
            targets.sort_unstable();
            let mut programs: Vec<String> = files(&folder().join("fuzz_targets"))
                .iter()
                .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
                .collect();
            programs.sort_unstable();
            assert_eq!(tested, *targets);
            assert_eq!(targets, programs);
        }
    };
}

tests! { prelogin sasl backend_login proxy_header client_hello records configuration table template }

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    files
}

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn run(name: &str) {
    let began = Instant::now();
    let (_, target) = targets::TARGETS.iter().find(|(target, _)| *target == name).expect("a target");
    let corpus: Vec<Vec<u8>> =
        files(&folder().join("corpus").join(name)).iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(corpus.len() >= MIN_CORPUS, "{} files in fuzz/corpus/{name}", corpus.len());
    let rounds = SLOW.iter().find(|(slow, _)| *slow == name).map_or(ROUNDS, |(_, rounds)| *rounds);
    let rounds = setting("FUZZ_ROUNDS", rounds);
    for input in &corpus {
        call(*target, input);
    }
    let mut mutations = Mutations { state: setting("FUZZ_SEED", 1), corpus: &corpus, words: &words(name) };
    for _ in 0..rounds {
        call(*target, &mutations.next());
    }
    // Written directly, because the output of a passing test is captured.
    let summary = format!(
        "fuzz {name}: {} inputs of the corpus and {rounds} mutations in {:.1} s\n",
        corpus.len(),
        began.elapsed().as_secs_f64()
    );
    io::stderr().write_all(summary.as_bytes()).unwrap();
}

fn call(target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("the input was b\"{}\"", input.escape_ascii());
        resume_unwind(panic);
    }
}

/// Returns the words of the target's dictionary, or of the one of IMAP, which has lines like `"text\x0d\x0a"`.
fn words(name: &str) -> Vec<Vec<u8>> {
    let own = folder().join(format!("{name}.dict"));
    let path = if own.exists() { own } else { folder().join("imap.dict") };
    let text = fs::read_to_string(path).unwrap();
    let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    let words: Vec<Vec<u8>> = quoted.map(unquoted).collect();
    assert!(words.len() >= 10, "{} words", words.len());
    words
}

fn unquoted(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut word = Vec::new();
    while let Some(byte) = bytes.next() {
        word.push(match byte {
            b'\\' => match bytes.next().unwrap() {
                b'x' => {
                    let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                other => other,
            },
            other => other,
        });
    }
    word
}

/// Mutations of the corpus, reproducible from the seed.
struct Mutations<'a> {
    state: u64,
    corpus: &'a [Vec<u8>],
    words: &'a [Vec<u8>],
}

impl Mutations<'_> {
    fn next(&mut self) -> Vec<u8> {
        let mut input = self.pick(self.corpus).clone();
        for _ in 0..=self.below(4) {
            self.mutate(&mut input);
        }
        input.truncate(MAX_INPUT);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len() + 1);
        let end = at + self.below(input.len() - at + 1).min(16);
        match self.below(8) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = *self.pick(&[0, b'\r', b'\n', b' ', b'"', b'{', 0x7f, 0x80, 0xff]),
            0..=2 => {
                let byte = self.below(256) as u8;
                input.insert(at, byte);
            }
            3 => drop(input.drain(at..end)),
            4 => {
                let copy = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            // Replaces the end by the end of another input.
            5 => {
                let other = self.pick(self.corpus);
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            6 => {
                let word = self.pick(self.words).clone();
                input.splice(at..at, word);
            }
            // Overwrites bytes by a word.
            _ => {
                let word = self.pick(self.words).clone();
                let end = (at + word.len()).min(input.len());
                input.splice(at..end, word);
            }
        }
    }

    fn pick<'b, T>(&mut self, of: &'b [T]) -> &'b T {
        &of[self.below(of.len())]
    }

    /// Returns a number below `limit` from the generator Splitmix64.
    fn below(&mut self, limit: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}
