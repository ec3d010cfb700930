//! On which NUMA nodes a guest's memory is.

use std::collections::BTreeMap;
use std::ptr::{self, NonNull};

use super::MemoryTable;

/// Pages that are looked at in each region, evenly spread.
const SAMPLES: u64 = 64;

const PAGE_BYTES: usize = 4096;

/// `MPOL_F_NODE | MPOL_F_ADDR`: the node of the page at an address (uapi/linux/mempolicy.h).
const NODE_OF_PAGE: libc::c_ulong = 1 | 2;
/// `MPOL_F_ADDR`: the policy at an address. Shared memory has one of its own, whoever set it.
const POLICY: libc::c_ulong = 2;
/// `MPOL_BIND`: these nodes and no others.
const MPOL_BIND: libc::c_int = 2;

/// Bits of a node mask.
const MASK_BITS: usize = 1024;

impl MemoryTable {
    /// How many bytes of the guest's memory are on which node, as (node, bytes) by node: estimated from
    /// pages that are there already, or, where none is, from the policy the front end has set. Nothing is
    /// allocated by looking. Empty where the kernel says nothing.
    pub fn nodes(&self) -> Vec<(u16, u64)> {
        let mut shares = BTreeMap::new();
        for region in self.regions() {
            let step = (region.len / SAMPLES)
                .max(PAGE_BYTES as u64)
                .next_multiple_of(PAGE_BYTES as u64);
            let offsets = (0..region.len).step_by(usize::try_from(step).expect("64 bits"));
            let pages = offsets.filter_map(|offset| region.host(region.gpa + offset, 1));
            let found: Vec<u16> = pages.filter_map(page_of).collect();
            let found = match found.is_empty() {
                true => bound_to(region.host).into_iter().collect(),
                false => found,
            };
            for node in &found {
                *shares.entry(*node).or_insert(0) += region.len / found.len() as u64;
            }
        }
        shares.into_iter().collect()
    }
}

/// The node of the page an address is in, if the page is there.
fn page_of(address: NonNull<u8>) -> Option<u16> {
    let page = address.as_ptr().map_addr(|at| at & !(PAGE_BYTES - 1));
    let mut there = 0u8;
    // SAFETY: mincore writes one byte for the one page, and only looks at the mapping. Unsafe because it
    // takes pointers.
    let looked = unsafe { libc::mincore(page.cast(), PAGE_BYTES, &raw mut there) };
    if looked != 0 || there & 1 == 0 {
        return None;
    }
    let mut node: libc::c_int = -1;
    // SAFETY: with these flags the kernel writes one int, and maps the page if it was not. Unsafe because
    // system calls are.
    let asked = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut node,
            ptr::null_mut::<libc::c_ulong>(),
            0 as libc::c_ulong,
            page,
            NODE_OF_PAGE,
        )
    };
    (asked == 0).then(|| u16::try_from(node).ok())?
}

/// The nodes that memory at an address is bound to, by whoever made it.
fn bound_to(address: NonNull<u8>) -> Vec<u16> {
    const WORD: usize = libc::c_ulong::BITS as usize;
    let mut policy: libc::c_int = 0;
    let mut mask = [0 as libc::c_ulong; MASK_BITS / WORD];
    // SAFETY: the kernel writes one int, and the mask up to the number of bits it is told. Unsafe because
    // system calls are.
    let asked = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut policy,
            mask.as_mut_ptr(),
            MASK_BITS as libc::c_ulong,
            address.as_ptr(),
            POLICY,
        )
    };
    if asked != 0 || policy != MPOL_BIND {
        return Vec::new();
    }
    (0..MASK_BITS)
        .filter(|bit| mask[bit / WORD] & (1 << (bit % WORD)) != 0)
        .filter_map(|bit| u16::try_from(bit).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn only_pages_that_are_there_are_looked_at() {
        let bytes = 64 << 20;
        let memory = Arc::new(
            GuestMemoryMmap::<()>::from_ranges(&[
                (GuestAddress(0), bytes),
                (GuestAddress(1 << 30), 1 << 20),
            ])
            .unwrap(),
        );
        let table = MemoryTable::from_guest_memory(Arc::clone(&memory), None).unwrap();
        assert_eq!(table.nodes(), [], "none is there, and none is bound");
        assert_eq!(
            page_of(table.regions()[0].host),
            None,
            "nor is there one from looking"
        );
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let shares = table.nodes();
        // Where the kernel knows no nodes it says so.
        if page_of(table.regions()[0].host).is_some() {
            assert_eq!(shares.len(), 1, "{shares:?}");
            assert_eq!(shares[0].1, bytes as u64, "the other region is not there");
        }
    }
}
