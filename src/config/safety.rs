//! Which user the process becomes, and what it gives up.

use std::str::FromStr;

/// A user, and perhaps another group than their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserName {
    /// Its name or number.
    pub user: String,
    /// Its name or number.
    pub group: Option<String>,
}

impl FromStr for UserName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if user.is_empty() || group.is_some_and(str::is_empty) {
            return Err("give USER or USER:GROUP, by name or number".to_owned());
        }
        Ok(UserName {
            user: user.to_owned(),
            group: group.map(str::to_owned),
        })
    }
}

/// Which layers of the sandbox are put on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxLayers {
    /// Few system calls.
    pub seccomp: bool,
    /// No file system, no network.
    pub landlock: bool,
    /// No capabilities, and none to be gained.
    pub privileges: bool,
    /// No core dumps.
    pub dumps: bool,
    /// Rings that can do what a worker does, and nothing else.
    pub io_uring: bool,
}

impl SandboxLayers {
    /// All, or none.
    pub fn all(on: bool) -> SandboxLayers {
        SandboxLayers {
            seccomp: on,
            landlock: on,
            privileges: on,
            dumps: on,
            io_uring: on,
        }
    }
}

impl Default for SandboxLayers {
    fn default() -> Self {
        SandboxLayers::all(true)
    }
}

impl FromStr for SandboxLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let switch = |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        if let Some(on) = switch(text) {
            return Ok(SandboxLayers::all(on));
        }
        let mut layers = SandboxLayers::default();
        for pair in text.split(',') {
            let on = pair.split_once('=').and_then(|(_, on)| switch(on));
            let layer = match pair.split('=').next() {
                Some("seccomp") => &mut layers.seccomp,
                Some("landlock") => &mut layers.landlock,
                Some("privileges") => &mut layers.privileges,
                Some("dumps") => &mut layers.dumps,
                Some("io-uring") => &mut layers.io_uring,
                _ => return Err(bad_layer(pair)),
            };
            *layer = on.ok_or_else(|| bad_layer(pair))?;
        }
        Ok(layers)
    }
}

fn bad_layer(pair: &str) -> String {
    format!(
        "'{pair}' is none of on, off, seccomp=on|off, landlock=on|off, io-uring=on|off, \
         privileges=on|off, dumps=on|off"
    )
}
