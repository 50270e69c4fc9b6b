// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The web page in a real browser: the scripts of `api/web/e2e` against nodes of the tests' own.

use std::process::Command;

use atoll_tests::registry::Registry;
use atoll_tests::{daemon, lab, page, skip, tree};
use serde_json::json;

/// A node for the page, or why there cannot be one here.
fn node() -> Result<daemon::Daemon, String> {
    daemon::isolation()?;
    page::browser()?;
    Ok(daemon::Daemon::launch().unwrap())
}

#[test]
fn container_from_the_wizard_to_its_deletion() {
    let node = match node() {
        Ok(node) => node,
        Err(reason) => skip!("{reason}"),
    };
    let Some(registry) = Registry::start(node.command("setpriv")) else {
        return;
    };
    let image = format!("{}/team/app:1", registry.address());
    if let Err(reason) = push_image(&node, &image) {
        skip!("{reason}");
    }
    let template = lab::guest_image().unwrap().join("template.tar.zst");
    let mut script = node.command("node");
    script
        .env("ATOLL_TEMPLATE", template)
        .env("ATOLL_IMAGE", image);
    page::browse(script, node.login(), "run.mjs", "container");
}

/// Brings an image of busybox to a registry in the node's network; why not, where this machine lacks a program.
fn push_image(node: &daemon::Daemon, reference: &str) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(path("root/bin")).unwrap();
    std::fs::copy("/bin/busybox", path("root/bin/busybox"))
        .map_err(|error| format!("/bin/busybox: {error} (apt-get install busybox-static)"))?;
    let run = |command: &mut Command| {
        let output = command.current_dir(directory.path()).output();
        let output = output.map_err(|error| format!("{command:?}: {error}"))?;
        assert!(output.status.success(), "{command:?}: {output:?}");
        Ok::<_, String>(String::from_utf8(output.stdout).unwrap())
    };
    run(Command::new("skopeo").arg("--version"))?;
    run(Command::new("tar").args(["-C", "root", "-cf", "layer.tar", "bin"]))?;
    let digest = run(Command::new("sha256sum").arg("layer.tar"))?;
    // What `docker save` writes, with the least that there has to be.
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Entrypoint": ["/bin/busybox", "sleep", "1000000"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", &digest[..64])] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [], "Layers": ["layer.tar"] }]);
    std::fs::write(path("config.json"), config.to_string()).unwrap();
    std::fs::write(path("manifest.json"), manifest.to_string()).unwrap();
    let parts = ["manifest.json", "config.json", "layer.tar"];
    run(Command::new("tar").args(["-cf", "image.tar"]).args(parts))?;
    let copy = ["copy", "--quiet", "--dest-tls-verify=false"];
    let to = format!("docker://{reference}");
    run(node
        .command("skopeo")
        .args(copy)
        .args(["docker-archive:image.tar", &to]))?;
    Ok(())
}

#[test]
fn machine_from_the_wizard_to_its_deletion() {
    let probed = Command::new(tree::binary("atoll-vmm"))
        .arg("probe")
        .output()
        .unwrap();
    if !probed.status.success() {
        skip!("{}", String::from_utf8_lossy(&probed.stdout).trim());
    }
    let node = match node() {
        Ok(node) => node,
        Err(reason) => skip!("{reason}"),
    };
    let snippets = node.state().join("storage/snippets");
    std::fs::create_dir_all(&snippets).unwrap();
    let extracted = Command::new(tree::binary("atoll-vmm"))
        .args(["probe", "--extract"])
        .arg(snippets.join("probe"))
        .status();
    assert!(extracted.unwrap().success());
    page::browse(node.command("node"), node.login(), "machine.mjs", "machine");
}
