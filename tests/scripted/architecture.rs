//! The architecture: which module may import which, no circles between files, and limits on the size of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What each top-level module imports. A new import is a decision: make it here, and say why in the commit.
const IMPORTS: &[(&str, &str)] = &[
    ("admin_state", ""),
    ("allocator", ""),
    ("main", "app"),
    ("app", "api backend cli config deadline demo identity logging metrics process server snapshot"),
    ("demo", "cli config logging process server"),
    ("cli", "admin_state api backend identity route snapshot"),
    ("api", "admin_state backend identity process route server session_registry snapshot"),
    (
        "server",
        "admin_state admission backend config listener logging metrics process session session_registry snapshot",
    ),
    ("listener", "admission config metrics process session snapshot"),
    (
        "session",
        "admission auth_policy backend config deadline failure generations identity metrics process protocol relay route session_registry snapshot stream tls",
    ),
    ("snapshot", "admission auth_policy backend config identity logging metrics route session_registry tls"),
    ("auth_policy", "config deadline identity lookup metrics tls"),
    ("logging", "config"),
    ("route", "config deadline generations identity lookup metrics process rendezvous template tls"),
    ("session_registry", "backend generations"),
    ("backend", "admin_state config deadline failure identity lookup metrics protocol relay rendezvous stream tls"),
    ("generations", ""),
    ("lookup", "config deadline tls"),
    ("protocol", "identity"),
    ("rendezvous", ""),
    ("stream", "relay tls"),
    ("deadline", ""),
    ("relay", "record_layer"),
    ("tls", "admission config identity metrics process record_layer"),
    ("admission", "config"),
    ("metrics", "admin_state failure identity"),
    ("process", "config"),
    ("record_layer", ""),
    ("config", "admin_state identity template"),
    ("failure", ""),
    ("identity", ""),
    ("template", ""),
];

/// Maximum number of lines of a file.
const MAX_FILE_LINES: usize = 560;

/// Maximum number of lines of a function, from its name to its closing brace.
const MAX_FUNCTION_LINES: usize = 60;

/// Imports of each module.
type Graph = BTreeMap<String, BTreeSet<String>>;

#[test]
fn the_import_table_states_the_imports_and_has_no_circle() {
    let problems = problems(IMPORTS, &top_level_imports());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn each_fault_of_an_import_table_is_found() {
    let real = |rows: &[(&str, &str)]| -> Graph {
        rows.iter().map(|(from, to)| ((*from).to_owned(), to.split(' ').map(str::to_owned).collect())).collect()
    };
    let sound = [("a", "b c"), ("b", "c"), ("c", "")];
    let imports = real(&[("a", "b c"), ("b", "c"), ("c", "")]);
    assert_eq!(problems(&sound, &imports), [""; 0]);
    let unused = problems(&[("a", "b c"), ("b", "c"), ("c", ""), ("d", "")], &imports);
    assert_eq!(unused, ["unused row: d"]);
    assert_eq!(problems(&[("a", "b c"), ("b", "a c"), ("c", "")], &imports)[0], "unused import: b does not import a");
    let duplicate = problems(&[("a", "b c"), ("b", "c"), ("b", "c"), ("c", "")], &imports);
    assert_eq!(duplicate, ["duplicate row: b"]);
    assert_eq!(problems(&[("a", "b c c"), ("b", "c"), ("c", "")], &imports), ["duplicate import: a lists c twice"]);
    assert_eq!(
        problems(&[("a", "b"), ("b", "c"), ("c", "")], &imports),
        ["a imports c, which the table does not allow"]
    );
    assert_eq!(problems(&[("b", "c"), ("c", "")], &imports), ["missing row: a"]);
    let circle = [("a", "b c"), ("b", "c"), ("c", "a")];
    assert_eq!(problems(&circle, &real(&circle)), ["circle: a, b, c"]);
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let graph = file_imports();
    assert!(graph.values().map(BTreeSet::len).sum::<usize>() > 200, "only {} files have imports", graph.len());
    let circles = circles(&graph);
    assert!(circles.is_empty(), "circles:\n{}", circles.join("\n"));
}

#[test]
fn no_file_is_too_long() {
    for path in sources() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= MAX_FILE_LINES, "{} has {lines} lines", path.display());
    }
}

