//! Queued requests by their first sector: trees whose nodes are the slots of the store.
//!
//! An AVL tree: of the two subtrees of any node one is deeper than the other by one level at most, so that
//! *n* requests are 1.44 log2(*n*) levels deep whatever the order in which a guest sends its sectors. (A
//! treap, whose bound rests on priorities that the guest does not know, was a list for one who knew them.)

use super::store::NONE;

/// More levels than a tree of all slots that have a number can have.
const LEVELS: usize = 48;

/// One tree of those that share a [`Sorted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Root(u32);

impl Default for Root {
    fn default() -> Self {
        Root(NONE)
    }
}

#[derive(Clone, Copy, Debug)]
struct Node {
    sector: u64,
    /// Requests with the same sector stay in the order in which they came.
    order: u64,
    /// Left and right.
    child: [u32; 2],
    /// By how many levels the right subtree is deeper than the left one: −1, 0 or 1.
    lean: i8,
}

impl Node {
    #[inline]
    fn key(&self) -> (u64, u64) {
        (self.sector, self.order)
    }
}

/// On which side each node of a way was left: a bit for each, set for the right.
#[derive(Clone, Copy, Debug)]
struct Sides(u64);

impl Sides {
    #[inline]
    fn set(&mut self, at: usize, right: bool) {
        self.0 = self.0 & !(1 << at) | u64::from(right) << at;
    }

    #[inline]
    fn at(self, at: usize) -> bool {
        self.0 >> at & 1 != 0
    }
}

/// What a side counts for in [`Node::lean`].
#[inline]
fn toward(right: bool) -> i8 {
    if right { 1 } else { -1 }
}

/// The nodes of several trees. A slot is in one tree at a time.
#[derive(Debug)]
pub(super) struct Sorted {
    nodes: Vec<Node>,
    order: u64,
    /// The nodes on the way down to the one at hand; beyond that nothing that means anything.
    way: [u32; LEVELS],
}

impl Sorted {
    pub fn new(capacity: usize) -> Self {
        let mut sorted = Sorted {
            nodes: Vec::new(),
            order: 0,
            way: [NONE; LEVELS],
        };
        sorted.reserve(capacity);
        sorted
    }

    /// Makes room for slots below `capacity`.
    pub fn reserve(&mut self, capacity: usize) {
        let blank = Node {
            sector: 0,
            order: 0,
            child: [NONE; 2],
            lean: 0,
        };
        if capacity > self.nodes.len() {
            self.nodes.resize(capacity, blank);
        }
    }

    #[inline]
    fn node(&self, slot: u32) -> &Node {
        &self.nodes[slot as usize]
    }

    #[inline]
    fn node_mut(&mut self, slot: u32) -> &mut Node {
        &mut self.nodes[slot as usize]
    }

    #[inline]
    fn child(&self, of: u32, right: bool) -> u32 {
        self.node(of).child[usize::from(right)]
    }

    #[inline]
    fn set_child(&mut self, of: u32, right: bool, child: u32) {
        self.node_mut(of).child[usize::from(right)] = child;
    }

    /// Puts `child` where the first `depth` nodes of the way lead: under the last of them, or at the root.
    #[inline]
    fn hang(&mut self, root: &mut Root, depth: usize, sides: Sides, child: u32) {
        match depth.checked_sub(1) {
            Some(last) => self.set_child(self.way[last], sides.at(last), child),
            None => root.0 = child,
        }
    }

