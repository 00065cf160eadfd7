//! Files, paths and unusual YAML.

use super::*;

#[test]
fn unusable_paths_are_refused() {
    // The process 7 has the socket `control.7` beside `control`.
    for (key, path, expected) in [
        ("admin: {control", "/run/vestibule/control.7", "admin.control: a name that ends in a number"),
        ("admin: {control", &*format!("/{}", "x".repeat(90)), "admin.control: the path is too long"),
        ("state_file", "/var/lib/..", "state_file: expected the path of a file"),
    ] {
        let text = format!("{key}: {path}{}\n", if key.contains('{') { "}" } else { "" });
        assert!(with(&text)[0].contains(expected), "{:?}", with(&text));
    }
    let valid = format!("{MINIMAL}admin: {{control: /run/vestibule.2/control}}\nstate_file: state.json\n");
    parse(Path::new("v.yaml"), &valid).unwrap();
}

#[test]
fn files_without_a_configuration_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let found = |content: &[u8]| {
        let path = folder.path().join("v.yaml");
        fs::write(&path, content).unwrap();
        load(&path).unwrap_err().to_string()
    };
    assert!(found(b"").contains("the file is empty"));
    assert!(found(b"# nothing\n").contains("the file is empty"));
    assert!(found(b"\xff\xfe").contains("not UTF-8 at byte 0"));
    assert!(found(b"a: [\n").contains("invalid YAML"));
    assert!(found(b"a:\n\t- b\n").contains("invalid YAML"));
    assert!(found(b"- a\n").contains("expected a map, got a list"));
    assert!(found(&vec![b'#'; 17 << 20]).contains("larger than 16 MiB"));
    assert!(load(folder.path()).unwrap_err().to_string().contains("directory"));
    assert!(
        load(&folder.path().join("absent.yaml")).unwrap_err().to_string().contains("absent.yaml:1:1: No such file")
    );
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n";
    assert!(found(bomb.as_bytes()).contains("v.yaml:"));
}

#[test]
fn relative_paths_are_resolved_against_the_files_folder() {
    let text = edited("{default: a}", "{table: users.txt}");
    let config = parse(Path::new("/etc/vestibule/v.yaml"), &text).unwrap();
    let Route::Table(table) = &config.routes[0] else { panic!("the route is not a table") };
    assert_eq!(table.value, Path::new("/etc/vestibule/users.txt"));
    assert_eq!((table.location.line, table.location.key.as_str()), (3, "routes[0].table"));
}

#[test]
fn unusual_yaml_is_handled() {
    let expected = ["v.yaml:4:1: limts: unknown key; did you mean `limits`?"];
    assert_eq!(problems(&format!("\u{feff}{MINIMAL}limts: {{}}\n")), expected, "a byte order mark");
    assert_eq!(problems(&format!("{MINIMAL}limts: {{}}\n").replace('\n', "\r\n")), expected);
    assert_eq!(
        with("---\n"),
        ["v.yaml:4:1: a second YAML document begins here (---); a configuration file contains one document"]
    );
    assert_eq!(with("log:\n\tlevel: info\n").len(), 1);
    assert!(with("log:\n\tlevel: info\n")[0].ends_with("indent with spaces: YAML does not allow tabs there"));
    assert!(problems(&"[".repeat(100_000))[0].contains("maps and lists are nested too deeply"));
    assert_eq!(with("\"a\\nb\": 1\n")[0].lines().count(), 1, "a problem must be one line");
    let dotted = edited("']}}", "']}, a.servers: {servers: ['192.0.2.1:143']}}");
    assert_eq!(parse(Path::new("v.yaml"), &dotted).unwrap().backends.len(), 2, "a dot in a name is not a separator");
}
