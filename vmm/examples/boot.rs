// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Boots a guest with the crate, without the command: `cargo run -p atoll-vmm --example boot [KERNEL [INITRD]]`.
//! Without arguments it boots the probe guest, which prints a report and powers off.

use std::path::PathBuf;

use anyhow::Context;
use atoll_vmm::machine::{self, Options};
use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm_protocol::spec::{BootSpec, ConsoleSpec, KernelSpec, MachineSpec};

#[expect(clippy::print_stderr, reason = "an example talks")]
fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("temporary directory")?;
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let kernel = match arguments.next() {
        Some(path) => path,
        None => {
            let path = folder.path().join("probe.elf");
            std::fs::write(&path, PROBE_ELF).context("write the probe guest")?;
            path
        }
    };
    let spec = MachineSpec {
        name: "example".to_owned(),
        cpu_count: 2,
        memory_mib: 256,
        serial: ConsoleSpec::Stdio,
        ..MachineSpec::new(BootSpec::Kernel(KernelSpec {
            image: kernel,
            initrd: arguments.next(),
            cmdline: "console=ttyS0".to_owned(),
            shared: false,
        }))
    };
    let outcome = machine::run_machine(&spec, &Options::default())?;
    eprintln!("the guest ended: {outcome:?}");
    Ok(())
}
