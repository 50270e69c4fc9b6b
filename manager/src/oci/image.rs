// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What an image says about itself: image-spec, "Image Configuration", with Docker's health checks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ImageError;
use super::digest::Digest;

/// Most layers: as many as the runtime lays over each other.
const LAYERS_MAX: usize = 100;

/// An image whose layers are here. Its record is written to disk: it only grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Of its manifest; of its configuration, in an archive of Docker's that has no manifest.
    pub digest: Digest,
    /// What it is called where it comes from, if that is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Digests of the unpacked layers, the lowest first.
    pub layers: Vec<Digest>,
    /// How to run it.
    pub run: Run,
    /// Its configuration, byte for byte: the digest of this is what others know the image by. Missing in records that
    /// were written before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
}

/// The member `config` of an image's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Run {
    /// Program with its first arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Further arguments; the program, when there is no entrypoint.
    pub cmd: Option<Vec<String>>,
    /// NAME=VALUE.
    pub env: Option<Vec<String>>,
    /// `user`, `user:group`, by name or number.
    pub user: Option<String>,
    /// Where the program starts.
    pub working_dir: Option<String>,
    /// `80/tcp`, …: what is meant to be reached from outside.
    pub exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    /// Paths whose content should outlive the container.
    pub volumes: Option<BTreeMap<String, serde_json::Value>>,
    /// Asks the program to end.
    pub stop_signal: Option<String>,
    /// Docker's extension.
    pub healthcheck: Option<Healthcheck>,
}

/// How to find out whether the program works. Times are in nanoseconds; 0 is the usual.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Healthcheck {
    /// `NONE`, `CMD` with arguments, or `CMD-SHELL` with a line.
    pub test: Vec<String>,
    /// Time between two.
    pub interval: u64,
    /// Longest run.
    pub timeout: u64,
    /// Time in which failures do not count.
    pub start_period: u64,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
}

/// An image's configuration, as far as it is looked at.
#[derive(Debug, Deserialize)]
struct Configuration {
    architecture: String,
    os: String,
    #[serde(default)]
    config: Option<Run>,
    rootfs: Rootfs,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    diff_ids: Vec<Digest>,
}

impl Image {
    /// Reads a configuration.
    pub(crate) fn parse(
        digest: Digest,
        name: Option<String>,
        text: &[u8],
    ) -> Result<Self, ImageError> {
        let whole = std::str::from_utf8(text);
        let whole = whole.map_err(|_| {
            ImageError::Invalid("the image's configuration is not UTF-8".to_owned())
        })?;
        let read: Configuration =
            serde_json::from_str(whole).map_err(|source| ImageError::Json {
                what: "the image's configuration".to_owned(),
                source,
            })?;
        if (read.architecture.as_str(), read.os.as_str()) != ("amd64", "linux") {
            return Err(ImageError::Invalid(format!(
                "the image is for {} on {}, not for linux on amd64",
                read.os, read.architecture
            )));
        }
        let count = read.rootfs.diff_ids.len();
        if !(1..=LAYERS_MAX).contains(&count) {
            return Err(ImageError::Invalid(format!(
                "the image has {count} layers; 1 to {LAYERS_MAX} are supported"
            )));
        }
        Ok(Self {
            digest,
            name,
            layers: read.rootfs.diff_ids,
            run: read.config.unwrap_or_default(),
            configuration: Some(whole.to_owned()),
        })
    }
}

impl Run {
    /// The program with all its arguments.
    pub fn command(&self) -> Vec<String> {
        let both = [&self.entrypoint, &self.cmd].into_iter().flatten();
        both.flatten().cloned().collect()
    }
}
