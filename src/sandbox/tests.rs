//! Each forbidden thing is tried in a process of its own, which is this test program once more.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Output};

use super::*;
use crate::sys::child;

const TRY: &str = "BLKMQ_SANDBOX_TRY";
const DIR: &str = "BLKMQ_SANDBOX_DIR";

/// Runs one attempt, with these layers on. What it leaves is removed here: it may not be able to, or may not live to.
fn attempt(what: &str, layers: &str) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    child::of(module_path!(), "child")
        .env(TRY, format!("{what},{layers}"))
        .env(DIR, dir.path())
        .output()
        .expect("it starts")
}

/// The child's part; as a test of its own it does nothing.
#[test]
fn child() {
    let Ok(wanted) = std::env::var(TRY) else {
        return;
    };
    let (what, layers) = wanted.split_once(',').expect("what and layers");
    let has = |layer| layers.split('+').any(|given| given == layer);
    let layers = SandboxLayers {
        seccomp: has("seccomp"),
        landlock: has("landlock"),
        privileges: has("privileges"),
        dumps: has("dumps"),
        io_uring: false,
    };
    let dir = PathBuf::from(std::env::var_os(DIR).expect("where files may be made"));
    let ours = dir.join("ours");
    File::create(&ours).expect("a file of ours");
    let parent = rustix::process::getppid().expect("we have one");
    enter(layers, None, &[&ours]).expect("put on");
    seal(layers).expect("put on");
    let told = |outcome: io::Result<()>| match outcome {
        Ok(()) => println!("outcome: allowed"),
        Err(error) => println!("outcome: {:?}", error.kind()),
    };
    match what {
        "open" => told(File::open("/etc/passwd").map(drop)),
        "create" => told(File::create(dir.join("new")).map(drop)),
        "remove ours" => told(std::fs::remove_file(&ours)),
        "remove others" => told(std::fs::remove_file("/etc/blkmq-there-is-no-such-file")),
        "become" => told(Err(Command::new("/bin/true").exec())),
        "spawn" => told(Command::new("/bin/true").status().map(drop)),
        "network" => told(TcpStream::connect("127.0.0.1:1").map(drop)),
        "execute" => told(sigsys::map_executable()),
        "signal" => told(rustix::process::test_kill_process(parent).map_err(io::Error::from)),
        "thread" => {
            std::thread::spawn(|| println!("outcome: allowed"))
                .join()
                .expect("it ran");
        }
        "ptrace" => told(
            rustix::process::set_ptracer(rustix::process::PTracer::Any).map_err(io::Error::from),
        ),
        "privileges" => {
            let sets = rustix::thread::capabilities(None).expect("asked");
            println!(
                "outcome: {} {}",
                sets.permitted.is_empty() && sets.effective.is_empty(),
                rustix::thread::no_new_privs().expect("asked")
            );
        }
        "dumps" => println!(
            "outcome: {:?}",
            rustix::process::dumpable_behavior().expect("asked")
        ),
        other => panic!("what is {other}?"),
    }
}

fn outcome(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout);
    let at = text.find("outcome: ");
    at.map_or("nothing".to_owned(), |at| {
        text[at + 9..].lines().next().unwrap_or_default().to_owned()
    })
}

/// Ended by the filter, with a line that names the call.
fn is_ended(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr).contains("does not allow system call ");
    is_killed(output) && said
}

fn is_killed(output: &Output) -> bool {
    output.status.signal() == Some(libc::SIGSYS) && outcome(output) == "nothing"
}

#[test]
fn seccomp_ends_what_nobody_foresaw() {
    assert!(
        attempt("become", "none").status.success(),
        "it is /bin/true"
    );
    assert_eq!(outcome(&attempt("spawn", "none")), "allowed");
    // The C library blocks all signals around it, so that there are no last words.
    assert!(is_killed(&attempt("spawn", "seccomp")));
    assert_eq!(outcome(&attempt("execute", "none")), "allowed");
    for (what, name) in [
        ("become", "execve ("),
        ("network", "socket ("),
        ("ptrace", "prctl ("),
        ("execute", "mmap ("),
        ("signal", "kill ("),
    ] {
        let output = attempt(what, "seccomp");
        assert!(is_ended(&output), "{what}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        let named = format!("does not allow system call {name}");
        assert!(said.contains(&named), "{what}: {said}");
    }
    assert_eq!(outcome(&attempt("open", "none")), "allowed");
    assert_eq!(outcome(&attempt("open", "seccomp")), "PermissionDenied");
    assert_eq!(outcome(&attempt("thread", "seccomp")), "allowed");
    assert_eq!(outcome(&attempt("remove ours", "seccomp")), "allowed");
}

#[test]
fn landlock_leaves_our_sockets_to_be_removed_and_nothing_else() {
    let layers = "privileges+landlock";
    if outcome(&attempt("open", layers)) == "allowed" {
        eprintln!("skipped: this kernel has no landlock");
        return;
    }
    assert_eq!(outcome(&attempt("open", layers)), "PermissionDenied");
    assert_eq!(outcome(&attempt("create", layers)), "PermissionDenied");
    assert_eq!(outcome(&attempt("remove ours", layers)), "allowed");
    // TCP since Linux 6.7, signals since 6.12.
    for (what, freely) in [("network", "ConnectionRefused"), ("signal", "allowed")] {
        assert_eq!(outcome(&attempt(what, "none")), freely);
        let shut_in = outcome(&attempt(what, layers));
        assert!(
            shut_in == "PermissionDenied" || shut_in == freely,
            "{what}: {shut_in}"
        );
    }
}

#[test]
fn privileges_and_dumps_are_given_up() {
    assert_eq!(outcome(&attempt("privileges", "privileges")), "true true");
    assert_eq!(outcome(&attempt("dumps", "dumps")), "NotDumpable");
    assert_eq!(outcome(&attempt("dumps", "none")), "Dumpable");
}

#[test]
fn all_layers_together_leave_what_a_session_needs() {
    let all = "seccomp+landlock+privileges+dumps";
    assert_eq!(outcome(&attempt("thread", all)), "allowed");
    assert_eq!(outcome(&attempt("remove ours", all)), "allowed");
    assert_eq!(outcome(&attempt("open", all)), "PermissionDenied");
    assert!(is_ended(&attempt("become", all)));
}

#[test]
fn a_user_is_looked_up_by_name_and_by_number() {
    let find = |user: &str, group: Option<&str>| {
        Identity::find(&UserName {
            user: user.to_owned(),
            group: group.map(str::to_owned),
        })
        .map(|identity| identity.ids())
        .map_err(|error| error.to_string())
    };
    assert_eq!(find("root", None), Ok((0, 0)));
    assert_eq!(find("0", Some("root")), Ok((0, 0)));
    let nobody = find("nobody", None).expect("every system has it");
    assert_eq!(find(&nobody.0.to_string(), None), Ok(nobody));
    for (user, group) in [("no-such-user", None), ("root", Some("no-such-group"))] {
        let error = find(user, group).expect_err("nobody of that name");
        assert!(
            error.contains("there is no") && error.contains("no-such"),
            "{error}"
        );
    }
}
