//! The table of rooms, from the top floor down. A room imports from rooms below it only, and no modules import each
//! other in a circle, but a module and its own children.
//!
//! Tests may look wherever they like: modules named `tests` and what stands behind `#[cfg(test)]` are left out.

use std::collections::{BTreeMap, BTreeSet};

use super::source::code_of;

/// Each folder and file right under `src`, and what it is for.
const ROOMS: [(&str, &str); 18] = [
    ("server", "the process: start, threads, signals, end"),
    (
        "control",
        "the control socket: what is shown and what is changed",
    ),
    ("takeover", "live upgrade: the disks of another process"),
    (
        "vhost_user",
        "the protocol, its guard, and the device behind it",
    ),
    ("disk", "one served disk, whichever worker serves it"),
    ("worker", "the data-plane thread"),
    ("image", "what is behind a disk: opened, checked, locked"),
    ("sandbox", "what the process gives up"),
    ("cli", "the command line, and the configuration made of it"),
    ("engine", "I/O on an image: io_uring and copies"),
    ("virtio", "rings, guest memory and the layouts in it"),
    ("config", "what is to be served, checked"),
    ("logging", "the log, and the last line of a process"),
    ("sys", "what every room needs of the operating system"),
    ("mq", "blk-mq"),
    ("error", "errors before the first request"),
    // Below all, in lib.rs: what models replace.
    ("atomic", "the atomics that models replace"),
    ("bin", "programs that use the library"),
];

/// A path of module names, without `crate`.
type Module = Vec<String>;
/// Which module imports from which.
type Imports = BTreeMap<Module, BTreeSet<Module>>;

/// The module of a file under `src`; `None` for programs and tests.
fn module_of(path: &str) -> Option<Module> {
    let path = path.strip_prefix("src/")?.strip_suffix(".rs")?;
    let mut module: Module = path.split('/').map(str::to_owned).collect();
    if module[0] == "bin" || path == "main" || module.iter().any(|name| name == "tests") {
        return None;
    }
    if module
        .last()
        .is_some_and(|name| name == "mod" || name == "lib")
    {
        module.pop();
    }
    Some(module)
}

/// The code without items that only tests have.
fn without_tests(code: &str) -> String {
    let mark = "#[cfg(test)]";
    let mut left = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(mark) {
        left.push_str(&rest[..at]);
        rest = &rest[at + mark.len()..];
        let mut depth = 0;
        let end = rest.char_indices().find(|&(_, c)| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0 && (c == '}' || c == ';')
        });
        rest = end.map_or("", |(at, _)| &rest[at + 1..]);
    }
    left + rest
}