    /// Adds `slot`, after all that begin at the same sector.
    pub fn insert(&mut self, root: &mut Root, slot: u32, sector: u64) {
        self.order += 1;
        *self.node_mut(slot) = Node {
            sector,
            order: self.order,
            child: [NONE; 2],
            lean: 0,
        };
        let (mut depth, mut sides) = (0, Sides(0));
        let mut at = root.0;
        while at != NONE {
            // It came last: among equals it goes to the right.
            let right = self.node(at).sector <= sector;
            self.way[depth] = at;
            sides.set(depth, right);
            depth += 1;
            at = self.child(at, right);
        }
        self.hang(root, depth, sides, slot);
        while depth > 0 {
            depth -= 1;
            let (at, right) = (self.way[depth], sides.at(depth));
            let toward = toward(right);
            let lean = &mut self.node_mut(at).lean;
            if *lean == toward {
                let (top, _) = self.rotate(at, right);
                self.hang(root, depth, sides, top);
                return;
            }
            *lean += toward;
            if *lean == 0 {
                // It has become as deep as the other side: nothing above changes.
                return;
            }
        }
    }

    /// Removes `slot`, which is in this tree.
    pub fn remove(&mut self, root: &mut Root, slot: u32) {
        let node = *self.node(slot);
        let (mut depth, mut sides) = (0, Sides(0));
        let mut at = root.0;
        while at != slot {
            let right = self.node(at).key() < node.key();
            self.way[depth] = at;
            sides.set(depth, right);
            depth += 1;
            at = self.child(at, right);
        }
        match node.child {
            [NONE, below] | [below, NONE] => self.hang(root, depth, sides, below),
            [_, right] => {
                // The next one takes its place.
                let place = depth;
                sides.set(depth, true);
                depth += 1;
                let mut next = right;
                while self.child(next, false) != NONE {
                    self.way[depth] = next;
                    sides.set(depth, false);
                    depth += 1;
                    next = self.child(next, false);
                }
                self.way[place] = next;
                let below = self.child(next, true);
                let heir = self.node_mut(next);
                (heir.child, heir.lean) = (node.child, node.lean);
                self.hang(root, depth, sides, below);
                self.hang(root, place, sides, next);
            }
        }
        while depth > 0 {
            depth -= 1;
            let (at, right) = (self.way[depth], sides.at(depth));
            let toward = toward(right);
            let lean = &mut self.node_mut(at).lean;
            if *lean == -toward {
                let (top, is_lower) = self.rotate(at, !right);
                self.hang(root, depth, sides, top);
                if !is_lower {
                    return;
                }
                continue;
            }
            *lean -= toward;
            if *lean != 0 {
                // The other side is as deep as it was: nothing above changes.
                return;
            }
        }
    }

    /// Mends a node whose subtree on one side is two levels deeper than the other: the node that takes its
    /// place, and whether the whole has become a level lower.
    fn rotate(&mut self, at: u32, right: bool) -> (u32, bool) {
        let toward = toward(right);
        let deep = self.child(at, right);
        if self.node(deep).lean * toward >= 0 {
            let even = self.node(deep).lean == 0;
            let inner = self.child(deep, !right);
            self.set_child(at, right, inner);
            self.set_child(deep, !right, at);
            self.node_mut(at).lean = if even { toward } else { 0 };
            self.node_mut(deep).lean = if even { -toward } else { 0 };
            return (deep, !even);
        }
        let top = self.child(deep, !right);
        let lean = self.node(top).lean * toward;
        let (near, far) = (self.child(top, !right), self.child(top, right));
        self.set_child(at, right, near);
        self.set_child(deep, !right, far);
        self.set_child(top, !right, at);
        self.set_child(top, right, deep);
        self.node_mut(at).lean = if lean == 1 { -toward } else { 0 };
        self.node_mut(deep).lean = if lean == -1 { toward } else { 0 };
        self.node_mut(top).lean = 0;
        (top, true)
    }

    /// The first that begins at or after `sector`.
    #[inline]
    pub fn at_or_after(&self, root: Root, sector: u64) -> Option<u32> {
        self.first_not_below(root, (sector, 0))
    }

    /// The one after `slot`, if it begins at the same sector.
    pub fn same_sector_after(&self, root: Root, slot: u32) -> Option<u32> {
        let node = self.node(slot);
        let next = self.first_not_below(root, (node.sector, node.order + 1))?;
        (self.node(next).sector == node.sector).then_some(next)
    }

