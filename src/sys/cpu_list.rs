//! Lists of CPUs, as taskset(1) and the kernel write them.

use std::fmt;

/// The number of CPUs an affinity mask has room for; numbers are below it.
pub const MAX_CPUS: u16 = 1024;

/// CPUs in the order in which they were given, each once; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<u16>);

impl CpuList {
    /// Reads `0-3,8` or `0-6:2` (every second one from 0 to 6).
    ///
    /// # Errors
    ///
    /// In words: what is wrong with the list.
    pub fn parse(text: &str) -> Result<CpuList, String> {
        let mut cpus: Vec<u16> = Vec::new();
        for item in text.trim().split(',') {
            let wrong =
                || format!("'{item}' is neither a CPU nor a range; write 0-3,8 for 0, 1, 2, 3, 8");
            let (range, step) = item.split_once(':').unwrap_or((item, "1"));
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
            let (first, last, step) = (number(first)?, number(last)?, number(step)?);
            if first > last || step == 0 {
                return Err(wrong());
            }
            if last >= MAX_CPUS {
                return Err(format!(
                    "there is no CPU {last}; numbers end at {}",
                    MAX_CPUS - 1
                ));
            }
            for cpu in (first..=last).step_by(usize::from(step)) {
                if cpus.contains(&cpu) {
                    return Err(format!("CPU {cpu} is in the list twice"));
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }

    /// The CPUs.
    pub fn cpus(&self) -> &[u16] {
        &self.0
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = &self.0[..];
        while let Some((&first, _)) = rest.split_first() {
            let run = rest
                .iter()
                .zip(first..)
                .take_while(|(cpu, next)| **cpu == *next)
                .count();
            let comma = if rest.len() < self.0.len() { "," } else { "" };
            match run {
                1 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{}", rest[run - 1])?,
            }
            rest = &rest[run..];
        }
        Ok(())
    }
}

impl From<Vec<u16>> for CpuList {
    fn from(cpus: Vec<u16>) -> Self {
        CpuList(cpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_taskset_reads_them() {
        for (text, cpus) in [
            ("0", &[0][..]),
            ("0-3,8", &[0, 1, 2, 3, 8]),
            ("7,1-2", &[7, 1, 2]),
            ("0-6:2,9", &[0, 2, 4, 6, 9]),
            ("1023\n", &[1023]),
        ] {
            assert_eq!(CpuList::parse(text).unwrap().cpus(), cpus, "{text}");
        }
    }

    #[test]
    fn a_wrong_list_says_what_is_wrong() {
        for (text, part) in [
            ("", "'' is neither"),
            ("a", "'a' is neither"),
            ("3-1", "'3-1' is neither"),
            ("0-4:0", "'0-4:0' is neither"),
            ("0,,1", "'' is neither"),
            ("-1", "'-1' is neither"),
            ("1024", "there is no CPU 1024"),
            ("0-2,1", "CPU 1 is in the list twice"),
        ] {
            let error = CpuList::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_list_is_written_with_its_ranges() {
        for text in ["0", "0-3,8", "7,1-2", "5,3"] {
            assert_eq!(CpuList::parse(text).unwrap().to_string(), text);
        }
    }
}
