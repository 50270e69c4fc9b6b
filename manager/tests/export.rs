// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Images written to archives of both forms: digests, what other programs read, and what is taken in again.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_manager::guest::Action;
use atoll_manager::guest::container::export::{Export, From};
use atoll_manager::id::GuestKind;
use atoll_manager::oci::ImageError;
use atoll_manager::oci::digest::Digest;
use atoll_manager::oci::export::{Exported, Form, Source, Watch};
use serde_json::json;
use world::ground::{Ground, Place, busybox, chain};
use world::image::{Entry, Sample, file, folder, hard_link, layer, link};

const FORMS: [Form; 2] = [Form::Oci, Form::Docker];

fn try_export(
    place: &Place,
    source: &Source,
    form: Form,
    to: &Path,
) -> Result<Exported, ImageError> {
    let watch = Watch {
        log: &|line| println!("{line}"),
        is_stopped: &|| false,
    };
    let file = std::fs::File::create(to).unwrap();
    place.images.export(source, form, file, &watch)
}

#[track_caller]
fn export(place: &Place, source: &Source, form: Form, to: &Path) -> Exported {
    let exported = try_export(place, source, form, to)
        .map_err(|e| chain(&e))
        .unwrap();
    assert_eq!(exported.bytes, std::fs::metadata(to).unwrap().len());
    exported
}

/// A layer with what a tar may have: long names, attributes, links, and files of awkward lengths.
fn rich() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut append = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_000_000_001);
        header.set_username("somebody").unwrap();
        tar.append_data(&mut header, name, content).unwrap();
    };
    for size in [0, 1, 511, 512, 513, 70_000, 1 << 20] {
        append(&format!("data/{size}"), &vec![b'x'; size]);
    }
    append(&format!("data/{}", "long/".repeat(40)), b"of a long name");
    let attribute = ("SCHILY.xattr.user.color", b"blue".as_slice());
    tar.append_pax_extensions([attribute]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.set_mode(0o4755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    tar.append_data(&mut header, "program", b"text".as_slice())
        .unwrap();
    // What follows an archive's end belongs to the layer's digest, too.
    let mut bytes = tar.into_inner().unwrap();
    bytes.extend([0; 8192]);
    bytes
}

fn sample() -> (Sample, Vec<Vec<u8>>) {
    let layers = vec![
        rich(),
        layer(&[
            folder("usr/lib/"),
            link("lib", "usr/lib"),
            file("lib/through-the-link", "inside"),
            hard_link("again", "usr/lib/through-the-link"),
            Entry {
                kind: tar::EntryType::Char,
                ..file("no-container-has-it", "")
            },
        ]),
        layer(&[file(".wh.program", ""), file("data/.wh..wh..opq", "")]),
        layer(&[]),
        layer(&[]),
    ];
    (Sample::new(&layers, json!({ "Cmd": ["/bin/sh"] })), layers)
}

#[test]
fn every_form_has_the_image_that_went_in() {
    let Some(place) = Place::new() else { return };
    let (sample, layers) = sample();
    let path = |name: &str| place.folder.path().join(name);
    let (oci, docker) = (path("in-oci.tar"), path("in-docker.tar"));
    sample.write(&oci);
    sample.write_docker(&docker, &layers);
    let (kept, _) = place.take(&oci).unwrap();
    let id = Digest::of(sample.configuration.to_string().as_bytes());
    let sources = [
        Source::Archive(oci),
        Source::Archive(docker),
        Source::Kept(kept.digest.clone()),
    ];
    for (n, source) in sources.iter().enumerate() {
        for form in FORMS {
            let out = path(&format!("out-{n}-{form:?}.tar"));
            let exported = export(&place, source, form, &out);
            assert_eq!(exported.id, id, "{source:?} {form:?}");
            let again = path("again.tar");
            assert_eq!(export(&place, source, form, &again), exported);
            let same = std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap();
            assert!(same, "the same image gives the same bytes");
            let other = Place::new().unwrap();
            let (image, _) = other.take(&out).map_err(|e| chain(&e)).unwrap();
            assert_eq!(image.layers, kept.layers, "each was checked by its digest");
            assert_eq!(image.configuration, kept.configuration);
            assert_eq!(other.images.layers(&image).len(), layers.len());
            match exported.manifest {
                Some(manifest) => assert_eq!(image.digest, manifest),
                None => assert_eq!(image.digest, id),
            }
        }
    }
    // Blob for blob.
    let exported = export(&place, &sources[0], Form::Oci, &path("blobs.tar"));
    assert_eq!(exported.manifest, Some(kept.digest));
    let mut tar = tar::Archive::new(std::fs::File::open(path("blobs.tar")).unwrap());
    let names = tar.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        entry.path().unwrap().display().to_string()
    });
    let names: Vec<String> = names.collect();
    for (digest, _) in sample.all() {
        let blob = digest.replace("sha256:", "blobs/sha256/");
        assert_eq!(
            names.iter().filter(|name| **name == blob).count(),
            1,
            "{names:?}"
        );
    }
}

