//! Options about what may go wrong, and who may do what.

use clap::Args;

use super::choices::{LockWhen, OnError, Switch};
use super::{DISK, IO};

/// The flags of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct DiskSafety {
    /// When the image is locked against other writers: always, or in-use (only while a
    /// front end runs a queue) [default: always]
    #[arg(
        verbatim_doc_comment, long, value_name = "WHEN", value_enum, hide_possible_values = true,
        help_heading = DISK
    )]
    pub lock: Option<LockWhen>,

    /// Share the image with whoever else writes to it, as QEMU's option of that name
    /// [default: off]
    #[arg(
        verbatim_doc_comment, long, value_name = "on|off", value_enum, hide_possible_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "on", help_heading = DISK
    )]
    pub force_share: Option<Switch>,

    /// What becomes of a request that fails: report (the guest is told), stop (the disk is
    /// held until `blkmqctl resume`, and the guest waits), or enospc (stop if no space is
    /// left, else report) [default: report]
    #[arg(
        verbatim_doc_comment, long, value_name = "POLICY", value_enum, hide_possible_values = true,
        help_heading = IO
    )]
    pub on_error: Option<OnError>,
}
