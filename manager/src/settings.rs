// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a node is started with: where things are on this host. Everything else is configuration in the store.

use std::path::PathBuf;

/// Where a node's things are, from the options of `atolld`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node's name; part of paths, UPIDs and store keys.
    pub node: String,
    /// The state directory, `/var/lib/atoll`.
    pub state: PathBuf,
    /// Where `atoll-vmm` and `atoll-ct` are.
    pub bin_dir: PathBuf,
    /// Where the firmware of virtual machines is: Debian's package `ovmf`.
    pub firmware_dir: PathBuf,
    /// Where lxcfs is mounted, if it runs: Debian's package of that name.
    pub lxcfs_dir: PathBuf,
    /// The NAT bridge for guests, `vmbr0`.
    pub bridge: String,
    /// The bridge's own address with its prefix length; guests get theirs from the same net.
    pub bridge_address: String,
    /// How many tasks may work at the same time; more wait in the order they came.
    pub workers_max: usize,
}

impl Settings {
    /// The defaults of `atolld`, for a state directory and a node name.
    pub fn new(node: impl Into<String>, state: impl Into<PathBuf>) -> Self {
        Self {
            node: node.into(),
            state: state.into(),
            bin_dir: PathBuf::from("/usr/lib/atoll"),
            firmware_dir: PathBuf::from("/usr/share/OVMF"),
            lxcfs_dir: PathBuf::from("/var/lib/lxcfs"),
            bridge: "vmbr0".to_owned(),
            bridge_address: "10.64.0.1/24".to_owned(),
            workers_max: 8,
        }
    }

    /// The embedded store's file.
    pub fn store_path(&self) -> PathBuf {
        self.state.join("store.redb")
    }

    /// Logs and index of tasks.
    pub fn tasks_dir(&self) -> PathBuf {
        self.state.join("tasks")
    }

    /// Time series.
    pub fn metrics_dir(&self) -> PathBuf {
        self.state.join("metrics")
    }

    /// The default storage, `local`.
    pub fn storage_dir(&self) -> PathBuf {
        self.state.join("storage")
    }

    /// Indexes of container templates, and where they come from.
    pub fn templates_dir(&self) -> PathBuf {
        self.state.join("templates")
    }

    /// OCI images: their layers, unpacked.
    pub fn images_dir(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Sockets, pids and specs of what runs now. Names in it are short: a Unix socket's path has 107 bytes.
    pub fn run_dir(&self) -> PathBuf {
        self.state.join("run")
    }
}