#[test]
fn what_is_not_as_it_was_is_not_written() {
    let Some(place) = Place::new() else { return };
    let (image, _) = place.take_in(&sample().0).unwrap();
    let kept = Source::Kept(image.digest.clone());
    let out = place.folder.path().join("out.tar");
    let refusal =
        |source: &Source| chain(&try_export(&place, source, Form::Oci, &out).unwrap_err());
    let lowest = place.images.layers(&image).pop().unwrap();
    std::fs::write(lowest.join("data/513"), "y".repeat(513)).unwrap();
    assert!(refusal(&kept).contains("is not any more what it was"));
    std::fs::write(lowest.join("data/513"), "x".repeat(513)).unwrap();
    export(&place, &kept, Form::Oci, &out);
    std::fs::remove_file(lowest.join("data/513")).unwrap();
    assert!(refusal(&kept).contains("No such file"));
    std::fs::write(lowest.join("data/513"), "x".repeat(513)).unwrap();
    // As it was before frames were kept: the image brings them when it is taken in again.
    let frames = place.folder.path().join("images/frames");
    std::fs::remove_dir_all(&frames).unwrap();
    assert!(refusal(&kept).contains("take its image in again"));
    let (_, log) = place.take(&place.archive()).unwrap();
    let here = log.iter().filter(|line| line.contains("is here already"));
    assert_eq!(here.count(), 1, "the last one is there twice: {log:?}");
    export(&place, &kept, Form::Docker, &out);
    let stopped = Watch {
        log: &|_| {},
        is_stopped: &|| true,
    };
    let file = std::fs::File::create(&out).unwrap();
    let end = place.images.export(&kept, Form::Oci, file, &stopped);
    assert!(matches!(end, Err(ImageError::Interrupted)), "{end:?}");
    place.images.prune(&Default::default()).unwrap();
    assert!(place.is_empty(), "frames go with their layers");
    refusal(&kept);
    assert!(refusal(&Source::Archive(frames)).contains("images/frames"));
}

