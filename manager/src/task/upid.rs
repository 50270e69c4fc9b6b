// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The name of a task: `UPID:NODE:PID:PSTART:STARTTIME:TYPE:ID:USER@REALM[!TOKEN]:`, as PVE forms it.
//!
//! PVE's workers are processes; ours are not, so PID is a number that counts up within one run of `atolld` and
//! PSTART is that run's start: together they never repeat.

use std::fmt;
use std::str::FromStr;

/// Longest name in bytes: Linux limits file names to 255.
const LENGTH_MAX: usize = 250;

/// A task's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Upid {
    /// Node the task runs on.
    pub node: String,
    /// Number of the task within one run of the daemon.
    pub pid: u32,
    /// When that run of the daemon started, in clock ticks since boot.
    pub pstart: u64,
    /// When the task started, seconds since 1970.
    pub starttime: u32,
    /// Type of the task, such as `qmstart`.
    pub kind: String,
    /// What it works on, mostly a guest's number; may be empty.
    pub id: String,
    /// Who asked for it: `user@realm` or `user@realm!token`.
    pub user: String,
}

/// A text that is no UPID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse worker upid '{0}'")]
pub struct InvalidUpid(pub String);

impl fmt::Display for Upid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "UPID:{}:{:08X}:{:08X}:{:08X}:{}:{}:{}:",
            self.node,
            self.pid,
            self.pstart,
            self.starttime,
            self.kind,
            escape(&self.id),
            self.user
        )
    }
}

impl FromStr for Upid {
    type Err = InvalidUpid;

    fn from_str(text: &str) -> Result<Self, InvalidUpid> {
        parse(text).ok_or_else(|| InvalidUpid(text.to_owned()))
    }
}

impl Upid {
    /// The same with an id that is cut so that the name fits into a file name.
    pub(super) fn fitted(mut self) -> Self {
        while self.to_string().len() > LENGTH_MAX && self.id.pop().is_some() {}
        self
    }

    /// Directory of the log below `tasks/`: the last hexadecimal digit of the start time, as in PVE.
    pub fn directory(&self) -> String {
        format!("{:X}", self.starttime & 0xF)
    }
}

fn parse(text: &str) -> Option<Upid> {
    // A UPID is a file name below `tasks/`: anything that could leave that directory is no UPID.
    if text.contains(['/', '\0', '\n']) || text.len() > LENGTH_MAX {
        return None;
    }
    let mut parts = text.strip_prefix("UPID:")?.strip_suffix(':')?.split(':');
    let node = parts.next()?;
    let pid = hex(parts.next()?, 8..=8)?;
    let pstart = hex(parts.next()?, 8..=9)?;
    let starttime = hex(parts.next()?, 8..=8)?;
    let kind = parts.next()?;
    let id = parts.next()?;
    let user = parts.next()?;
    if parts.next().is_some() || crate::id::check_node_name(node).is_err() {
        return None;
    }
    if kind.is_empty() || kind.contains(char::is_whitespace) || !user.contains('@') {
        return None;
    }
    Some(Upid {
        node: node.to_owned(),
        pid: u32::try_from(pid).ok()?,
        pstart,
        starttime: u32::try_from(starttime).ok()?,
        kind: kind.to_owned(),
        id: unescape(id)?,
        user: user.to_owned(),
    })
}

fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u64> {
    let upper = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    (digits.contains(&text.len()) && text.bytes().all(upper))
        .then(|| u64::from_str_radix(text, 16).ok())?
}

/// Bytes of an id that would break the name apart are written as `\xHH`, as systemd does and PVE with it.
fn escape(id: &str) -> String {
    let mut out = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"._-@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let digits = rest.get(at + 2..at + 4)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[at + 4..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_upid_of_pve_reads_back() {
        let text = "UPID:pve1:0000A1B2:0012C3D4:65F0AB12:qmstart:100:root@pam:";
        let upid: Upid = text.parse().unwrap();
        assert_eq!(upid.pid, 0xA1B2);
        assert_eq!(upid.kind, "qmstart");
        assert_eq!(upid.to_string(), text);
        assert_eq!(upid.directory(), "2");
    }

    #[test]
    fn what_is_no_upid() {
        for bad in [
            "",
            "UPID:",
            "UPID:n:0000A1B2:0012C3D4:65F0AB12:qmstart:100:root@pam",
            "UPID:n:0000a1b2:0012C3D4:65F0AB12:qmstart:100:root@pam:",
            "UPID:../n:0000A1B2:0012C3D4:65F0AB12:qmstart:100:root@pam:",
            "UPID:n:0000A1B2:0012C3D4:65F0AB12:qmstart:1/../../00:root@pam:",
            "UPID:n:0000A1B2:0012C3D4:65F0AB12:qmstart:100:x:root@pam:",
            "UPID:n:0000A1B2:0012C3D4:65F0AB12:qmstart:100:root:",
        ] {
            assert!(bad.parse::<Upid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_long_id_is_cut() {
        let upid = Upid {
            id: "ä".repeat(300),
            ..crate::task::fault::upid()
        };
        let fitted = upid.fitted();
        assert!(fitted.id.starts_with('ä'));
        assert_eq!(fitted.to_string().parse::<Upid>().unwrap(), fitted);
    }

    proptest! {
        #[test]
        fn any_id_survives(id in "\\PC{0,12}", token in proptest::option::of("[a-z]{1,8}")) {
            let upid = Upid {
                node: "n1".into(), pid: 7, pstart: 0x1_2345_6789, starttime: 0x65F0_AB12,
                kind: "download".into(), id,
                user: token.map_or("a@pve".into(), |t| format!("a@pve!{t}")),
            };
            prop_assert_eq!(upid.to_string().parse::<Upid>().unwrap(), upid);
        }
    }
}
