//! What is shown of disks and groups, as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::tuning::list_limits;
use crate::config::{CacheMode, ImageSource};
use crate::disk::Disk;
use crate::disk::registry::Roster;
use crate::disk::summary::{DiskSummary, Summary, WorkerSummary};
use crate::engine::IoPoll;
use crate::mq::throttle::Limits;
use crate::virtio::features;

/// A limit.
#[derive(Debug, Serialize)]
pub(super) struct RateView {
    /// For each second.
    rate: u64,
    /// At once.
    burst: u64,
}

/// Limits by key; only those that are set.
pub(super) type LimitsView = BTreeMap<&'static str, RateView>;

pub(super) fn limits(limits: &Limits) -> LimitsView {
    list_limits(limits)
        .into_iter()
        .map(|(key, rate)| {
            let view = RateView {
                rate: rate.per_second,
                burst: rate.burst(),
            };
            (key, view)
        })
        .collect()
}

/// All disks and workers.
#[derive(Debug, Serialize)]
pub(super) struct Overview {
    disks: Vec<DiskView>,
    workers: Vec<WorkerSummary>,
}

/// One disk: its counts, and how it is served.
#[derive(Debug, Serialize)]
pub(super) struct DiskView {
    /// Its place in the configuration, from 0.
    index: u16,
    #[serde(flatten)]
    summary: DiskSummary,
    scheduler_params: BTreeMap<&'static str, u64>,
    limits: LimitsView,
    group: Option<String>,
    /// Whether a front end is connected.
    connected: bool,
    image: Option<String>,
    size_bytes: u64,
    logical_block_size: u32,
    read_only: bool,
    /// `mmap`, `io_uring` or `null`.
    engine: &'static str,
    /// What a mapped image stands on: `tmpfs`, `hugetlbfs` or `dax`.
    medium: Option<&'static str>,
    /// Whether it is open with O_DIRECT.
    direct: bool,
    /// Which transfers the device is polled for: `never`, `poll-queues` or `always`.
    io_poll: &'static str,
    cache: &'static str,
    write_through: bool,
    /// Why flushes fail from now on, if they do.
    sync_error: Option<String>,
    /// The most queues a front end can use, and what a queue's size is expected to be.
    num_queues: u16,
    queue_size: u16,
    /// What the disk offers: virtio's and vhost-user's feature bits, by name.
    features: Vec<&'static str>,
}

pub(super) fn overview(roster: &Roster) -> Overview {
    let Summary { disks, workers } = roster.summarize(&roster.reports());
    Overview {
        disks: roster
            .disks()
            .iter()
            .zip(disks)
            .map(|(disk, summary)| view(disk, summary))
            .collect(),
        workers,
    }
}

pub(super) fn disk(roster: &Roster, disk: &Disk) -> DiskView {
    let mut summary = roster.summarize(&roster.reports());
    view(disk, summary.disks.swap_remove(disk.id.index()))
}

fn view(disk: &Disk, summary: DiskSummary) -> DiskView {
    let config = &disk.config;
    DiskView {
        index: disk.id.0,
        summary,
        scheduler_params: disk
            .scheduler()
            .list()
            .into_iter()
            .map(|param| (param.name, param.value))
            .collect(),
        limits: limits(&disk.limits()),
        group: disk.group().map(|group| group.name),
        connected: disk.is_connected(),
        image: match &config.image {
            ImageSource::File { path } => Some(path.to_string_lossy().into_owned()),
            ImageSource::Null { .. } => None,
        },
        size_bytes: disk.size_bytes(),
        logical_block_size: config.logical_block_size,
        read_only: config.read_only,
        engine: disk.image().engine(),
        medium: (disk.image().mapping.as_ref()).map(|mapping| mapping.medium().name()),
        direct: disk.image().direct,
        io_poll: match disk.image().io_poll {
            IoPoll::Never => "never",
            IoPoll::PollQueues => "poll-queues",
            IoPoll::Always => "always",
        },
        cache: match config.cache {
            CacheMode::Writeback => "writeback",
            CacheMode::None => "none",
            CacheMode::Writethrough => "writethrough",
            CacheMode::Directsync => "directsync",
            CacheMode::Unsafe => "unsafe",
        },
        write_through: disk.is_write_through(),
        sync_error: disk.sync_error().map(|errno| errno.to_string()),
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        features: feature_names(disk.features()),
    }
}

fn feature_names(offered: u64) -> Vec<&'static str> {
    [
        (features::SIZE_MAX, "SIZE_MAX"),
        (features::SEG_MAX, "SEG_MAX"),
        (features::RO, "RO"),
        (features::BLK_SIZE, "BLK_SIZE"),
        (features::FLUSH, "FLUSH"),
        (features::TOPOLOGY, "TOPOLOGY"),
        (features::CONFIG_WCE, "CONFIG_WCE"),
        (features::MQ, "MQ"),
        (features::DISCARD, "DISCARD"),
        (features::WRITE_ZEROES, "WRITE_ZEROES"),
        (features::INDIRECT_DESC, "INDIRECT_DESC"),
        (features::EVENT_IDX, "EVENT_IDX"),
        (features::VHOST_USER_PROTOCOL_FEATURES, "PROTOCOL_FEATURES"),
        (features::VERSION_1, "VERSION_1"),
    ]
    .into_iter()
    .filter(|(bit, _)| offered & bit != 0)
    .map(|(_, name)| name)
    .collect()
}

/// A group of disks.
#[derive(Debug, Serialize)]
pub(super) struct GroupView {
    name: String,
    limits: LimitsView,
    /// The disks in it, by index.
    disks: Vec<u16>,
}

pub(super) fn group(roster: &Roster, name: &str) -> Option<GroupView> {
    let group = roster.group(name)?;
    let is_in = |disk: &Disk| disk.group().is_some_and(|group| group.name == name);
    Some(GroupView {
        limits: limits(&group.throttle.limits()),
        disks: roster
            .disks()
            .iter()
            .filter(|disk| is_in(disk))
            .map(|disk| disk.id.0)
            .collect(),
        name: group.name,
    })
}
