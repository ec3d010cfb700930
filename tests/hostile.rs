//! Front ends and guests that break rules on purpose. Each attack is made on one disk of a process while a well-behaved
//! front end keeps another disk of the same worker busy and checks every byte: whatever the first one does, the second
//! must not notice, and the first disk must serve the next front end.
//!
//! `docs/SECURITY.md` has the table of attacks and outcomes. The delays of the undisturbed disk are measured by
//!
//! ```sh
//! TMPDIR=/dev/shm cargo test --release --test hostile -- --ignored --nocapture --exact pace::the_other_disk_keeps_its_pace
//! ```

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

mod support;

#[path = "hostile/stage.rs"]
#[macro_use]
mod stage;

#[path = "hostile/ceilings.rs"]
mod ceilings;
#[path = "hostile/descriptors.rs"]
mod descriptors;
#[path = "hostile/fds.rs"]
mod fds;
#[path = "hostile/hoards.rs"]
mod hoards;
#[path = "hostile/locked_memory.rs"]
mod locked_memory;
#[path = "hostile/many.rs"]
mod many;
#[path = "hostile/memory.rs"]
mod memory;
#[path = "hostile/messages.rs"]
mod messages;
#[path = "hostile/pace.rs"]
mod pace;
#[path = "hostile/rings.rs"]
mod rings;
#[path = "hostile/turns.rs"]
mod turns;