#[test]
fn no_function_is_too_long() {
    let mut too_long = Vec::new();
    let mut count = 0;
    for path in sources().iter().filter(|path| !is_test(&module_path(path))) {
        let text = without_tests(&fs::read_to_string(path).unwrap());
        for (name, lines) in function_lengths(&text) {
            count += 1;
            if lines > MAX_FUNCTION_LINES {
                too_long.push(format!("{}: {name} has {lines} lines", path.display()));
            }
        }
    }
    assert!(count > 1000, "only {count} functions");
    assert!(too_long.is_empty(), "{}", too_long.join("\n"));
    let example = "fn a() {\n    1;\n}\nfn b() {}\n    async fn c(\n    ) {\n        if d {\n        }\n    }\n";
    let expected = [("a", 3), ("b", 1), ("c", 5)].map(|(name, lines)| (name.to_owned(), lines));
    assert_eq!(function_lengths(example), expected);
}

/// What is wrong with `table`, compared with the real imports.
fn problems(table: &[(&str, &str)], real: &Graph) -> Vec<String> {
    let mut found = Vec::new();
    let mut allowed = Graph::new();
    for (module, imports) in table {
        let mut row = BTreeSet::new();
        for import in imports.split_whitespace() {
            if !row.insert(import.to_owned()) {
                found.push(format!("duplicate import: {module} lists {import} twice"));
            }
        }
        if allowed.insert((*module).to_owned(), row).is_some() {
            found.push(format!("duplicate row: {module}"));
        }
    }
    for (module, imports) in real {
        let Some(row) = allowed.get(module) else {
            found.push(format!("missing row: {module}"));
            continue;
        };
        for import in imports.iter().filter(|import| !import.is_empty() && !row.contains(*import)) {
            found.push(format!("{module} imports {import}, which the table does not allow"));
        }
        for import in row.difference(imports) {
            found.push(format!("unused import: {module} does not import {import}"));
        }
    }
    found.extend(
        allowed.keys().filter(|module| !real.contains_key(*module)).map(|module| format!("unused row: {module}")),
    );
    found.extend(circles(&allowed).into_iter().map(|circle| format!("circle: {circle}")));
    found
}

/// The circles, each as the list of the modules that reach one another.
fn circles(graph: &Graph) -> Vec<String> {
    let reached: BTreeMap<&String, BTreeSet<&String>> =
        graph.keys().map(|module| (module, reachable(graph, module))).collect();
    let mut found = BTreeSet::new();
    for (module, imports) in &reached {
        if imports.contains(*module) {
            let circle = imports.iter().filter(|other| reached.get(**other).is_some_and(|back| back.contains(*module)));
            found.insert(circle.map(|other| other.as_str()).collect::<Vec<_>>().join(", "));
        }
    }
    found.into_iter().collect()
}

/// All modules that `from` imports, directly and indirectly.
fn reachable<'a>(graph: &'a Graph, from: &str) -> BTreeSet<&'a String> {
    let mut found = BTreeSet::new();
    let mut open: Vec<&String> = graph.get(from).into_iter().flatten().collect();
    while let Some(module) = open.pop() {
        if found.insert(module) {
            open.extend(graph.get(module).into_iter().flatten());
        }
    }
    found
}

/// The imports of each top-level module of the library.
fn top_level_imports() -> Graph {
    let mut graph = Graph::new();
    for path in sources() {
        let module = module_path(&path);
        // The crate's root only declares the modules.
        if module == ["lib"] {
            continue;
        }
        let imports = graph.entry(module[0].clone()).or_default();
        imports.extend(
            imports_of(&path).into_iter().map(|import| import[0].clone()).filter(|import| *import != module[0]),
        );
    }
    let modules: BTreeSet<String> = graph.keys().cloned().collect();
    graph.values_mut().for_each(|imports| imports.retain(|import| modules.contains(import)));
    graph
}

