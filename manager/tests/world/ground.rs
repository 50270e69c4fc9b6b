// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Where images are tried: a folder that takes them in, and a node whose containers are made from them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test helpers")]

use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_manager::error::Error;
use atoll_manager::guest::Action;
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::oci::image::Image;
use atoll_manager::oci::{ImageError, Images};
use atoll_manager::task::Upid;
use atoll_manager::{Node, Settings};

use super::image::{Entry, Sample, file, folder, layer, link};

/// A folder of images, and archives to take in.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub images: Images,
}

impl Place {
    /// `None` where the owners of files cannot be set.
    pub fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("ATOLL-SKIP: layers have owners (root is needed)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let images = Images::new(folder.path().join("images"));
        Some(Self { folder, images })
    }

    pub fn archive(&self) -> PathBuf {
        self.folder.path().join("image.tar")
    }

    pub fn take_in(&self, sample: &Sample) -> Result<(Image, Vec<String>), ImageError> {
        sample.write(&self.archive());
        self.take(&self.archive())
    }

    pub fn take(&self, archive: &Path) -> Result<(Image, Vec<String>), ImageError> {
        let log = std::cell::RefCell::new(Vec::new());
        let image = self
            .images
            .take_in(archive, &|line| log.borrow_mut().push(line.to_owned()))?;
        Ok((image, log.into_inner()))
    }

    /// Whether nothing is left of what was refused.
    pub fn is_empty(&self) -> bool {
        ["layers", "frames"].iter().all(|name| {
            let entries = std::fs::read_dir(self.folder.path().join("images").join(name));
            entries.map_or(0, Iterator::count) == 0
        })
    }
}

/// The whole chain of an error.
pub fn chain(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A node of its own, for one test.
pub struct Ground {
    pub node: Node,
    pub state: tempfile::TempDir,
    pub id: GuestId,
}

impl Ground {
    pub async fn new() -> Option<Self> {
        if !super::has_binary("atoll-ct") {
            return None;
        }
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let mut settings = Settings::new("n1", state.path());
        settings.bin_dir = super::bin_dir();
        let node = Node::open(settings).await.unwrap();
        let storage = node.settings().storage_dir();
        node.storage().ensure_local(&storage).await.unwrap();
        node.network().ensure().await.unwrap();
        let id = super::guest_number().try_into().unwrap();
        Some(Self { node, state, id })
    }

    pub fn archive(&self, name: &str) -> PathBuf {
        self.state.path().join("storage/template/cache").join(name)
    }

    pub async fn done(&self, upid: Result<Upid, Error>) -> (String, String) {
        let upid = upid.unwrap();
        let status = self.node.tasks().wait(&upid).await.unwrap();
        let log = format!("{:?}", self.node.tasks().log(&upid, 0, 0).unwrap());
        println!("{upid}: {log}");
        (status, log)
    }

    pub async fn create(&self, id: GuestId, params: &[(&str, &str)]) -> (String, String) {
        let all = params
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let created =
            self.node
                .guests()
                .create(GuestKind::Container, id, all.collect(), "root@pam");
        self.done(created).await
    }

    pub async fn act(&self, id: GuestId, action: Action) -> String {
        let upid = self
            .node
            .guests()
            .act(GuestKind::Container, id, action, "root@pam");
        self.done(upid).await.0
    }

    pub fn sh(&self, id: GuestId, script: &str) -> String {
        let output = Command::new(super::bin_dir().join("atoll-ct"))
            .arg("--root")
            .arg(self.state.path().join("run/ct"))
            .args(["exec", &format!("ct-{id}"), "sh", "-c", script])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text + &String::from_utf8_lossy(&output.stderr)
    }
}

/// The host's busybox as an image's lowest layer.
pub fn busybox() -> Option<Vec<u8>> {
    let paths = ["/bin/busybox", "/usr/bin/busybox"];
    let Some(bytes) = paths.iter().find_map(|path| std::fs::read(path).ok()) else {
        println!("ATOLL-SKIP: no busybox here (apt-get install busybox-static)");
        return None;
    };
    let program = Entry {
        mode: 0o755,
        content: &bytes,
        ..file("bin/busybox", "")
    };
    let mut entries = vec![
        folder("bin/"),
        program,
        folder("etc/"),
        folder("proc/"),
        folder("sys/"),
        folder("dev/"),
    ];
    let applets = [
        "sh", "cat", "sleep", "id", "stat", "ls", "true", "false", "touch",
    ];
    let paths: Vec<String> = applets.iter().map(|name| format!("bin/{name}")).collect();
    entries.extend(paths.iter().map(|path| link(path, "busybox")));
    entries.push(file(
        "etc/passwd",
        "root:x:0:0::/:/bin/sh\napp:x:7:8::/srv:/bin/sh\n",
    ));
    entries.push(folder("srv/"));
    Some(layer(&entries))
}
