// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers that were started with the files of lxcfs keep them when the daemon is restarted: what they have bound is
//! of the former daemon then, and dead (`Transport endpoint is not connected`). The reconciler looks at every container
//! now and then, takes the dead ones out, which leaves the kernel's, and binds the new daemon's.
//!
//! It looks at mount tables only: a daemon that hangs holds nobody up.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::Guest as _;
use crate::guest::container::{Container, plug, unescape};
use crate::guest::site::Seat;

/// What is to be done with a container's files of lxcfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// They are those of the present daemon, or there is none of either.
    Nothing,
    /// Of no daemon any more.
    Remove,
    /// There are none, and could be.
    Add,
    /// Of the former daemon.
    Exchange,
}

/// The decision, by the numbers of the file systems that are mounted in the container and on the host. As long as the
/// container has a former daemon's, its number is nobody else's.
fn decide(bound: Option<&str>, present: Option<&str>) -> Repair {
    match (bound, present) {
        (bound, present) if bound == present => Repair::Nothing,
        (Some(_), None) => Repair::Remove,
        (None, _) => Repair::Add,
        (Some(_), Some(_)) => Repair::Exchange,
    }
}

/// The number of lxcfs at a place, in a table of /proc/PID/mountinfo: proc(5). The last mounted lies uppermost.
fn number_at<'a>(table: &'a str, place: &Path) -> Option<&'a str> {
    let mut lines = table.lines().rev();
    let fields = |line: &'a str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let (number, at) = (mount.next()?, mount.nth(1)?);
        (unescape(at) == place).then(|| file_system.starts_with("fuse.lxcfs ").then_some(number))
    };
    lines.find_map(fields)?
}

/// The mounts from lxcfs with which a container was started: what its bundle lists.
fn mounts(bundle: &Value, lxcfs: &Path) -> Vec<Value> {
    let from_lxcfs = |mount: &&Value| {
        let source = mount["source"].as_str().map(Path::new);
        source.is_some_and(|source| source.starts_with(lxcfs))
    };
    let mounts = bundle["mounts"].as_array().into_iter().flatten();
    mounts.filter(from_lxcfs).cloned().collect()
}

/// Looks at a running container and mends what is to be mended. Reads its bundle and two tables.
pub async fn mend(seat: &Seat) -> Result<(), Error> {
    let Some(process) = Container::new(seat.clone()).process() else {
        return Ok(());
    };
    let lxcfs = &seat.site.settings.lxcfs_dir;
    let bundle = std::fs::read(seat.run_folder().join("config.json")).unwrap_or_default();
    let bundle: Value = serde_json::from_slice(&bundle).unwrap_or_default();
    let mounts = mounts(&bundle, lxcfs);
    let Some(first) = mounts.first() else {
        return Ok(());
    };
    let place = PathBuf::from(first["destination"].as_str().unwrap_or_default());
    let table = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/mountinfo"));
    let (Ok(inside), Ok(outside)) = (table(&process.pid().to_string()), table("self")) else {
        // It has just ended.
        return Ok(());
    };
    let repair = decide(number_at(&inside, &place), number_at(&outside, lxcfs));
    if repair == Repair::Nothing {
        return Ok(());
    }
    tracing::info!(guest = seat.title(), ?repair, "files of lxcfs");
    if repair != Repair::Add {
        for mount in &mounts {
            let place = json!([{ "destination": mount["destination"] }]);
            if let Err(error) = plug::change(seat, ["mounts", "remove"], &place).await {
                // Somebody has it open; the new one lies over it.
                tracing::debug!(guest = seat.title(), error = error.chain(), "not removed");
            }
        }
    }
    match repair {
        Repair::Remove => Ok(()),
        _ => plug::change(seat, ["mounts", "add"], &Value::Array(mounts)).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_tell_whose_the_files_are() {
        let table = "25 30 0:22 / /proc rw shared:5 - proc proc rw\n\
                     90 25 0:50 /proc/meminfo /proc/meminfo rw - fuse.lxcfs lxcfs rw\n\
                     91 25 0:61 /proc/meminfo /proc/meminfo rw master:3 - fuse.lxcfs lxcfs rw\n\
                     92 25 0:50 /proc/stat /proc/stat rw - tmpfs none rw\n";
        let number = |place: &str| number_at(table, Path::new(place));
        assert_eq!(number("/proc/meminfo"), Some("0:61"), "the uppermost");
        assert_eq!((number("/proc/stat"), number("/proc/none")), (None, None));
        for (bound, present, expected) in [
            (None, None, Repair::Nothing),
            (Some("0:1"), Some("0:1"), Repair::Nothing),
            (Some("0:1"), None, Repair::Remove),
            (None, Some("0:1"), Repair::Add),
            (Some("0:1"), Some("0:2"), Repair::Exchange),
        ] {
            assert_eq!(decide(bound, present), expected);
        }
        let bundle = json!({ "mounts": [
            { "destination": "/proc", "source": "proc" },
            { "destination": "/proc/stat", "source": "/var/lib/lxcfs/proc/stat" },
        ]});
        let found = mounts(&bundle, Path::new("/var/lib/lxcfs"));
        assert_eq!(found, [bundle["mounts"][1].clone()]);
    }
}
