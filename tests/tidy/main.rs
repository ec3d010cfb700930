//! The rules of the house, held by a test: who may know what, where `unsafe` may stand, how long a file
//! may be, and that the documents point at things that exist.
//!
//! Each rule is a function from a file's path (relative to the repository) and its text to complaints.
//! Beside each rule stands a test that shows it can fail.

mod rooms;
mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use clap::CommandFactory;

use source::{code_of, first_word, is_word, line_of, members, mentions};

/// Files outside src/virtio and src/engine that may hold `unsafe`: those that make an owned descriptor
/// from a number received from elsewhere.
const FD_GLUE: &[&str] = &["src/sys/listener/mod.rs", "src/worker/driver.rs"];

/// Files of images that ask a block device or the kernel with an ioctl or fcntl.
const IMAGE_GLUE: &[&str] = &["src/image/limits.rs", "src/image/lock/mod.rs"];

/// The module that replaces memory under a signal, with its tests.
const SIGNAL_GLUE: &[&str] = &[
    "src/sys/sigbus/mod.rs",
    "src/sys/sigbus/",
    "src/sandbox/sigsys.rs",
];

/// Most lines of a file before its tests. The aim is 400; a little more is not worth a bad cut.
const MOST_LINES: usize = 420;

/// What `mq` does not touch: anything that makes it depend on the machine it runs on.
const NOT_IN_MQ: &[&str] = &[
    "std::fs",
    "std::os",
    "std::net",
    "std::thread",
    "std::io",
    "std::env",
    "std::process",
    "Instant::now",
    "SystemTime",
    "log",
    "libc",
    "rustix",
    "io_uring",
    "vm_memory",
    "vhost",
    "vhost_user_backend",
    "virtio_queue",
    "vmm_sys_util",
];

/// Where `mq` may name what threads share: rate limits belong to a disk, whichever worker serves it.
/// Their buckets are atomics; the one lock is for whoever changes them.
const SHARED_IN_MQ: &[&str] = &[
    "src/mq/throttle",
    "src/mq/request_queue.rs",
    "src/mq/settings.rs",
];

type Rule = fn(&str, &str) -> Vec<String>;

// ---- the rules ----------------------------------------------------------------------------------

/// `mq` is pure, and forbids `unsafe` itself.
fn mq_is_pure(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("src/mq/") {
        return Vec::new();
    }
    let code = code_of(text);
    let std_members = members(&code, "std");
    let is_test = path.contains("/tests");
    let mut complaints: Vec<String> = NOT_IN_MQ
        .iter()
        // Tests of what threads share have threads.
        .filter(|&&name| name != "std::thread" || !is_test)
        .filter(|&&name| match name.strip_prefix("std::") {
            Some(member) => std_members.contains(member),
            // A crate's name is harmless as the name of something else (`stats.log`, `fn log`).
            None if name.contains("::") || name == "SystemTime" => {
                !mentions(&code, name).is_empty()
            }
            None => {
                !members(&code, name).is_empty()
                    || !mentions(&code, &format!("use {name}")).is_empty()
            }
        })
        .map(|name| format!("{path}: mq is pure and does not use {name}"))
        .collect();
    let shares = is_test || SHARED_IN_MQ.iter().any(|place| path.starts_with(place));
    if std_members.contains("sync") && !shares {
        complaints.push(format!(
            "{path}: mq shares nothing but limits, see SHARED_IN_MQ"
        ));
    }
    if !mentions(&code, "Mutex").is_empty() && path != "src/mq/throttle/mod.rs" && !is_test {
        complaints.push(format!(
            "{path}: nothing in mq locks but who changes limits"
        ));
    }
    if path == "src/mq/mod.rs" && !code.contains("#![forbid(unsafe_code)]") {
        complaints.push(format!("{path}: #![forbid(unsafe_code)] is missing"));
    }
    complaints
}

/// `unsafe` stands where guest memory, the disk, descriptors and signals are handled, and nowhere else.
fn unsafe_is_confined(path: &str, text: &str) -> Vec<String> {
    let may = ["src/virtio/", "src/engine/"]
        .iter()
        .any(|dir| path.starts_with(dir))
        || [FD_GLUE, IMAGE_GLUE, SIGNAL_GLUE]
            .concat()
            .iter()
            .any(|glue| path == *glue || glue.ends_with('/') && path.starts_with(glue));
    if may || !path.starts_with("src/") {
        return Vec::new();
    }
    let code = code_of(text);
    mentions(&code, "unsafe")
        .into_iter()
        .map(|at| {
            format!(
                "{path}:{}: unsafe has no place in this file",
                line_of(&code, at)
            )
        })
        .collect()
}