/// The paths that `text` has, each from where it begins; those of `use` trees are written out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let words: Vec<&str> = split(code);
    let mut at = 0;
    while at < words.len() {
        let first = is_name(words[at]) && (at == 0 || words[at - 1] != "::");
        if first && words.get(at + 1) == Some(&"::") {
            at = tree(&words, at, &[], &mut found);
        } else if words[at] == "use" {
            at = tree(&words, at + 1, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one tree of paths from `at` on, and returns where it ends.
fn tree(words: &[&str], mut at: usize, before: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = before.to_vec();
    loop {
        match words.get(at) {
            Some(name) if is_name(name) => path.push((*name).to_owned()),
            Some(&"{") => {
                at += 1;
                while words.get(at).is_some_and(|word| *word != "}") {
                    let next = tree(words, at, &path, found);
                    // What is between two trees: a comma, an `as`.
                    at = next.max(at + 1);
                    while words.get(at).is_some_and(|word| *word == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            _ => {
                found.push(path);
                return at;
            }
        }
        at += 1;
        if words.get(at) != Some(&"::") {
            found.push(path);
            if words.get(at) == Some(&"as") {
                at += 2;
            }
            return at;
        }
        at += 1;
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphabetic() || c == '_') && word != "use" && word != "as"
}

/// Words, `::`, and other characters one by one.
fn split(code: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let name = |c: char| c.is_alphanumeric() || c == '_';
        let len = if name(first) {
            rest.find(|c| !name(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        if !first.is_whitespace() {
            words.push(&rest[..len]);
        }
        rest = &rest[len..];
    }
    words
}

/// What each module of these files imports from others.
fn imports(files: &[(String, String)]) -> Imports {
    let sources: BTreeMap<Module, String> = files
        .iter()
        .filter_map(|(path, text)| Some((module_of(path)?, without_tests(&code_of(text)))))
        .collect();
    let mut imports = Imports::new();
    for (module, code) in &sources {
        let from = imports.entry(module.clone()).or_default();
        for path in paths(code).into_iter().filter(|path| !path.is_empty()) {
            let absolute = match path[0].as_str() {
                "crate" => path[1..].to_vec(),
                "self" => [&module[..], &path[1..]].concat(),
                "super" => {
                    let up = path.iter().take_while(|name| *name == "super").count();
                    let base = module.len().saturating_sub(up);
                    [&module[..base], &path[up..]].concat()
                }
                _ => [&module[..], &path[..]].concat(),
            };
            // The longest part of it that is a module.
            let target = (1..=absolute.len()).rev().map(|len| &absolute[..len]);
            let target = target.into_iter().find(|part| sources.contains_key(*part));
            if let Some(target) = target.filter(|target| *target != &module[..]) {
                from.insert(target.to_vec());
            }
        }
    }
    imports
}

/// Imports from a room above, and modules that have no room.
fn upward(imports: &Imports) -> Vec<String> {
    let floor = |module: &Module| {
        let room = module.first()?;
        ROOMS.iter().position(|(name, _)| name == room)
    };
    let mut complaints = Vec::new();
    for (module, targets) in imports.iter().filter(|(module, _)| !module.is_empty()) {
        let Some(own) = floor(module) else {
            complaints.push(format!("{} is in no room of the table", module.join("::")));
            continue;
        };
        for target in targets {
            if floor(target).is_some_and(|other| other < own) {
                let (module, target) = (module.join("::"), target.join("::"));
                complaints.push(format!("{module} imports from {target}, which is above it"));
            }
        }
    }
    complaints
}

/// Modules that import each other in a circle, which is more than a module and its children.
fn circles(imports: &Imports) -> Vec<String> {
    let kin = |a: &Module, b: &Module| a.starts_with(b) || b.starts_with(a);
    let mut left: Imports = imports
        .iter()
        .map(|(module, targets)| {
            let targets = targets.iter().filter(|target| !kin(module, target));
            (module.clone(), targets.cloned().collect())
        })
        .collect();
    // What imports from nothing that is left is in no circle, and what nothing that is left imports from.
    loop {
        let imported: BTreeSet<Module> = left.values().flatten().cloned().collect();
        let before = left.len();
        left.retain(|module, targets| !targets.is_empty() && imported.contains(module));
        let there: BTreeSet<Module> = left.keys().cloned().collect();
        for targets in left.values_mut() {
            targets.retain(|target| there.contains(target));
        }
        if left.len() == before {
            break;
        }
    }
    let show = |(module, targets): (&Module, &BTreeSet<Module>)| {
        let targets: Vec<String> = targets.iter().map(|target| target.join("::")).collect();
        format!(
            "in a circle: {} imports from {}",
            module.join("::"),
            targets.join(", ")
        )
    };
    left.iter().map(show).collect()
}

#[test]
fn held_rooms_import_from_below_only() {
    let complaints = upward(&imports(&super::files()));
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn held_no_modules_import_in_a_circle() {
    let imports = imports(&super::files());
    assert!(imports.len() > 150, "the modules were not found");
    assert!(
        imports.values().map(BTreeSet::len).sum::<usize>() > 500,
        "the imports were not found"
    );
    let complaints = circles(&imports);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

// ---- showing that they can fail -----------------------------------------------------------------

/// The imports of made-up files.
fn made_up(files: &[(&str, &str)]) -> Imports {
    let owned = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
    imports(&files.iter().map(owned).collect::<Vec<_>>())
}

#[test]
fn an_import_from_above_is_found() {
    let engine = ("src/engine/mod.rs", "pub struct Engine;");
    let drain = ("src/worker/drain.rs", "");
    for text in [
        "use crate::worker::drain::Drain;",
        "use crate::{mq::ids, worker::{self, drain::{Drain, X}}};",
        "fn f(at: &crate::worker::drain::Drain) {}",
        "use super::super::worker::drain as other;",
        "pub(crate) use crate::worker::drain::*;",
    ] {
        let found = upward(&made_up(&[engine, drain, ("src/engine/slot/mod.rs", text)]));
        assert_eq!(found.len(), 1, "{text}: {found:?}");
    }
    for text in [
        "// use crate::worker::drain::Drain;",
        "let s = \"crate::worker::drain\";",
        "#[cfg(test)]\nmod tests {\n    use crate::worker::drain::Drain;\n}\nfn f() {}",
        "use crate::engine::Engine;",
        "use worker::drain::Drain;",
    ] {
        let found = upward(&made_up(&[engine, drain, ("src/engine/slot/mod.rs", text)]));
        assert_eq!(found, Vec::<String>::new(), "{text}");
    }
    let found = upward(&made_up(&[("src/cellar.rs", "fn f() {}")]));
    assert_eq!(found, ["cellar is in no room of the table"]);
}

#[test]
fn a_circle_is_found() {
    let circle = made_up(&[
        ("src/disk/mod.rs", "mod a; mod b; mod c; use a::A;"),
        ("src/disk/a.rs", "use super::b::B;"),
        ("src/disk/b/mod.rs", "use crate::disk::c::C;"),
        ("src/disk/c.rs", "fn f(a: super::a::A) {}"),
    ]);
    assert_eq!(circles(&circle).len(), 3, "{:?}", circles(&circle));
    let straight = made_up(&[
        ("src/disk/mod.rs", "mod a; mod b; use a::A;"),
        ("src/disk/a.rs", "use super::{b::B, Disk};"),
        (
            "src/disk/b/mod.rs",
            "mod x; use super::Disk; use self::x::X;",
        ),
        ("src/disk/b/x.rs", "use super::B;"),
        ("src/disk/tests.rs", "use super::*; use super::a::A;"),
    ]);
    assert_eq!(circles(&straight), Vec::<String>::new());
}
