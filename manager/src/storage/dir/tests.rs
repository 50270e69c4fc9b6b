// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The directory plugin on a real folder, with what an attacker may have planted in it.

use std::os::unix::fs::{MetadataExt, symlink};

use super::*;
use crate::storage::checksum::Checksum;
use crate::storage::incoming::Existing;

fn storage() -> (tempfile::TempDir, Dir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    (folder, Dir { path })
}

fn guest() -> GuestId {
    "100".parse().unwrap()
}

fn iso(name: &str) -> VolumeName {
    VolumeName::file(Content::Iso, name).unwrap()
}

#[tokio::test]
async fn disks_are_sparse_numbered_grown_and_freed() {
    let (_folder, dir) = storage();
    let first = dir.allocate(guest(), 1 << 30, Format::Raw).await.unwrap();
    let second = dir.allocate(guest(), 4096, Format::Raw).await.unwrap();
    assert_eq!(first.to_string(), "100/vm-100-disk-0.raw");
    assert_eq!(second.to_string(), "100/vm-100-disk-1.raw");
    let path = dir.path(&first).await.unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (1 << 30, 0));
    dir.resize(&first, 2 << 30).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 << 30);
    let error = dir.resize(&first, 1 << 30).await.unwrap_err();
    assert_eq!(error.to_string(), "shrinking disks is not supported");
    let listed = dir.list().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[0].size_bytes, listed[0].used_bytes), (2 << 30, 0));
    dir.free(&first).await.unwrap();
    dir.free(&first).await.unwrap();
    assert_eq!(
        dir.allocate(guest(), 4096, Format::Raw).await.unwrap(),
        first,
        "the freed number is used again"
    );
    dir.free(&first).await.unwrap();
    dir.free(&second).await.unwrap();
    assert!(!dir.path.join("images/100").exists());
    assert!(
        dir.path(&first)
            .await
            .unwrap_err()
            .to_string()
            .ends_with("does not exist")
    );
}

#[tokio::test]
async fn qcow2_disks_have_the_size_that_the_guest_sees() {
    let (_folder, dir) = storage();
    let raw = dir.allocate(guest(), 4096, Format::Raw).await.unwrap();
    let disk = dir.allocate(guest(), 1 << 30, Format::Qcow2).await.unwrap();
    assert_eq!(disk.to_string(), "100/vm-100-disk-1.qcow2");
    assert_eq!(dir.size_bytes(&disk).await.unwrap(), 1 << 30);
    dir.resize(&disk, 2 << 30).await.unwrap();
    assert_eq!(dir.size_bytes(&disk).await.unwrap(), 2 << 30);
    let error = dir.resize(&disk, 1 << 30).await.unwrap_err();
    assert_eq!(error.to_string(), "shrinking disks is not supported");
    let listed = dir.list().await.unwrap();
    assert_eq!(
        (listed[1].name.format(), listed[1].size_bytes),
        ("qcow2", 2 << 30)
    );
    assert!(listed[1].used_bytes < 1 << 20);
    dir.free(&raw).await.unwrap();
    dir.free(&disk).await.unwrap();
    assert!(!dir.path.join("images/100").exists());
}

#[tokio::test]
async fn planted_links_lead_nowhere() {
    let (folder, dir) = storage();
    let secret = folder.path().join("secret.iso");
    std::fs::write(&secret, "secret").unwrap();
    std::fs::create_dir_all(dir.path.join("template/iso")).unwrap();
    std::fs::create_dir_all(dir.path.join("images")).unwrap();
    symlink(&secret, dir.path.join("template/iso/x.iso")).unwrap();
    symlink(folder.path(), dir.path.join("images/100")).unwrap();
    std::fs::write(folder.path().join("vm-100-disk-0.raw"), "other").unwrap();
    std::fs::create_dir(dir.path.join("template/iso/folder.iso")).unwrap();

    assert!(dir.path(&iso("x.iso")).await.is_err());
    assert!(dir.path(&iso("folder.iso")).await.is_err());
    assert!(dir.allocate(guest(), 4096, Format::Raw).await.is_err());
    let disk = VolumeName::image(guest(), "disk-0", Format::Raw).unwrap();
    assert!(dir.path(&disk).await.is_err());
    assert!(dir.resize(&disk, 1 << 20).await.is_err());
    assert!(dir.free(&disk).await.is_err());
    assert!(dir.receive(&disk).await.is_err());
    assert_eq!(dir.list().await.unwrap(), []);
    assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
    assert_eq!(
        std::fs::read(folder.path().join("vm-100-disk-0.raw")).unwrap(),
        b"other"
    );
}

#[tokio::test]
async fn uploads_appear_whole_or_not_at_all() {
    let (_folder, dir) = storage();
    let name = iso("x.iso");
    let incoming = dir.receive(&name).await.unwrap();
    std::fs::write(incoming.path(), "abc").unwrap();
    assert_eq!(
        dir.list().await.unwrap(),
        [],
        "unfinished uploads are not listed"
    );
    let wrong = Checksum::new("md5", &"0".repeat(32)).unwrap();
    assert!(
        incoming
            .commit(Some(&wrong), Existing::Replace)
            .await
            .is_err()
    );
    let left = std::fs::read_dir(dir.path.join("template/iso"))
        .unwrap()
        .count();
    assert_eq!(left, 0, "a refused upload leaves nothing behind");

    for (text, existing, kept) in [
        ("one", Existing::Refuse, "one"),
        ("two", Existing::Refuse, "one"),
        ("three", Existing::Replace, "three"),
    ] {
        let incoming = dir.receive(&name).await.unwrap();
        std::fs::write(incoming.path(), text).unwrap();
        let result = incoming.commit(None, existing).await;
        if text == "two" {
            let error = result.unwrap_err().to_string();
            assert!(
                error.starts_with("refusing to override existing file"),
                "{error}"
            );
        } else {
            result.unwrap();
        }
        let path = dir.path(&name).await.unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), kept);
    }
}

#[tokio::test]
async fn two_uploads_of_one_name_do_not_mix() {
    let (_folder, dir) = storage();
    let name = iso("x.iso");
    let (a, b) = (
        dir.receive(&name).await.unwrap(),
        dir.receive(&name).await.unwrap(),
    );
    assert_ne!(a.path(), b.path());
}

#[tokio::test]
async fn space_is_the_file_systems() {
    let (_folder, dir) = storage();
    dir.allocate(guest(), 4096, Format::Raw).await.unwrap();
    let space = dir.space().await.unwrap();
    assert!(space.total_bytes >= space.used_bytes && space.available_bytes > 0);
}