/// Each unsafe block and impl has its argument above it, each unsafe function its contract.
fn unsafe_is_argued(path: &str, text: &str) -> Vec<String> {
    if !path.ends_with(".rs") {
        return Vec::new();
    }
    let code = code_of(text);
    let (lines, code_lines): (Vec<&str>, Vec<&str>) =
        (text.lines().collect(), code.lines().collect());
    let mut complaints = Vec::new();
    for at in mentions(&code, "unsafe") {
        let what = code[at + "unsafe".len()..].trim_start();
        let (wanted, comment) = if what.starts_with('{') || what.starts_with("impl") {
            (
                "SAFETY:",
                comment_above(&lines, &code_lines, line_of(&code, at) - 1),
            )
        } else if what.starts_with("fn") && !first_word(what[2..].trim_start()).is_empty() {
            (
                "# Safety",
                comment_above(&lines, &code_lines, line_of(&code, at) - 1),
            )
        } else {
            continue;
        };
        if !comment.contains(wanted) {
            complaints.push(format!(
                "{path}:{}: no {wanted:?} above this unsafe",
                line_of(&code, at)
            ));
        }
    }
    complaints
}

/// The comment right above the statement or item that begins on or before line `line` (from 0).
fn comment_above(lines: &[&str], code_lines: &[&str], mut line: usize) -> String {
    // Up to the line where the statement begins: the one after a line that ends another.
    while line > 0 {
        let above = code_lines[line - 1].trim();
        let is_comment = above.is_empty() && !lines[line - 1].trim().is_empty();
        if is_comment || above.is_empty() || above.ends_with([';', '{', '}']) {
            break;
        }
        line -= 1;
    }
    let is_comment = |line: &usize| lines[*line].trim_start().starts_with("//");
    let first = (0..line)
        .rev()
        .take_while(is_comment)
        .last()
        .unwrap_or(line);
    lines[first..line].join("\n")
}

/// A file can be read in one go.
fn files_are_short(path: &str, text: &str) -> Vec<String> {
    let tests = path.ends_with("/tests.rs") || path.contains("/tests/");
    if !path.starts_with("src/") || tests {
        return Vec::new();
    }
    let lines = match text.find("\n#[cfg(test)]\nmod ") {
        Some(end) => text[..end].lines().count(),
        None => text.lines().count(),
    };
    let complaint = format!("{path}: {lines} lines of production code; {MOST_LINES} are the most");
    if lines > MOST_LINES {
        vec![complaint]
    } else {
        Vec::new()
    }
}

/// What is there is finished.
fn nothing_is_left_to_do(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("src/") {
        return Vec::new();
    }
    let marks = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!"];
    marks
        .iter()
        .flat_map(|mark| text.match_indices(mark).map(move |(at, _)| (mark, at)))
        .map(|(mark, at)| format!("{path}:{}: {mark}", line_of(text, at)))
        .collect()
}

/// A log line about a disk names it as a key-value, by which the lines of each disk are limited (src/logging/mod.rs).
fn log_lines_name_their_disk(path: &str, text: &str) -> Vec<String> {
    if !path.starts_with("src/") {
        return Vec::new();
    }
    ["error!(", "warn!(", "info!("]
        .iter()
        .flat_map(|level| text.match_indices(level))
        .filter(|(at, level)| {
            let said = text[at + level.len()..].trim_start();
            said.starts_with("\"disk {")
        })
        .map(|(at, _)| {
            let line = line_of(text, at);
            format!("{path}:{line}: a line about a disk without `disk = its number;`")
        })
        .collect()
}

/// No file knows the machine it was written on.
fn no_machine_is_named(path: &str, text: &str) -> Vec<String> {
    // In parts, so that this file does not name what it looks for.
    let homes = [
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/wo", "rk/"),
        concat!("/Us", "ers/"),
    ];
    homes
        .iter()
        .flat_map(|home| text.match_indices(home))
        .filter(|&(at, _)| {
            // An absolute path, not the middle of a longer one or of a web address.
            let before = text[..at].chars().next_back();
            !before.is_some_and(|c| is_word(c) || ['.', '/', '-', '}', ')'].contains(&c))
        })
        .map(|(at, home)| {
            format!(
                "{path}:{}: a path of some machine: {home}",
                line_of(text, at)
            )
        })
        .collect()
}

