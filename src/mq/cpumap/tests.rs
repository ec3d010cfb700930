use proptest::prelude::*;

use super::*;

/// The map as one queue for each CPU.
fn queues_of(kind: MapKind, topology: &Topology, queues: u16) -> Vec<u16> {
    let map = QueueMap::build(&kind, topology, queues).expect("a map");
    (0..map.cpus())
        .map(|cpu| map.queue_of(u16::try_from(cpu).unwrap()))
        .collect()
}

/// The map as the CPUs of each queue.
fn groups(topology: &Topology, queues: u16) -> Vec<Vec<u16>> {
    let map = QueueMap::build(&MapKind::Grouping, topology, queues).expect("a map");
    (0..queues)
        .map(|queue| map.cpus_of(queue).to_vec())
        .collect()
}

/// Eight CPUs, two on each core, numbered next to each other.
fn adjacent_siblings() -> Topology {
    let mut topology = Topology::flat(8);
    for (number, cpu) in (0..8).zip(&mut topology.cpus) {
        cpu.siblings = vec![number & !1, number | 1];
    }
    topology
}

#[test]
fn eight_cpus_on_three_queues() {
    let flat = Topology::flat(8);
    assert_eq!(
        queues_of(MapKind::Modulo, &flat, 3),
        [0, 1, 2, 0, 1, 2, 0, 1]
    );
    assert_eq!(groups(&flat, 3), [&[0, 1, 2][..], &[3, 4, 5], &[6, 7]]);
}

#[test]
fn siblings_far_apart_stay_together() {
    let mut topology = Topology::flat(8);
    for (number, cpu) in (0..8).zip(&mut topology.cpus) {
        cpu.siblings = vec![number % 4, number % 4 + 4];
    }
    assert_eq!(groups(&topology, 3), [&[0, 1, 4][..], &[2, 3, 6], &[5, 7]]);
}

#[test]
fn adjacent_siblings_on_four_queues() {
    let topology = adjacent_siblings();
    assert_eq!(
        queues_of(MapKind::Modulo, &topology, 4),
        [0, 1, 2, 3, 0, 0, 1, 1]
    );
    assert_eq!(groups(&topology, 4), [[0, 1], [2, 3], [4, 5], [6, 7]]);
}

#[test]
fn two_nodes_on_three_queues() {
    let mut topology = Topology::flat(8);
    topology.cpus[4..].iter_mut().for_each(|cpu| cpu.node = 1);
    assert_eq!(groups(&topology, 3), [&[0, 1, 2, 3][..], &[4, 5], &[6, 7]]);
}

#[test]
fn absent_cpus_begin_again_when_all_groups_are_used() {
    let mut topology = Topology::flat(8);
    topology.cpus[4..]
        .iter_mut()
        .for_each(|cpu| cpu.present = false);
    assert_eq!(groups(&topology, 4), [[0, 4], [1, 5], [2, 6], [3, 7]]);
}

#[test]
fn absent_cpus_go_on_where_the_present_ones_ended() {
    let mut topology = Topology::flat(8);
    topology.cpus[2..]
        .iter_mut()
        .for_each(|cpu| cpu.present = false);
    assert_eq!(
        groups(&topology, 4),
        [&[0, 6][..], &[1, 7], &[2, 3], &[4, 5]]
    );
}

#[test]
fn more_nodes_than_queues_are_dealt_whole() {
    let mut topology = Topology::flat(8);
    for (number, cpu) in (0..8).zip(&mut topology.cpus) {
        cpu.node = number / 2;
    }
    assert_eq!(groups(&topology, 3), [&[0, 1, 6, 7][..], &[2, 3], &[4, 5]]);
}

#[test]
fn a_small_node_gets_its_group_first() {
    let mut topology = Topology::flat(8);
    topology.cpus[7].node = 1;
    assert_eq!(groups(&topology, 3), [&[7][..], &[0, 1, 2, 3], &[4, 5, 6]]);
}

#[test]
fn modulo_gives_absent_cpus_the_queues_that_are_left() {
    let mut topology = adjacent_siblings();
    topology.cpus[4..]
        .iter_mut()
        .for_each(|cpu| cpu.present = false);
    assert_eq!(
        queues_of(MapKind::Modulo, &topology, 6),
        [0, 1, 2, 3, 4, 5, 0, 0]
    );
}

