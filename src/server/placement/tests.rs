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
    let free = seats(3, None, &[0, 1, 2, 3], &one);
    assert_eq!(free, vec![Seat::default(); 3]);
}

#[test]
fn pinned_workers_get_one_cpu_each_in_turn() {
    let two = nodes(&[(0, "0-3"), (1, "4-7")]);
    let pinned = seats(3, Some(&list("6,1")), &[0, 1, 6], &two);
    let seat = |cpu, node| Seat {
        cpus: Some(list(cpu)),
        node: Some(node),
    };
    assert_eq!(pinned, [seat("6", 1), seat("1", 0), seat("6", 1)]);
    let one = nodes(&[(0, "0-7")]);
    assert_eq!(seats(1, Some(&list("6")), &[6], &one)[0].node, None);
}

#[test]
fn workers_are_spread_over_nodes_as_the_cpus_are() {
    let two = nodes(&[(0, "0-3"), (1, "4-7")]);
    let all: Vec<u16> = (0..8).collect();
    let of = |workers, allowed: &[u16]| -> Vec<Option<u16>> {
        let seats = seats(workers, None, allowed, &two);
        seats.iter().map(|seat| seat.node).collect()
    };
    assert_eq!(of(4, &all), [Some(0), Some(0), Some(1), Some(1)]);
    assert_eq!(of(2, &all), [Some(0), Some(1)]);
    assert_eq!(of(1, &all), [Some(0)]);
    // taskset has left six CPUs of one node and two of the other.
    assert_eq!(of(4, &[0, 1, 2, 4]), [Some(0), Some(0), Some(0), Some(1)]);
    let seats = seats(4, None, &[0, 2, 3, 4], &two);
    assert_eq!(seats[0].cpus, Some(list("0,2-3")));
}

const WORKERS: [Option<u16>; 4] = [Some(0), Some(0), Some(1), Some(1)];

#[test]
fn without_nodes_queues_are_dealt_to_all_in_turn() {
    assert_eq!(deal(5, 0, &[None; 3], &[]), [0, 1, 2, 0, 1]);
    assert_eq!(deal(5, 2, &[None; 3], &[]), [2, 0, 1, 2, 0]);
    assert_eq!(deal(3, 7, &[None; 2], &[(0, 4096)]), [1, 0, 1]);
}

#[test]
fn queues_go_where_the_memory_is() {
    assert_eq!(deal(4, 0, &WORKERS, &[(1, 1 << 30)]), [2, 3, 2, 3]);
    assert_eq!(deal(4, 1, &WORKERS, &[(0, 1 << 30)]), [1, 0, 1, 0]);
}

#[test]
fn memory_on_two_nodes_shares_the_queues_out_from_the_first_on() {
    let even = deal(64, 0, &WORKERS, &[(0, 1 << 30), (1, 1 << 30)]);
    let mut counts = [0; 4];
    for (queues, worker) in even.iter().enumerate() {
        counts[*worker] += 1;
        let on_first: usize = counts[0] + counts[1];
        assert!(on_first.abs_diff(queues.div_ceil(2)) <= 1, "{even:?}");
    }
    assert_eq!(counts, [16; 4]);
    let uneven = deal(8, 0, &WORKERS, &[(0, 1 << 30), (1, 3 << 30)]);
    let on_second = uneven.iter().filter(|worker| **worker >= 2).count();
    assert_eq!(on_second, 6, "{uneven:?}");
}

#[test]
fn memory_where_no_worker_is_counts_for_nothing() {
    let shares = [(5, 8 << 30), (1, 1 << 30)];
    assert_eq!(deal(3, 0, &WORKERS, &shares), [2, 3, 2]);
    assert_eq!(deal(5, 0, &WORKERS, &[(5, 1)]), [0, 1, 2, 3, 0]);
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
        let seat = Seat {
            cpus: Some(CpuList::from(vec![last])),
            node: None,
        };
        seat.take().unwrap();
        allowed_cpus().unwrap()
    });
    assert_eq!(there.join().unwrap(), [last]);
    assert_eq!(allowed_cpus().unwrap(), before);
}