    #[inline]
    fn first_not_below(&self, root: Root, key: (u64, u64)) -> Option<u32> {
        let mut found = NONE;
        let mut at = root.0;
        while at != NONE {
            let node = self.node(at);
            if node.key() >= key {
                found = at;
                at = node.child[0];
            } else {
                at = node.child[1];
            }
        }
        (found != NONE).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The slots below `at` in their order, and how many levels they are deep.
    fn in_order(sorted: &Sorted, at: u32, out: &mut Vec<u32>) -> i32 {
        if at == NONE {
            return 0;
        }
        let node = sorted.node(at);
        let left = in_order(sorted, node.child[0], out);
        out.push(at);
        let right = in_order(sorted, node.child[1], out);
        assert!((-1..=1).contains(&node.lean));
        assert_eq!(right - left, i32::from(node.lean), "below {at}");
        left.max(right) + 1
    }

    proptest! {
        #[test]
        fn it_is_a_sorted_list(steps in prop::collection::vec((0u32..40, 0u64..12), 1..200)) {
            let mut sorted = Sorted::new(40);
            let mut root = Root::default();
            let mut list: Vec<(u64, u32)> = Vec::new();
            for (slot, sector) in steps {
                match list.iter().position(|e| e.1 == slot) {
                    Some(at) => {
                        list.remove(at);
                        sorted.remove(&mut root, slot);
                    }
                    None => {
                        let at = list.partition_point(|e| e.0 <= sector);
                        list.insert(at, (sector, slot));
                        sorted.insert(&mut root, slot, sector);
                    }
                }
                let mut slots = Vec::new();
                in_order(&sorted, root.0, &mut slots);
                prop_assert_eq!(slots, list.iter().map(|e| e.1).collect::<Vec<_>>());
                for from in 0..13 {
                    let first = list.iter().find(|e| e.0 >= from).map(|e| e.1);
                    prop_assert_eq!(sorted.at_or_after(root, from), first);
                }
                for pair in list.windows(2) {
                    let next = (pair[0].0 == pair[1].0).then_some(pair[1].1);
                    prop_assert_eq!(sorted.same_sector_after(root, pair[0].1), next);
                }
            }
        }
    }

    /// What the treap before this tree took for its priorities, which a guest knew: xorshift32 from a
    /// constant. With sectors in the order of the priorities it was a list.
    fn known_order(count: usize) -> Vec<u64> {
        let mut random = 0x9e37_79b9_u32;
        let next = |_| {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            u64::from(random)
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn no_order_of_sectors_makes_it_deep() {
        const COUNT: u32 = 64 * 1024;
        let known = known_order(COUNT as usize);
        let orders: [&dyn Fn(u32) -> u64; 5] = [
            &|at| at.into(),
            &|at| (COUNT - at).into(),
            &|_| 7,
            // From both ends to the middle.
            &|at| {
                if at % 2 == 0 {
                    at.into()
                } else {
                    (2 * COUNT - at).into()
                }
            },
            &|at| known[at as usize],
        ];
        for (nth, sector) in orders.into_iter().enumerate() {
            let mut sorted = Sorted::new(COUNT as usize);
            let mut root = Root::default();
            (0..COUNT).for_each(|slot| sorted.insert(&mut root, slot, sector(slot)));
            let mut slots = Vec::new();
            let deep = in_order(&sorted, root.0, &mut slots);
            assert!(deep <= 23, "order {nth}: {deep} levels");
            // Half of them leave, those in the middle first.
            for slot in &slots[COUNT as usize / 4..COUNT as usize * 3 / 4] {
                sorted.remove(&mut root, *slot);
            }
            let deep = in_order(&sorted, root.0, &mut Vec::new());
            assert!(deep <= 22, "order {nth}: {deep} levels");
        }
    }
}
