// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The rig itself: a host resumes, has KVM, its own name, and sees its payload.

use std::time::Duration;

use atoll_tests::lab;

#[test]
fn host_resumes_with_kvm_and_payload() {
    let work = lab::Scratch::new_in(&std::env::temp_dir()).unwrap();
    let payload = tempfile::tempdir().unwrap();
    std::fs::write(payload.path().join("hello"), "from the outside").unwrap();
    let hosts = lab::start(&lab::Settings {
        host_count: 1,
        memory_mib: lab::MEMORY_MIB,
        kernel: lab::HostKernel::Suite,
        payload: Some(payload.path()),
        directory: work.path().to_owned(),
        api: None,
    })
    .unwrap();
    let text = hosts[0]
        .check(
            "test -c /dev/kvm && hostname && cat /payload/hello",
            Duration::from_secs(60),
        )
        .unwrap();
    assert_eq!(text, "node1\nfrom the outside");
}
