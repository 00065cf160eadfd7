//! The fuzz targets without libFuzzer: every run of the tests takes them through the corpus that is kept, and through changes of it.
//!
//! Nothing is learnt of which code an input reaches, so this finds less a minute than libFuzzer (see fuzz/README.md); but what libFuzzer
//! has found interesting is in the corpus, and to change it a little costs seconds and no second build. The changes are the
//! same in every run; `FUZZ_SEED` makes others and `FUZZ_ROUNDS` more of them.

#![expect(unreachable_pub, clippy::unwrap_used, reason = "a test's panic is its failure; one binary has no outside")]

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs, io};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Changed inputs a target, where it is quick.
const ROUNDS: u64 = 60_000;
/// Of these, one input takes long: sealing without optimization, YAML that is read several times, a file that is written, a
/// pattern that is compiled.
const SLOW: [(&str, u64); 4] = [("records", 20_000), ("configuration", 5_000), ("table", 10_000), ("template", 20_000)];
/// Longer inputs say nothing new, and take long.
const MAX_INPUT: usize = 4096;
/// Fewer files than this are no corpus.
const LEAST: usize = 20;

/// A test of its own for each target, so that they run beside each other and a filter finds them.
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
    assert!(corpus.len() >= LEAST, "{} files in fuzz/corpus/{name}", corpus.len());
    let rounds = SLOW.iter().find(|(slow, _)| *slow == name).map_or(ROUNDS, |(_, rounds)| *rounds);
    let rounds = setting("FUZZ_ROUNDS", rounds);
    for input in &corpus {
        call(*target, input);
    }
    let mut change = Change { state: setting("FUZZ_SEED", 1), corpus: &corpus, words: &words(name) };
    for _ in 0..rounds {
        call(*target, &change.next());
    }
    // Past the capture of a test's output: what was run is told though nothing failed.
    let told = format!(
        "fuzz {name}: {} inputs of the corpus and {rounds} changes of them in {:.1} s\n",
        corpus.len(),
        began.elapsed().as_secs_f64()
    );
    io::stderr().write_all(told.as_bytes()).unwrap();
}

fn call(target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("the input was b\"{}\"", input.escape_ascii());
        resume_unwind(panic);
    }
}

/// Words of the target's dictionary, or of IMAP's: lines like `"text\x0d\x0a"`.
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

/// Inputs like those of the corpus, but different: reproducible from the seed.
struct Change<'a> {
    state: u64,
    corpus: &'a [Vec<u8>],
    words: &'a [Vec<u8>],
}

impl Change<'_> {
    fn next(&mut self) -> Vec<u8> {
        let mut input = self.pick(self.corpus).clone();
        for _ in 0..=self.below(4) {
            self.once(&mut input);
        }
        input.truncate(MAX_INPUT);
        input
    }

    fn once(&mut self, input: &mut Vec<u8>) {
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
            // The end of another.
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
            // In the place of as much.
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

    /// Splitmix64, which is random enough to choose by.
    fn below(&mut self, limit: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}
