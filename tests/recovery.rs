//! Daemons that are killed at random moments under load, with a front end that keeps the in-flight region and
//! checks that each request is completed once, and the data.
//!
//! `BLKMQ_ROUNDS=n` sets how many daemons are killed in each campaign, `BLKMQ_SEED=n` runs one again.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test code: sizes and offsets are small and known"
)]

mod support;

#[path = "recovery/campaign.rs"]
mod campaign;
#[path = "recovery/moments.rs"]
mod moments;
#[path = "recovery/world.rs"]
mod world;