/// The imports of each file, without those of a parent module, which a child may use, and without tests.
fn file_imports() -> Graph {
    let files: BTreeSet<Vec<String>> = sources().iter().map(|path| module_path(path)).collect();
    let mut graph = Graph::new();
    for path in sources() {
        let module = module_path(&path);
        if is_test(&module) || ["lib", "main"].contains(&module[0].as_str()) {
            continue;
        }
        let imports = graph.entry(module.join("/")).or_default();
        for import in imports_of(&path) {
            let file =
                (1..=import.len()).rev().map(|length| import[..length].to_vec()).find(|file| files.contains(file));
            if let Some(file) = file.filter(|file| !module.starts_with(file)) {
                imports.insert(file.join("/"));
            }
        }
    }
    graph
}

/// The paths that a file names, from the crate's root: those of `use` declarations and those written in full.
fn imports_of(path: &Path) -> Vec<Vec<String>> {
    let module = module_path(path);
    let text = fs::read_to_string(path).unwrap();
    // Documentation and the file's tests may name anything.
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
    let code = without_tests(&code);
    let mut found = Vec::new();
    for root in ["crate::", "super::", "self::", "vestibule::"] {
        for (at, _) in code.match_indices(root) {
            if code[..at].ends_with(|letter: char| letter == ':' || letter == '_' || letter.is_alphanumeric()) {
                continue;
            }
            let tree = &code[at..];
            let end = tree.find(|letter: char| !(letter.is_alphanumeric() || "_:{}, \n".contains(letter)));
            expand(&[], &tree[..end.unwrap_or(tree.len())], &mut found);
        }
    }
    found.into_iter().filter_map(|path| from_root(&module, &path)).collect()
}

/// Whether a module contains tests only.
fn is_test(module: &[String]) -> bool {
    module.iter().any(|name| name.ends_with("tests") || name == "transcripts")
}

/// The text of a file before its tests.
fn without_tests(text: &str) -> String {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()
}

/// Names and lengths in lines of the functions in a formatted file.
fn function_lengths(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some((before, rest)) = code.split_once("fn ") else { continue };
        let words = ["pub", "pub(crate)", "pub(super)", "pub(in", "crate::route)", "async", "const"];
        if !before.split_whitespace().all(|word| words.contains(&word)) {
            continue;
        }
        let name = rest.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        let is_one_line = line.ends_with('}') || line.ends_with(';');
        let length = if is_one_line { 0 } else { lines[start..].iter().position(|line| *line == end).unwrap_or(0) };
        found.push((name, length + 1));
    }
    found
}

/// Expands a tree such as `a::{b, c::d}` to paths.
fn expand(prefix: &[String], tree: &str, found: &mut Vec<Vec<String>>) {
    let tree = tree.trim_start();
    let name: String = tree.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
    let path = [prefix, std::slice::from_ref(&name)].concat();
    match tree[name.len()..].strip_prefix("::") {
        Some(rest) if rest.starts_with('{') => {
            let (mut depth, mut start) = (0, 1);
            for (at, letter) in rest.char_indices() {
                match letter {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 || (depth == 1 && letter == ',') {
                    if !rest[start..at].trim().is_empty() {
                        expand(&path, &rest[start..at], found);
                    }
                    start = at + 1;
                }
                if depth == 0 {
                    return;
                }
            }
        }
        Some(rest) => expand(&path, rest, found),
        None => found.push(path),
    }
}

/// The path from the crate's root; `None` if it leads out of the crate.
fn from_root(module: &[String], path: &[String]) -> Option<Vec<String>> {
    match path[0].as_str() {
        "crate" | "vestibule" => Some(path[1..].to_vec()).filter(|path| !path.is_empty()),
        "self" => Some([module, &path[1..]].concat()),
        _ => {
            let ups = path.iter().take_while(|name| *name == "super").count();
            let base = module.get(..module.len().checked_sub(ups)?)?;
            Some([base, &path[ups..]].concat()).filter(|path| !path.is_empty())
        }
    }
}

/// The path of a file's module from the crate's root.
fn module_path(path: &Path) -> Vec<String> {
    let inside = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().with_extension("");
    let mut names: Vec<String> = inside.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
    if names.len() > 1 && names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    names
}

fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 100, "{} files", found.len());
    found
}
