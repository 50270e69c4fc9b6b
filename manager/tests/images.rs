// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! OCI images: archives honest and hostile, a registry on the loopback, and real containers that share layers.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

#[path = "../../tests/src/registry.rs"]
mod registry;
mod world;

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_manager::guest::container::renew::{self, Renew};
use atoll_manager::guest::{Action, Ask};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::oci;
use atoll_manager::task::fault;
use registry::Registry;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use world::ground::{Ground, Place, busybox, chain};
use world::image::{Entry, Sample, file, folder, hard_link, layer, link, write_tar};

#[test]
fn layers_become_folders_of_overlayfs() {
    let Some(place) = Place::new() else { return };
    let lower = layer(&[
        folder("etc/"),
        Entry {
            owner: (5, 6),
            mode: 0o4755,
            ..file("etc/program", "text")
        },
        hard_link("etc/same", "etc/program"),
        link("lib", "usr/lib"),
        folder("usr/lib/"),
        file("lib/through-the-link", "inside"),
        file("a/b/c", "parents are made"),
    ]);
    let upper = layer(&[
        file("etc/.wh.program", ""),
        folder("etc/new/"),
        file("etc/new/.wh..wh..opq", ""),
        file("etc/.wh..wh.plnk", "AUFS"),
    ]);
    let (image, log) = place
        .take_in(&Sample::new(&[lower.clone(), upper], json!({})))
        .unwrap();
    assert_eq!(log.len(), 2);
    let folders = place.images.layers(&image);
    let at = |layer: usize, path: &str| folders[layer].join(path);
    let program = std::fs::metadata(at(1, "etc/program")).unwrap();
    assert_eq!(
        (program.uid(), program.gid(), program.mode() & 0o7777),
        (5, 6, 0o4755)
    );
    assert_eq!((program.nlink(), program.mtime()), (2, 1_000_000_000));
    assert_eq!(
        std::fs::read_to_string(at(1, "usr/lib/through-the-link")).unwrap(),
        "inside"
    );
    assert_eq!(
        std::fs::read_to_string(at(1, "a/b/c")).unwrap(),
        "parents are made"
    );
    let gone = std::fs::metadata(at(0, "etc/program")).unwrap();
    assert!(
        gone.file_type().is_char_device() && gone.rdev() == 0,
        "a whiteout"
    );
    let mut mark = [0; 8];
    let length =
        rustix::fs::getxattr(at(0, "etc/new"), "trusted.overlay.opaque", &mut mark).unwrap();
    assert_eq!(&mark[..length], b"y");
    assert_eq!(
        std::fs::read_dir(at(0, "etc")).unwrap().count(),
        2,
        "AUFS's own is left out"
    );

    let again = Sample::new(&[lower, layer(&[file("x", "another")])], json!({}));
    let (other, log) = place.take_in(&again).unwrap();
    assert!(log[0].ends_with("is here already"), "{log:?}");
    assert_eq!(place.images.get(&other.digest).unwrap(), other);
    let kept = BTreeSet::from([other.digest.clone()]);
    assert_eq!(
        place.images.prune(&kept).unwrap(),
        1,
        "the shared layer stays"
    );
    assert!(
        place.images.get(&image.digest).is_err() && folders[1].exists() && !folders[0].exists()
    );
}

#[test]
fn archives_of_docker_and_other_packings() {
    let Some(place) = Place::new() else { return };
    let layers = [layer(&[file("a", "1")]), layer(&[file("b", "2")])];
    let sample = Sample::new(&layers, json!({ "Cmd": ["/a"] }));
    sample.write_docker(&place.archive(), &layers);
    let (image, _) = place.take(&place.archive()).unwrap();
    assert_eq!(
        (image.name.as_deref(), image.layers.len()),
        (Some("app:1"), 2)
    );
    assert_eq!(image.run.command(), ["/a"]);
    // Docker packs with zstd when it is asked to.
    let mut packed = Sample::new(&[layer(&[file("z", "zstd")])], json!({}));
    let plain = place.folder.path().join("layer");
    std::fs::write(&plain, layer(&[file("z", "zstd")])).unwrap();
    match Command::new("zstd").args(["-q", "-c"]).arg(&plain).output() {
        Ok(output) if output.status.success() => {
            packed.blobs[0] = output.stdout;
            packed.describe();
            let (image, _) = place.take_in(&packed).unwrap();
            assert!(place.images.layers(&image)[0].join("z").exists());
        }
        _ => println!("ATOLL-SKIP: no zstd here (apt-get install zstd)"),
    }
}