/// What skopeo says. `None` where it is not installed.
fn skopeo(arguments: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("skopeo")
        .arg("--insecure-policy")
        .args(arguments)
        .output()
    else {
        println!("ATOLL-SKIP: no skopeo here (apt-get install skopeo)");
        return None;
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// podman's storage in a folder, without a network.
fn podman(folder: &Path, arguments: &[&str]) -> Option<String> {
    let at = |name: &str| folder.join(name).display().to_string();
    let [root, run, temporary] = [at("podman"), at("podman-run"), at("podman-tmp")];
    let places = ["--root", &root, "--runroot", &run, "--tmpdir", &temporary];
    let mut command = Command::new("podman");
    command
        .args(places)
        .args(["--storage-driver", "vfs"])
        .args(arguments);
    let Ok(output) = command.output() else {
        println!("ATOLL-SKIP: no podman here (apt-get install podman)");
        return None;
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn podman_loads_both_forms() {
    let (Some(place), Some(lowest)) = (Place::new(), busybox()) else {
        return;
    };
    let top = layer(&[file("srv/version", "one\n")]);
    let sample = Sample::new(&[lowest, top], json!({ "Cmd": ["/bin/sh"] }));
    let (image, _) = place.take_in(&sample).unwrap();
    for form in FORMS {
        let out = place.folder.path().join("out.tar");
        let exported = export(&place, &Source::Kept(image.digest.clone()), form, &out);
        let folder = tempfile::tempdir().unwrap();
        let input = ["load", "--quiet", "--input", out.to_str().unwrap()];
        if podman(folder.path(), &input).is_none() {
            return;
        }
        let listed = podman(folder.path(), &["images", "--quiet", "--no-trunc"]).unwrap();
        assert_eq!(listed.trim(), exported.id.to_string());
        let mounted = ["image", "mount", exported.id.hex()];
        let root = podman(folder.path(), &mounted).unwrap();
        let version = std::fs::read_to_string(Path::new(root.trim()).join("srv/version"));
        assert_eq!(version.unwrap(), "one\n");
        podman(folder.path(), &["image", "unmount", exported.id.hex()]).unwrap();
    }
}

#[test]
fn skopeo_reads_and_copies_both_forms() {
    let Some(place) = Place::new() else { return };
    let (sample, _) = sample();
    let (image, _) = place.take_in(&sample).unwrap();
    let sources = [
        Source::Archive(place.archive()),
        Source::Kept(image.digest.clone()),
    ];
    for (source, form) in sources.iter().flat_map(|s| FORMS.map(|form| (s, form))) {
        let out = place.folder.path().join("out.tar");
        let exported = export(&place, source, form, &out);
        let (name, reverse) = match form {
            Form::Oci => ("oci-archive", "docker-archive"),
            Form::Docker => ("docker-archive", "oci-archive"),
        };
        let reference = format!("{name}:{}", out.display());
        let Some(text) = skopeo(&["inspect", &reference]) else {
            return;
        };
        let said: serde_json::Value = serde_json::from_str(&text).unwrap();
        if let Some(manifest) = exported.manifest {
            assert_eq!(said["Digest"], manifest.to_string());
        }
        let text = skopeo(&["inspect", "--config", "--raw", &reference]).unwrap();
        assert_eq!(text, sample.configuration.to_string(), "the image's id");
        let copied = place.folder.path().join("copied.tar");
        let to = format!("{reverse}:{}", copied.display());
        skopeo(&["copy", "--quiet", &reference, &to]).unwrap();
        let other = Place::new().unwrap();
        let (again, _) = other.take(&copied).map_err(|e| chain(&e)).unwrap();
        assert_eq!(again.layers, image.layers, "{source:?} {form:?}");
        std::fs::remove_file(copied).unwrap();
    }
}

#[test]
fn the_image_of_a_container_becomes_a_template() {
    world::isolated("the_image_of_a_container_becomes_a_template", async || {
        let (Some(ground), Some(lowest)) = (Ground::new().await, busybox()) else {
            return;
        };
        let top = layer(&[file("srv/version", "one\n")]);
        let run = json!({ "Cmd": ["/bin/sleep", "1000"], "Env": ["PATH=/bin"] });
        Sample::new(&[lowest, top], run).write(&ground.archive("one.tar"));
        let params = |template: &'static str| {
            [
                ("ostemplate", template),
                ("rootfs", "local:0.0625"),
                ("memory", "64"),
            ]
        };
        let made = ground
            .create(ground.id, &params("local:vztmpl/one.tar"))
            .await;
        assert_eq!(made.0, "OK");
        let export = async |from: From, to: &str| {
            let export = Export {
                from,
                form: Form::Docker,
                to: to.parse().unwrap(),
            };
            ground
                .done(ground.node.guests().export_image(export, "root@pam"))
                .await
        };
        // The archive that it came from is not needed.
        std::fs::remove_file(ground.archive("one.tar")).unwrap();
        let out = "local:vztmpl/out.tar";
        let (status, log) = export(From::Container(ground.id), out).await;
        assert!(
            status == "OK" && log.contains("layer 2 of 2"),
            "{status} {log}"
        );
        let (status, _) = export(From::Container(ground.id), out).await;
        assert!(status.contains("refusing to override"), "{status}");
        let none = "local:vztmpl/other.tar";
        let (status, _) = export(From::Archive("local:iso/x.iso".parse().unwrap()), none).await;
        assert!(status.contains("is no OCI image"), "{status}");
        let left: Vec<PathBuf> = std::fs::read_dir(ground.archive("").as_path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(left, [ground.archive("out.tar")]);
        let second = (u32::from(ground.id) + 1).try_into().unwrap();
        let (status, log) = ground.create(second, &params("local:vztmpl/out.tar")).await;
        assert_eq!(status, "OK");
        assert_eq!(
            log.matches("is here already").count(),
            2,
            "layers are shared"
        );
        let act = |action| {
            let guests = ground.node.guests();
            guests.act(GuestKind::Container, second, action, "root@pam")
        };
        assert_eq!(ground.done(act(Action::Start)).await.0, "OK");
        assert_eq!(ground.sh(second, "cat /srv/version"), "one\n");
        assert_eq!(ground.done(act(Action::Stop)).await.0, "OK");
        ground.node.network().teardown().await.unwrap();
    });
}