#[test]
fn an_explicit_map_is_taken_as_it_is() {
    let flat = Topology::flat(4);
    assert_eq!(
        queues_of(MapKind::Explicit(vec![2, 0, 2, 0]), &flat, 3),
        [2, 0, 2, 0]
    );
    let map = QueueMap::build(&MapKind::Explicit(vec![2, 0, 2, 0]), &flat, 3).expect("a map");
    assert_eq!(
        (map.cpus_of(0), map.cpus_of(1), map.cpus_of(2)),
        (&[1, 3][..], &[][..], &[0, 2][..])
    );
    assert_eq!((map.cpus(), map.queues()), (4, 3));
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let build = |kind: MapKind, cpus, queues| QueueMap::build(&kind, &Topology::flat(cpus), queues);
    assert_eq!(build(MapKind::Grouping, 4, 0), Err(MapError::NoQueues));
    assert_eq!(
        build(MapKind::Modulo, 0, 1),
        Err(MapError::CpuCount { cpus: 0 })
    );
    assert_eq!(
        build(MapKind::Explicit(vec![0; 3]), 4, 1),
        Err(MapError::Length { listed: 3, cpus: 4 })
    );
    assert_eq!(
        build(MapKind::Explicit(vec![0, 1, 2]), 3, 2),
        Err(MapError::Queue {
            cpu: 2,
            queue: 2,
            queues: 2
        })
    );
}

#[test]
fn as_many_queues_as_cpus_is_one_to_one() {
    for cpus in [1, 2, 3, 64, 256] {
        let one_to_one: Vec<u16> = (0..cpus).collect();
        for kind in [MapKind::Grouping, MapKind::Modulo] {
            assert_eq!(queues_of(kind, &Topology::flat(cpus), cpus), one_to_one);
        }
    }
}

/// Cores of `threads` CPUs each, numbered next to each other, on nodes of any kind.
fn topologies() -> impl Strategy<Value = Topology> {
    let cores = prop::collection::vec((0u16..4, prop::bool::weighted(0.8)), 1..24);
    (cores, 1u16..=4).prop_map(|(cores, threads)| {
        let mut topology = Topology { cpus: Vec::new() };
        for (core, (node, present)) in (0u16..).zip(cores) {
            for _ in 0..threads {
                let siblings = (core * threads..(core + 1) * threads).collect();
                topology.cpus.push(Cpu {
                    present,
                    node,
                    siblings,
                });
            }
        }
        topology
    })
}

proptest! {
    #[test]
    fn both_directions_of_a_map_agree(topology in topologies(), queues in 1u16..40, modulo: bool) {
        let kind = if modulo { MapKind::Modulo } else { MapKind::Grouping };
        let map = QueueMap::build(&kind, &topology, queues).expect("a map");
        prop_assert_eq!(map.cpus(), topology.cpus.len());
        let mut seen = 0;
        for queue in 0..queues {
            prop_assert!(map.cpus_of(queue).is_sorted());
            for &cpu in map.cpus_of(queue) {
                prop_assert_eq!(map.queue_of(cpu), queue);
                seen += 1;
            }
        }
        prop_assert_eq!(seen, topology.cpus.len());
    }

    #[test]
    fn no_queue_is_idle_while_there_are_cpus_for_it(cpus in 1u16..100, queues in 1u16..100) {
        for kind in [MapKind::Modulo, MapKind::Grouping] {
            let map = QueueMap::build(&kind, &Topology::flat(cpus), queues).expect("a map");
            let used = (0..queues).filter(|&queue| !map.cpus_of(queue).is_empty()).count();
            prop_assert_eq!(used, usize::from(cpus.min(queues)), "{:?}", kind);
        }
    }

    #[test]
    fn groups_within_a_node_differ_by_one_at_most(mut topology in topologies(), queues in 1u16..40) {
        topology.cpus.iter_mut().for_each(|cpu| cpu.present = true);
        let nodes: std::collections::BTreeSet<u16> = topology.cpus.iter().map(|cpu| cpu.node).collect();
        prop_assume!(usize::from(queues) > nodes.len());
        let map = QueueMap::build(&MapKind::Grouping, &topology, queues).expect("a map");
        for node in nodes {
            let on_node = |&&cpu: &&u16| topology.cpus[usize::from(cpu)].node == node;
            let sizes: Vec<usize> = (0..queues)
                .map(|queue| map.cpus_of(queue))
                .filter(|cpus| cpus.iter().any(|cpu| on_node(&cpu)))
                .inspect(|cpus| assert!(cpus.iter().all(|cpu| on_node(&cpu)), "a group spans nodes"))
                .map(<[u16]>::len)
                .collect();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            prop_assert!(most - least <= 1, "node {}: {:?}", node, sizes);
        }
    }
}