/// Takes in a layer that must not reach beyond its folder.
#[track_caller]
fn check_confined(entries: &[Entry<'_>]) {
    let Some(place) = Place::new() else { return };
    let outside = Path::new("/tmp/atoll-outside");
    let before = outside.exists();
    let _ = place.take_in(&Sample::new(&[layer(entries)], json!({})));
    assert_eq!(outside.exists(), before);
    let made: Vec<_> = std::fs::read_dir(place.folder.path()).unwrap().collect();
    assert_eq!(
        made.len(),
        2,
        "nothing beside the archive and the images: {made:?}"
    );
}

#[test]
fn hostile_layers_stay_inside() {
    let up = "../../../../../../../../tmp/atoll-outside";
    check_confined(&[file(up, "x")]);
    check_confined(&[file("a/../../../../../../../../tmp/atoll-outside", "x")]);
    check_confined(&[file("/tmp/atoll-outside", "x")]);
    check_confined(&[link("tmp", "/tmp"), file("tmp/atoll-outside", "x")]);
    check_confined(&[
        link("up", "../../../../../../../.."),
        file("up/tmp/atoll-outside", "x"),
    ]);
    check_confined(&[
        link("x", "/tmp/atoll-outside"),
        file("x", "through a last link"),
    ]);
    check_confined(&[
        link("d", "/tmp"),
        folder("d/"),
        file("d/atoll-outside", "x"),
    ]);
    check_confined(&[folder("a/"), link("a/b", "../.."), file("a/b/file", "x")]);
    check_confined(&[
        link("p", "/proc/self/root/tmp"),
        file("p/atoll-outside", "x"),
    ]);
    check_confined(&[file("../.wh.image.tar", "")]);
    let Some(place) = Place::new() else { return };
    for entries in [
        vec![file("../x", "x")],
        vec![hard_link("x", "../../image.tar")],
        vec![link("out", "/etc"), hard_link("x", "out/passwd")],
        vec![file("a/.wh...", "")],
        vec![file("a/.wh.", "")],
    ] {
        let error = place
            .take_in(&Sample::new(&[layer(&entries)], json!({})))
            .unwrap_err();
        assert!(place.is_empty(), "{error}");
    }
    // A device is left out, and what a layer replaces is not followed.
    let device = Entry {
        kind: tar::EntryType::Char,
        ..file("null", "")
    };
    let twice = [
        link("f", "g"),
        file("f", "a file now"),
        file("f", "again"),
        device,
    ];
    let (image, _) = place
        .take_in(&Sample::new(&[layer(&twice)], json!({})))
        .unwrap();
    let folder = &place.images.layers(&image)[0];
    assert_eq!(std::fs::read_to_string(folder.join("f")).unwrap(), "again");
    assert!(!folder.join("null").exists() && !folder.join("g").exists());
}

#[track_caller]
fn check_refused(named: &str, change: impl FnOnce(&mut Sample)) {
    let Some(place) = Place::new() else { return };
    let mut sample = Sample::new(&[layer(&[file("a", "1")])], json!({}));
    change(&mut sample);
    let error = chain(&place.take_in(&sample).unwrap_err());
    assert!(error.contains(named), "{error}");
    assert!(place.is_empty());
}

#[test]
fn wrong_images_are_refused() {
    let other = layer(&[file("a", "2")]);
    check_refused("expected sha256:", |sample| {
        sample.blobs[0] = world::image::gzip(&other)
    });
    check_refused("expected sha256:", |sample| {
        // The packed bytes are those of the manifest, the unpacked ones not those of the configuration.
        sample.blobs[0] = world::image::gzip(&other);
        sample.describe();
    });
    check_refused("layer", |sample| {
        let half = sample.blobs[0].len() / 2;
        sample.blobs[0].truncate(half);
        sample.describe();
    });
    check_refused("not for linux on amd64", |sample| {
        sample.configuration["architecture"] = json!("arm64");
        sample.describe();
    });
    check_refused("0 layers", |sample| {
        sample.configuration["rootfs"]["diff_ids"] = json!([]);
        sample.describe();
    });
    check_refused("different numbers", |sample| {
        sample.manifest["layers"] = json!([]);
    });
    check_refused("no sha256 digest", |sample| {
        sample.configuration["rootfs"]["diff_ids"][0] = json!("sha256:../../../../etc");
        sample.describe();
    });
    let Some(place) = Place::new() else { return };
    for (name, text, named) in [
        ("x", "", "neither index.json nor manifest.json"),
        ("index.json", "{", "parse index.json"),
        ("index.json", r#"{"manifests":[]}"#, "not there for linux"),
        ("manifest.json", "[]", "exactly one image"),
        (
            "manifest.json",
            r#"[{"Config":"none","Layers":[]}]"#,
            "none is missing",
        ),
    ] {
        write_tar(
            &place.archive(),
            &[(name.to_owned(), text.as_bytes().to_vec())],
        );
        let error = chain(&place.take(&place.archive()).unwrap_err());
        assert!(error.contains(named), "{error}");
    }
    std::fs::write(
        place.archive(),
        "this is no tar at all, but long enough for one".repeat(40),
    )
    .unwrap();
    place.take(&place.archive()).unwrap_err();
}

/// Brings an image there under a name: every blob, then the manifest.
async fn push(registry: &Registry, name: &str, tag: &str, sample: &Sample) {
    let client = reqwest::Client::new();
    let base = format!("http://{}/v2/{name}", registry.address());
    let mut all = sample.all();
    let (_, manifest) = all.pop().unwrap();
    for (digest, bytes) in all {
        let begun = client
            .post(format!("{base}/blobs/uploads/"))
            .send()
            .await
            .unwrap();
        let place = begun.headers()["location"].to_str().unwrap().to_owned();
        let mark = if place.contains('?') { '&' } else { '?' };
        let put = client
            .put(format!("{place}{mark}digest={digest}"))
            .body(bytes)
            .send()
            .await;
        assert!(put.unwrap().status().is_success());
    }
    let put = client
        .put(format!("{base}/manifests/{tag}"))
        .header(
            "content-type",
            sample.manifest["mediaType"].as_str().unwrap(),
        )
        .body(manifest)
        .send()
        .await;
    assert!(put.unwrap().status().is_success());
}

fn reference(registry: &Registry, name: &str) -> oci_client::Reference {
    oci::registry::reference(&format!("{}/{name}", registry.address())).unwrap()
}

/// How the test's images run.
fn run() -> Value {
    json!({
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["trap 'exit 0' TERM; while :; do sleep 1 & wait; done"],
        "Env": ["PATH=/bin", "COLOR=blue green"],
        "User": "app",
        "WorkingDir": "/srv",
        "ExposedPorts": { "80/tcp": {} },
        "Volumes": { "/data": {} },
    })
}

#[test]
fn images_of_a_registry_run_and_share_their_layers() {
    world::isolated(
        "images_of_a_registry_run_and_share_their_layers",
        async || {
            let (Some(ground), Some(lowest)) = (Ground::new().await, busybox()) else {
                return;
            };
            world::run("ip", &["link", "set", "dev", "lo", "up"]);
            let Some(registry) = Registry::start(Command::new("setpriv")) else {
                return;
            };
            let sample = |text: &str| {
                let top = layer(&[file("srv/version", text), file("srv/.wh.none", "")]);
                Sample::new(&[lowest.clone(), top], run())
            };
            push(&registry, "team/app", "1", &sample("one\n")).await;
            push(&registry, "team/app", "2", &sample("two\n")).await;
            let tags = oci::registry::tags(&reference(&registry, "team/app:1"))
                .await
                .unwrap();
            assert_eq!(tags, ["1", "2"]);
            std::fs::create_dir_all(ground.archive("x").parent().unwrap()).unwrap();
            for tag in ["1", "2"] {
                let path = ground.archive(&format!("app_{tag}.tar"));
                std::fs::File::create(&path).unwrap();
                let reference = reference(&registry, &format!("team/app:{tag}"));
                let log = |line: &str| println!("{line}");
                oci::registry::pull(&reference, &path, 1 << 30, &log)
                    .await
                    .unwrap();
            }
            let (first, second) = (ground.id, (u32::from(ground.id) + 1).try_into().unwrap());
            for (id, tag) in [(first, "1"), (second, "2")] {
                let template = format!("local:vztmpl/app_{tag}.tar");
                let network = "name=eth0,bridge=vmbr0,ip=10.64.0.10/24,gw=10.64.0.1";
                let mut params = vec![
                    ("ostemplate", template.as_str()),
                    ("rootfs", "local:0.0625"),
                    ("memory", "64"),
                ];
                params.extend(
                    [("hostname", "box"), ("net0", network)]
                        .into_iter()
                        .filter(|_| id == first),
                );
                let (status, log) = ground.create(id, &params).await;
                assert_eq!(status, "OK");
                assert_eq!(log.contains("is here already"), id == second, "{log}");
                assert!(log.contains("/data is meant to outlive"));
            }
            let layers = std::fs::read_dir(ground.state.path().join("images/layers")).unwrap();
            assert_eq!(
                layers.count(),
                3,
                "two images of two layers, one of them shared"
            );
            inside(&ground, &registry, first, second).await;
            tampered(&ground, &registry).await;
            ground.node.network().teardown().await.unwrap();
        },
    );
}

async fn inside(ground: &Ground, registry: &Registry, first: GuestId, second: GuestId) {
    for id in [first, second] {
        assert_eq!(ground.act(id, Action::Start).await, "OK");
    }
    let site = ground.node.guests().site();
    let config = site.seat(GuestKind::Container, first).config().unwrap();
    let image = config.get("image").unwrap();
    let named = format!("name={}/team/app:1,ports=80/tcp", registry.address());
    assert!(image.contains(&named), "{image}");
    assert_eq!(ground.sh(first, "cat /srv/version"), "one\n");
    assert_eq!(ground.sh(second, "cat /srv/version"), "two\n");
    assert_eq!(
        ground.sh(first, "cat /proc/1/cmdline").split('\0').next(),
        Some("/bin/sh")
    );
    assert!(
        ground
            .sh(first, "cat /proc/1/environ")
            .contains("COLOR=blue green\0")
    );
    assert_eq!(
        ground.sh(first, "stat -c %u:%g /proc/1; cat /etc/hostname"),
        "7:8\nbox\n"
    );
    assert!(
        ground
            .sh(first, "cat /etc/hosts")
            .contains("10.64.0.10 box")
    );
    assert_eq!(ground.sh(first, "stat -c %u:%g /bin/busybox"), "0:0\n");
    world::until("an answer from 10.64.0.10", || {
        let ping = ["ping", "-c1", "-W1", "10.64.0.10"];
        let output = Command::new("busybox").args(ping).output();
        output.is_ok_and(|output| output.status.success())
    });
    writes(ground, first, second).await;
    ends(ground, first, second).await;
}

/// What one changes, the other does not see, and its next run does.
async fn writes(ground: &Ground, first: GuestId, second: GuestId) {
    let init = ground
        .node
        .guests()
        .status(GuestKind::Container, first)
        .await
        .unwrap()
        .pid
        .unwrap();
    let root = PathBuf::from(format!("/proc/{init}/root/srv/written"));
    let ids = std::fs::metadata(format!("/proc/{init}/root/bin")).unwrap();
    assert!(ids.uid() > 1_000_000, "on the host a range of its own");
    let made = world::bin_dir().join("atoll-ct");
    let run = ground.state.path().join("run/ct");
    let exec = [
        "exec",
        "--user",
        "0",
        &format!("ct-{first}"),
        "touch",
        "/srv/written",
    ];
    let status = Command::new(made)
        .arg("--root")
        .arg(run)
        .args(exec)
        .status()
        .unwrap();
    assert!(status.success() && root.exists());
    assert!(
        ground
            .sh(second, "ls /srv/written")
            .contains("No such file")
    );
    let ask = Ask {
        timeout: world::PATIENCE,
        force: false,
    };
    assert_eq!(
        ground.act(first, Action::Shutdown(ask)).await,
        "OK",
        "it obeys SIGTERM"
    );
    assert_eq!(ground.act(first, Action::Start).await, "OK");
    assert_eq!(ground.sh(first, "ls /srv/written"), "/srv/written\n");
}

/// They end, and the layers go with the last container that has them.
async fn ends(ground: &Ground, first: GuestId, second: GuestId) {
    for id in [first, second] {
        assert_eq!(ground.act(id, Action::Stop).await, "OK");
    }
    let layers = ground.state.path().join("images/layers");
    for left in [2, 0] {
        let id = if left == 2 { second } else { first };
        let gone = ground
            .node
            .guests()
            .destroy(GuestKind::Container, id, false, "root@pam");
        assert_eq!(ground.done(gone).await.0, "OK");
        let count = std::fs::read_dir(&layers).unwrap().count();
        assert_eq!(
            count, left,
            "layers go with the last container that has them"
        );
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains("overlay") || !mounts.contains(&format!("ct-{first}")),
        "{mounts}"
    );
}

/// A registry that gives other bytes than it announces is not believed.
async fn tampered(ground: &Ground, registry: &Registry) {
    let blobs = registry.data().join("docker/registry/v2/blobs/sha256");
    let found = world::run(
        "find",
        &[blobs.to_str().unwrap(), "-name", "data", "-size", "+100k"],
    );
    let data = Path::new(found.lines().next().unwrap());
    let mut bytes = std::fs::read(data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(data, bytes).unwrap();
    let path = ground.archive("tampered.tar");
    std::fs::File::create(&path).unwrap();
    let pulled =
        oci::registry::pull(&reference(registry, "team/app:1"), &path, 1 << 30, &|_| {}).await;
    let error = pulled.unwrap_err().chain();
    assert!(error.contains("pull sha256:"), "{error}");
    let absent =
        oci::registry::pull(&reference(registry, "team/none:1"), &path, 1 << 30, &|_| {}).await;
    absent.unwrap_err();
    let full = oci::registry::pull(&reference(registry, "team/app:2"), &path, 1000, &|_| {}).await;
    assert!(full.unwrap_err().to_string().contains("not room"));
}

/// An image whose health command succeeds as `healthy` says, and which tells its version.
fn checked(lowest: &[u8], version: &str, healthy: &str) -> Sample {
    let top = layer(&[file("srv/version", version)]);
    let mut run = run();
    run["User"] = json!("");
    run["Healthcheck"] = json!({
        "Test": ["CMD", "/bin/sh", "-c", healthy], "Interval": 1_000_000_000_u64, "Retries": 1,
    });
    run["Env"] = json!(["PATH=/bin", format!("VERSION={version}")]);
    Sample::new(&[lowest.to_vec(), top], run)
}

#[test]
fn an_image_is_exchanged_or_everything_stays() {
    world::isolated("an_image_is_exchanged_or_everything_stays", async || {
        let (Some(ground), Some(lowest)) = (Ground::new().await, busybox()) else {
            return;
        };
        for (name, version, healthy) in [
            ("one", "1", "true"),
            ("two", "2", "true"),
            ("sick", "3", "false"),
        ] {
            checked(&lowest, version, healthy).write(&ground.archive(&format!("{name}.tar")));
        }
        let id = ground.id;
        let params = [
            ("ostemplate", "local:vztmpl/one.tar"),
            ("rootfs", "local:0.0625"),
            ("mp0", "local:0.0625,mp=/data"),
            ("memory", "64"),
        ];
        assert_eq!(ground.create(id, &params).await.0, "OK");
        assert_eq!(ground.act(id, Action::Start).await, "OK");
        ground.sh(id, "echo kept > /data/file; echo lost > /srv/own");
        let update = async |name: &str| {
            let template = format!("local:vztmpl/{name}.tar");
            ground
                .done(ground.node.guests().update_image(id, &template, "root@pam"))
                .await
        };
        let (status, log) = update("sick").await;
        assert!(
            status.contains("is not healthy") && log.contains("going back"),
            "{status}"
        );
        let seen = "cat /srv/version /srv/own /data/file";
        assert_eq!(ground.sh(id, seen), "1lost\nkept\n", "it runs as it was");
        let site = ground.node.guests().site();
        let config = || site.seat(GuestKind::Container, id).config().unwrap();
        assert!(config().sections.is_empty(), "the snapshot is gone again");
        faults(&ground).await;
        assert_eq!(update("two").await.0, "OK");
        assert_eq!(ground.sh(id, "cat /srv/version /data/file"), "2kept\n");
        assert!(ground.sh(id, "cat /srv/own").contains("No such file"));
        assert!(ground.sh(id, "cat /proc/1/environ").contains("VERSION=2"));
        assert_eq!(config().sections.len(), 1, "the snapshot stays");
        assert!(update("two").await.0.contains("has this image already"));
        let name = config().sections.keys().next().unwrap().clone();
        let back =
            ground
                .node
                .guests()
                .roll_back(GuestKind::Container, id, &name, true, "root@pam");
        assert_eq!(ground.done(back).await.0, "OK");
        assert_eq!(ground.sh(id, seen), "1lost\nkept\n");
        assert_eq!(ground.act(id, Action::Stop).await, "OK");
        ground.node.network().teardown().await.unwrap();
    });
}

/// Every step of the exchange fails: the container runs the old image, with its data, and no snapshot is left.
async fn faults(ground: &Ground) {
    let seat = || {
        ground
            .node
            .guests()
            .site()
            .seat(GuestKind::Container, ground.id)
    };
    let make = async || {
        let template = "local:vztmpl/two.tar".parse().unwrap();
        (ground, Renew::new(seat(), template))
    };
    let look = async |ground: &&Ground| {
        let config = seat().config().unwrap();
        let files = std::fs::read_dir(
            ground
                .state
                .path()
                .join(format!("storage/images/{}", ground.id)),
        );
        (
            ground.sh(ground.id, "cat /srv/version /srv/own /data/file"),
            config.get("image").map(str::to_owned),
            config.sections.len(),
            files.unwrap().count(),
        )
    };
    fault::fails_cleanly(renew::STEPS, make, look).await;
}

#[test]
fn a_container_that_ends_is_started_again() {
    world::isolated("a_container_that_ends_is_started_again", async || {
        let (Some(ground), Some(lowest)) = (Ground::new().await, busybox()) else {
            return;
        };
        checked(&lowest, "1", "true").write(&ground.archive("one.tar"));
        let params = [
            ("ostemplate", "local:vztmpl/one.tar"),
            ("rootfs", "local:0.0625"),
            ("memory", "64"),
            ("restart", "on-failure"),
        ];
        assert_eq!(ground.create(ground.id, &params).await.0, "OK");
        let stop = CancellationToken::new();
        let reconciler = {
            let (node, stop) = (ground.node.clone(), stop.clone());
            tokio::spawn(async move { node.run(stop).await })
        };
        assert_eq!(ground.act(ground.id, Action::Start).await, "OK");
        let pid = async || {
            let status = ground
                .node
                .guests()
                .status(GuestKind::Container, ground.id)
                .await;
            status.unwrap().pid
        };
        let first = pid().await.unwrap();
        world::run("kill", &["-9", &first.to_string()]);
        let deadline = std::time::Instant::now() + world::PATIENCE;
        while pid().await.is_none_or(|pid| pid == first) {
            assert!(std::time::Instant::now() < deadline, "not started again");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        // What is asked to end stays down: its program exits with 0 then, and the policy would not care.
        let ask = Ask {
            timeout: world::PATIENCE,
            force: false,
        };
        assert_eq!(ground.act(ground.id, Action::Shutdown(ask)).await, "OK");
        assert_eq!(pid().await, None);
        stop.cancel();
        reconciler.await.unwrap().unwrap();
        ground.node.network().teardown().await.unwrap();
    });
}
