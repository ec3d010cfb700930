//! Queued requests by their first sector: trees whose nodes are the slots of the store.
//!
//! An AVL tree: of the two subtrees of any node one is deeper than the other by one level at most, so that
//! *n* requests are 1.44 log2(*n*) levels deep whatever the order in which a guest sends its sectors. (A
//! treap, whose bound rests on priorities that the guest does not know, was a list for one who knew them.)

use super::store::NONE;

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
    /// Above it; of the root's, none.
    parent: u32,
    /// By how many levels the right subtree is deeper than the left one: −1, 0 or 1.
    lean: i8,
}

impl Node {
    #[inline]
    fn key(&self) -> (u64, u64) {
        (self.sector, self.order)
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
}

impl Sorted {
    pub fn new(capacity: usize) -> Self {
        let mut sorted = Sorted {
            nodes: Vec::new(),
            order: 0,
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
            parent: NONE,
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

    /// Puts `below`, which may be none, under `of`.
    #[inline]
    fn hang(&mut self, of: u32, right: bool, below: u32) {
        self.node_mut(of).child[usize::from(right)] = below;
        if below != NONE {
            self.node_mut(below).parent = of;
        }
    }

    /// Puts `new`, which may be none, in the place of `old` under `parent`, or at the root.
    #[inline]
    fn replace(&mut self, root: &mut Root, parent: u32, old: u32, new: u32) {
        if parent != NONE {
            let right = self.node(parent).child[1] == old;
            self.hang(parent, right, new);
            return;
        }
        root.0 = new;
        if new != NONE {
            self.node_mut(new).parent = NONE;
        }
    }

    /// Adds `slot`, after all that begin at the same sector.
    pub fn insert(&mut self, root: &mut Root, slot: u32, sector: u64) {
        let (mut parent, mut right, mut at) = (NONE, false, root.0);
        while at != NONE {
            let node = self.node(at);
            // It came last: among equals it goes to the right.
            right = node.sector <= sector;
            parent = at;
            at = node.child[usize::from(right)];
        }
        self.order += 1;
        *self.node_mut(slot) = Node {
            sector,
            order: self.order,
            child: [NONE; 2],
            parent,
            lean: 0,
        };
        if parent == NONE {
            root.0 = slot;
            return;
        }
        self.node_mut(parent).child[usize::from(right)] = slot;
        let mut at = parent;
        loop {
            let node = self.node_mut(at);
            let toward = toward(right);
            if node.lean == toward {
                self.rotate(root, at, right);
                return;
            }
            node.lean += toward;
            let (lean, above) = (node.lean, node.parent);
            // If it has become as deep as the other side, nothing above changes.
            if lean == 0 || above == NONE {
                return;
            }
            right = self.node(above).child[1] == at;
            at = above;
        }
    }

    /// Removes `slot`, which is in this tree.
    pub fn remove(&mut self, root: &mut Root, slot: u32) {
        let node = *self.node(slot);
        // Which side of which node has lost a level.
        let (mut at, mut right);
        match node.child {
            [NONE, below] | [below, NONE] => {
                at = node.parent;
                right = at != NONE && self.node(at).child[1] == slot;
                self.replace(root, at, slot, below);
            }
            [left, first] => {
                // The next one takes its place.
                let mut next = first;
                while self.node(next).child[0] != NONE {
                    next = self.node(next).child[0];
                }
                (at, right) = (next, true);
                if next != first {
                    let Node { child, parent, .. } = *self.node(next);
                    (at, right) = (parent, false);
                    self.hang(parent, false, child[1]);
                    self.hang(next, true, first);
                }
                self.hang(next, false, left);
                self.node_mut(next).lean = node.lean;
                self.replace(root, node.parent, slot, next);
            }
        }
        while at != NONE {
            let node = self.node_mut(at);
            let (toward, lean, above) = (toward(right), node.lean, node.parent);
            let mut top = at;
            if lean == -toward {
                let is_lower;
                (top, is_lower) = self.rotate(root, at, !right);
                if !is_lower {
                    return;
                }
            } else {
                node.lean -= toward;
                if lean == 0 {
                    // The other side is as deep as it was: nothing above changes.
                    return;
                }
            }
            right = above != NONE && self.node(above).child[1] == top;
            at = above;
        }
    }

    /// Mends a node whose subtree on one side is two levels deeper than the other: the node that takes its
    /// place, and whether the whole has become a level lower.
    fn rotate(&mut self, root: &mut Root, at: u32, right: bool) -> (u32, bool) {
        let toward = toward(right);
        let Node { child, parent, .. } = *self.node(at);
        let deep = child[usize::from(right)];
        let Node { child, lean, .. } = *self.node(deep);
        let inner = child[usize::from(!right)];
        if lean != -toward {
            self.hang(at, right, inner);
            self.hang(deep, !right, at);
            self.replace(root, parent, at, deep);
            let even = lean == 0;
            self.node_mut(at).lean = if even { toward } else { 0 };
            self.node_mut(deep).lean = if even { -toward } else { 0 };
            return (deep, !even);
        }
        let Node { child, lean, .. } = *self.node(inner);
        self.hang(at, right, child[usize::from(!right)]);
        self.hang(deep, !right, child[usize::from(right)]);
        self.hang(inner, !right, at);
        self.hang(inner, right, deep);
        self.replace(root, parent, at, inner);
        self.node_mut(at).lean = if lean == toward { -toward } else { 0 };
        self.node_mut(deep).lean = if lean == -toward { toward } else { 0 };
        self.node_mut(inner).lean = 0;
        (inner, true)
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
        for child in node.child.into_iter().filter(|child| *child != NONE) {
            assert_eq!(sorted.node(child).parent, at);
        }
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
