//! `--coalesce`: how long the guest may be left in the dark about what is done.

use std::str::FromStr;

/// The longest time calls may be held back, in microseconds.
pub const MAX_COALESCE_US: u32 = 10_000;

/// Completions that are not held back any longer unless another number is given.
const DEFAULT_COALESCE_COUNT: u16 = 32;

/// The most completions one call may stand for: the largest ring's.
const MAX_COALESCE_COUNT: u16 = 1024;

/// Interrupt coalescing: by how much a call for completed requests may be late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coalesce {
    /// From the first request that is done and was not called for, in microseconds, up to
    /// `MAX_COALESCE_US`; 0 is no coalescing.
    pub delay_us: u32,
    /// As soon as so many are done: 2 to 1024.
    pub count: u16,
}

/// Reads `US` or `US:COUNT`.
///
/// # Errors
///
/// In words: what is wrong with it.
pub fn parse_coalesce(text: &str) -> Result<Coalesce, String> {
    let (delay, count) = match text.split_once(':') {
        Some((delay, count)) => (delay, Some(count)),
        None => (text, None),
    };
    let delay_us = number(delay, 0, MAX_COALESCE_US)
        .ok_or_else(|| format!("give 0 to {MAX_COALESCE_US} microseconds"))?;
    let count = match count {
        Some(count) => number(count, 2, MAX_COALESCE_COUNT)
            .ok_or_else(|| format!("behind the colon give 2 to {MAX_COALESCE_COUNT} requests"))?,
        None => DEFAULT_COALESCE_COUNT,
    };
    Ok(Coalesce { delay_us, count })
}

fn number<T: FromStr + PartialOrd>(text: &str, least: T, most: T) -> Option<T> {
    let number: T = text.parse().ok()?;
    (least..=most).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_and_a_count_are_read_within_their_bounds() {
        let held = |delay_us, count| Ok(Coalesce { delay_us, count });
        assert_eq!(parse_coalesce("0"), held(0, 32));
        assert_eq!(parse_coalesce("50"), held(50, 32));
        assert_eq!(parse_coalesce("10000:1024"), held(10_000, 1024));
        assert_eq!(parse_coalesce("1:2"), held(1, 2));
        for text in [
            "", "off", "10001", "on", "-1", "5:", "5:1", "5:1025", "5:2:3",
        ] {
            assert!(parse_coalesce(text).is_err(), "{text}");
        }
    }
}