/// The targets of the links in a Markdown text that name files, relative to the text's own file.
fn linked_files(text: &str) -> Vec<&str> {
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split([')', ' ', '\n']).next())
        .filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
        .filter_map(|target| target.split('#').next())
        .filter(|target| !target.is_empty())
        .collect()
}

/// `target` as seen from the file `from`, without `..` in it; `None` if it leaves the repository.
fn resolved(from: &str, target: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for part in Path::new(from).parent()?.join(target).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// Links between documents lead somewhere.
fn links_lead_somewhere(path: &str, text: &str) -> Vec<String> {
    if !path.ends_with(".md") {
        return Vec::new();
    }
    linked_files(text)
        .into_iter()
        .filter(|target| !resolved(path, target).is_some_and(|file| root().join(file).exists()))
        .map(|target| format!("{path}: the link to {target} leads nowhere"))
        .collect()
}

/// Paths of the tree that a document names in backticks exist.
fn named_paths_exist(path: &str, text: &str) -> Vec<String> {
    if !path.ends_with(".md") {
        return Vec::new();
    }
    let begins = |named: &&str| {
        let roots = ["src/", "tests/", "benches/", "fuzz/", "qemu/", "docs/"];
        roots.iter().any(|root| named.starts_with(root))
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || ['/', '_', '-', '.'].contains(&c);
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(begins)
        .filter(|named| named.chars().all(plain) && !root().join(named).exists())
        .map(|named| format!("{path}: there is no {named}"))
        .collect()
}

/// Options of the program that `text` has no section for, and sections for options it does not have.
fn options_and_text_agree(options: &BTreeSet<String>, text: &str) -> Vec<String> {
    let sections: BTreeSet<String> = text
        .lines()
        .filter(|line| line.starts_with('#'))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter_map(|heading| heading.strip_prefix("--"))
        .map(|option| {
            option
                .split([' ', '[', '='])
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    let missing = options
        .difference(&sections)
        .map(|option| format!("--{option} is not described"));
    let unknown = sections
        .difference(options)
        .map(|option| format!("--{option} is no option"));
    missing.chain(unknown).collect()
}

// ---- holding them -------------------------------------------------------------------------------

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All text files of the repository that people write, by their path in it.
fn files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for name in [
        "src", "tests", "docs", "qemu", "benches", "fuzz", "examples", ".ci",
    ] {
        collect(&root().join(name), &mut files);
    }
    for name in ["Cargo.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"] {
        add(&root().join(name), &mut files);
    }
    assert!(
        files.iter().any(|(path, _)| path == "src/lib.rs"),
        "the sources were not found"
    );
    files
}

fn collect(dir: &Path, files: &mut Vec<(String, String)>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.expect("an entry").path();
        if path.ends_with("fuzz/target") {
            // What Cargo makes is not ours.
        } else if path.is_dir() {
            collect(&path, files);
        } else {
            add(&path, files);
        }
    }
}

fn add(path: &Path, files: &mut Vec<(String, String)>) {
    // A missing file has nothing to say, and neither has one that is no text.
    if let Ok(text) = fs::read_to_string(path) {
        let relative = path.strip_prefix(root()).expect("it is in the repository");
        files.push((
            relative
                .to_str()
                .expect("a name of this repository")
                .to_owned(),
            text,
        ));
    }
}

fn hold(rule: Rule) {
    let complaints: Vec<String> = files()
        .iter()
        .flat_map(|(path, text)| rule(path, text))
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn held_mq_is_pure() {
    hold(mq_is_pure);
}

#[test]
fn held_unsafe_is_confined() {
    hold(unsafe_is_confined);
}

#[test]
fn held_unsafe_is_argued() {
    hold(unsafe_is_argued);
}

#[test]
fn held_files_are_short() {
    hold(files_are_short);
}

#[test]
fn held_log_lines_name_their_disk() {
    hold(log_lines_name_their_disk);
}

#[test]
fn held_nothing_is_left_to_do() {
    hold(nothing_is_left_to_do);
}

#[test]
fn held_no_machine_is_named() {
    hold(no_machine_is_named);
}

#[test]
fn held_links_lead_somewhere() {
    hold(links_lead_somewhere);
}

#[test]
fn held_named_paths_exist() {
    hold(named_paths_exist);
}

#[test]
fn held_options_are_described() {
    let mut command = vhost_user_blkmq::cli::Arguments::command();
    // Adds --help and --version.
    command.build();
    let options: BTreeSet<String> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long())
        .map(str::to_owned)
        .collect();
    assert!(
        options.len() > 15,
        "the options were not found: {options:?}"
    );
    let text = fs::read_to_string(root().join("docs/OPTIONS.md")).expect("docs/OPTIONS.md");
    let complaints = options_and_text_agree(&options, &text);
    assert!(
        complaints.is_empty(),
        "docs/OPTIONS.md: {}",
        complaints.join(", ")
    );
}

// ---- showing that they can fail -----------------------------------------------------------------

/// Whether the rule complains about this text in this file.
#[track_caller]
fn fails(rule: Rule, path: &str, text: &str) {
    assert_ne!(
        rule(path, text),
        Vec::<String>::new(),
        "{path} passes with:\n{text}"
    );
}

#[track_caller]
fn passes(rule: Rule, path: &str, text: &str) {
    assert_eq!(
        rule(path, text),
        Vec::<String>::new(),
        "{path} fails with:\n{text}"
    );
}

#[test]
fn mq_is_pure_can_fail() {
    for line in [
        "use std::fs;",
        "use std::{fmt, thread};",
        "use std::os::fd::RawFd;",
        "let now = Instant::now();",
        "log::warn!(\"no\");",
        "use log::warn;",
        "use libc::c_int;",
        "fn f(e: rustix::io::Errno) {}",
        "use io_uring::{opcode, types};",
        "use vm_memory::GuestAddress;",
    ] {
        fails(mq_is_pure, "src/mq/hctx/ctx.rs", line);
        passes(mq_is_pure, "src/engine/uring/mod.rs", line);
        passes(mq_is_pure, "src/mq/hctx/ctx.rs", &format!("// {line}"));
    }
    passes(
        mq_is_pure,
        "src/mq/trace/mod.rs",
        "use std::collections::VecDeque; self.log.push(catalog::item());",
    );
    fails(mq_is_pure, "src/mq/mod.rs", "pub mod map;");
    passes(
        mq_is_pure,
        "src/mq/mod.rs",
        "#![forbid(unsafe_code)]\npub mod map;",
    );
}

#[test]
fn unsafe_is_confined_can_fail() {
    let block = "fn f() {\n    unsafe { g() }\n}";
    fails(unsafe_is_confined, "src/worker/mod.rs", block);
    fails(
        unsafe_is_confined,
        "src/config/mod.rs",
        "unsafe impl Send for Config {}",
    );
    for path in [
        "src/virtio/ring/mod.rs",
        "src/engine/uring/mod.rs",
        FD_GLUE[0],
        SIGNAL_GLUE[0],
        "tests/front_end.rs",
    ] {
        passes(unsafe_is_confined, path, block);
    }
    passes(
        unsafe_is_confined,
        "src/mq/mod.rs",
        "#![forbid(unsafe_code)] // unsafe\nlet s = \"unsafe\";",
    );
}

#[test]
fn unsafe_is_argued_can_fail() {
    fails(
        unsafe_is_argued,
        "src/a.rs",
        "fn f() {\n    unsafe { g() }\n}",
    );
    fails(
        unsafe_is_argued,
        "src/a.rs",
        "// SAFETY: h is fine.\nh();\nunsafe { g() }",
    );
    fails(
        unsafe_is_argued,
        "src/a.rs",
        "// It is fine.\nlet x = unsafe { g() };",
    );
    fails(unsafe_is_argued, "src/a.rs", "unsafe impl Send for X {}");
    fails(
        unsafe_is_argued,
        "src/a.rs",
        "/// Does it.\npub unsafe fn f() {}",
    );
    passes(
        unsafe_is_argued,
        "src/a.rs",
        "// SAFETY: it is fine,\n// because we said so.\nlet x = unsafe { g() };",
    );
    passes(
        unsafe_is_argued,
        "src/a.rs",
        "// SAFETY: fine.\nlet x = h(\n    1,\n    unsafe { g() },\n);",
    );
    passes(
        unsafe_is_argued,
        "src/a.rs",
        "// SAFETY: fine.\n#[allow(x)]\nunsafe impl Send for X {}",
    );
    passes(
        unsafe_is_argued,
        "src/a.rs",
        "/// Does it.\n///\n/// # Safety\n///\n/// None.\npub unsafe fn f() {}",
    );
    passes(unsafe_is_argued, "src/a.rs", "type F = unsafe fn(u32);");
}

#[test]
fn files_are_short_can_fail() {
    let long = "let x = 1;\n".repeat(MOST_LINES);
    passes(files_are_short, "src/a.rs", &long);
    fails(files_are_short, "src/a.rs", &format!("{long}let y = 2;\n"));
    passes(
        files_are_short,
        "src/a.rs",
        &format!("{long}\n#[cfg(test)]\nmod tests {{\n{long}}}\n"),
    );
    passes(files_are_short, "src/a/tests.rs", &format!("{long}{long}"));
}

#[test]
fn log_lines_name_their_disk_can_fail() {
    let line = "log::warn!(\n    \"disk {}: gone\", serial);";
    fails(log_lines_name_their_disk, "src/a.rs", line);
    let named = "log::warn!(disk = id.0; \"disk {}: gone\", serial);";
    passes(log_lines_name_their_disk, "src/a.rs", named);
    passes(log_lines_name_their_disk, "tests/a.rs", line);
}

#[test]
fn nothing_is_left_to_do_can_fail() {
    for mark in [
        "// TODO: more",
        "// FIXME",
        "/* XXX */",
        "todo!()",
        "unimplemented!(\"later\")",
    ] {
        fails(nothing_is_left_to_do, "src/a.rs", mark);
    }
    passes(
        nothing_is_left_to_do,
        "src/a.rs",
        "// what is to do is done",
    );
}

#[test]
fn no_machine_is_named_can_fail() {
    fails(
        no_machine_is_named,
        "docs/A.md",
        concat!("see `/ro", "ot/notes`"),
    );
    fails(
        no_machine_is_named,
        "qemu/run",
        concat!("cd /ho", "me/somebody/src"),
    );
    fails(
        no_machine_is_named,
        "src/a.rs",
        concat!("\"/wo", "rk/main\""),
    );
    passes(
        no_machine_is_named,
        "docs/A.md",
        concat!("https://example.org/wo", "rk/a, \"$dir/ro", "ot/x\""),
    );
}

#[test]
fn links_lead_somewhere_can_fail() {
    fails(links_lead_somewhere, "docs/A.md", "[there](MISSING.md)");
    fails(links_lead_somewhere, "docs/A.md", "[out](../../outside.md)");
    fails(
        links_lead_somewhere,
        "README.md",
        "[there](docs/MISSING.md#part)",
    );
    passes(
        links_lead_somewhere,
        "docs/A.md",
        "[a](../Cargo.toml) [b](#part) [c](https://example.org/x)",
    );
    passes(links_lead_somewhere, "src/a.rs", "[no](MISSING.md)");
}

#[test]
fn named_paths_exist_can_fail() {
    fails(named_paths_exist, "docs/A.md", "see `src/cellar.rs`");
    fails(
        named_paths_exist,
        "docs/A.md",
        "| `src/lib.rs`, `tests/cellar` |",
    );
    passes(
        named_paths_exist,
        "docs/A.md",
        "`src/lib.rs` src/cellar.rs `src/*.rs`",
    );
    passes(named_paths_exist, "src/a.rs", "`src/cellar.rs`");
}

#[test]
fn options_and_text_agree_can_fail() {
    let options = BTreeSet::from(["size".to_owned(), "read-only".to_owned()]);
    let good = "### `--size SIZE`\ntext\n### `--read-only[=on|off]`\n";
    assert_eq!(options_and_text_agree(&options, good), Vec::<String>::new());
    assert_eq!(
        options_and_text_agree(&options, "### `--size`\n--read-only"),
        ["--read-only is not described"]
    );
    assert_eq!(
        options_and_text_agree(&options, &format!("{good}# `--old`")),
        ["--old is no option"]
    );
}
