use super::*;

/// A made-up machine: a folder as the kernel makes it, with a CPU list for each node.
fn nodes(lists: &[(u16, &str)]) -> Nodes {
    let root = tempfile::tempdir().unwrap();
    for (node, list) in lists {
        let node = root.path().join(format!("node{node}"));
        fs::create_dir(&node).unwrap();
        fs::write(node.join("cpulist"), format!("{list}\n")).unwrap();
    }
    // What else is there.
    fs::write(root.path().join("online"), "0-7\n").unwrap();
    fs::create_dir(root.path().join("power")).unwrap();
    Nodes::discover(root.path())
}

fn list(text: &str) -> CpuList {
    CpuList::parse(text).unwrap()
}

#[test]
fn nodes_are_what_sysfs_says() {
    let nodes = nodes(&[(0, "0-1,4-5"), (1, "2-3,6-7"), (3, "")]);
    assert!(nodes.are_several());
    assert_eq!(nodes.of(5), Some(0));
    assert_eq!(nodes.of(6), Some(1));
    assert_eq!(nodes.of(8), None);
    let nowhere = Nodes::discover(Path::new("/nowhere"));
    assert!(!nowhere.are_several());
}

#[test]
fn on_one_node_workers_are_left_alone() {
    let one = nodes(&[(0, "0-7")]);
    let free = affinities(3, None, &[0, 1, 2, 3], &one);
    assert_eq!(free, vec![Affinity::default(); 3]);
}

#[test]
fn pinned_workers_get_one_cpu_each_in_turn() {
    let two = nodes(&[(0, "0-3"), (1, "4-7")]);
    let pinned = affinities(3, Some(&list("6,1")), &[0, 1, 6], &two);
    let affinity = |cpu, node| Affinity {
        cpus: Some(list(cpu)),
        node: Some(node),
    };
    assert_eq!(
        pinned,
        [affinity("6", 1), affinity("1", 0), affinity("6", 1)]
    );
    let one = nodes(&[(0, "0-7")]);
    assert_eq!(affinities(1, Some(&list("6")), &[6], &one)[0].node, None);
}

#[test]
fn workers_are_spread_over_nodes_as_the_cpus_are() {
    let two = nodes(&[(0, "0-3"), (1, "4-7")]);
    let all: Vec<u16> = (0..8).collect();
    let of = |workers, allowed: &[u16]| -> Vec<Option<u16>> {
        let affinities = affinities(workers, None, allowed, &two);
        affinities.iter().map(|affinity| affinity.node).collect()
    };
    assert_eq!(of(4, &all), [Some(0), Some(0), Some(1), Some(1)]);
    assert_eq!(of(2, &all), [Some(0), Some(1)]);
    assert_eq!(of(1, &all), [Some(0)]);
    // taskset has left six CPUs of one node and two of the other.
    assert_eq!(of(4, &[0, 1, 2, 4]), [Some(0), Some(0), Some(0), Some(1)]);
    let affinities = affinities(4, None, &[0, 2, 3, 4], &two);
    assert_eq!(affinities[0].cpus, Some(list("0,2-3")));
}

#[test]
fn cpus_that_are_not_there_or_not_allowed_are_named() {
    let (online, allowed) = ([0, 1, 2, 3], [0, 2]);
    assert_eq!(check(&list("2,0"), &online, &allowed), Ok(()));
    let absent = check(&list("0,9"), &online, &allowed).unwrap_err();
    assert!(
        absent.contains("CPU 9") && absent.contains("0-3"),
        "{absent}"
    );
    let forbidden = check(&list("0-1"), &online, &allowed).unwrap_err();
    assert!(
        forbidden.contains("CPU 1") && forbidden.contains("0,2"),
        "{forbidden}"
    );
}

#[test]
fn a_seat_is_taken_by_the_thread_that_takes_it() {
    let before = allowed_cpus().unwrap();
    let last = *before.last().unwrap();
    let there = std::thread::spawn(move || {
        let affinity = Affinity {
            cpus: Some(CpuList::from(vec![last])),
            node: None,
        };
        affinity.apply().unwrap();
        allowed_cpus().unwrap()
    });
    assert_eq!(there.join().unwrap(), [last]);
    assert_eq!(allowed_cpus().unwrap(), before);
}
