//! Daemons that are killed at random moments under load, with a front end that keeps the in-flight region and
//! checks that each request is completed once, and the data.
//!
//! `BLKMQ_ROUNDS=n` sets how many daemons are killed in each campaign, `BLKMQ_SEED=n` runs one again.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

mod support;

#[path = "recovery/cache_mode.rs"]
mod cache_mode;
#[path = "recovery/campaign.rs"]
mod campaign;
#[path = "recovery/held.rs"]
mod held;
#[path = "recovery/held_rings.rs"]
mod held_rings;
#[path = "recovery/moments.rs"]
mod moments;
#[path = "recovery/no_region.rs"]
mod no_region;
#[path = "recovery/options.rs"]
mod options;
#[path = "recovery/regions.rs"]
mod regions;
#[path = "recovery/returns.rs"]
mod returns;
#[path = "recovery/world.rs"]
mod world;
