// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The web page in a real browser: `api/web/e2e/run.mjs` against a node of the test's own. Its pictures are kept in
//! `target/test/web`.

use std::process::Command;

use atoll_tests::{daemon, lab, skip, tree};

const CHROMIUM: &str = "/usr/bin/chromium";

#[test]
fn container_from_the_wizard_to_its_deletion() {
    if let Err(reason) = daemon::isolation() {
        skip!("{reason}");
    }
    if let Err(error) = Command::new(CHROMIUM).arg("--version").output() {
        skip!("{CHROMIUM}: {error}");
    }
    let page = tree::root().join("api/web");
    assert!(
        page.join("node_modules").exists() && page.join("dist/index.html").exists(),
        "the page is not built: run npm ci && npm run build in api/web"
    );
    let template = lab::guest_image().unwrap().join("template.tar.zst");
    let pictures = tree::bin_dir().join("../test/web");
    let node = daemon::Daemon::launch().unwrap();
    let status = node
        .command("node")
        .arg(page.join("e2e/run.mjs"))
        .env("ATOLL_URL", &node.login().url)
        .env("ATOLL_USER", &node.login().username)
        .env("ATOLL_PASSWORD", &node.login().password)
        .env("ATOLL_TEMPLATE", template)
        .env("ATOLL_E2E_OUTPUT", pictures)
        .env("CHROMIUM", CHROMIUM)
        .status()
        .unwrap();
    assert!(status.success(), "a step failed, see above");
}
