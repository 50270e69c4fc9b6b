// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `qmstart`: from the config to a process whose vCPUs run.

use std::time::{Duration, Instant};

use atoll_vmm_protocol::api::MachineState;
use atoll_vmm_protocol::spec::MachineSpec;
use rustix::process::Signal;

use crate::error::Error;
use crate::exec::Program;
use crate::guest::site::Seat;
use crate::guest::vm::resolve::{self, Places};
use crate::guest::vm::{Vm, boot, cloud_init, saved};
use crate::guest::{Guest, disks, start};
use crate::network::link;
use crate::process::Process;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// Time that a machine has from its process's start to its first answer; emulated hosts are slow.
const READY_MAX: Duration = Duration::from_secs(60);
/// How often it is asked.
const READY_POLL: Duration = Duration::from_millis(20);
/// Time that a killed process has to be gone.
const KILL_MAX: Duration = Duration::from_secs(10);

/// What the steps hand on.
pub type Start = start::Start<MachineSpec>;

/// The table.
pub const STEPS: &[TaskStep<Start>] = &[
    step!("read the configuration", start::read_config),
    step!("resolve the spec", resolve_spec),
    step!("write the cloud-init drive", write_cloud_init),
    step!("make the run folder", make_folder, undo remove_folder),
    step!("bring the saved memory", bring_saved),
    step!("make the firmware's variables", make_variables),
    step!("create taps", create_taps, undo delete_taps),
    step!("start the process", start_process, undo end_process),
    step!("wait for the machine", await_machine),
];

fn vm(start: &Start) -> Vm {
    Vm::new(start.seat.clone())
}

/// Where things are, volumes left out.
pub fn places(seat: &Seat) -> Places {
    Places {
        run_folder: seat.run_folder(),
        firmware: seat.site.settings.firmware_dir.clone(),
        ..Places::default()
    }
}

async fn resolve_spec(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let config = start.config()?;
    let mut places = places(&start.seat);
    for volume in resolve::volumes(config)? {
        let id: VolumeId = volume.parse().map_err(|e| Error::refused(format!("{e}")))?;
        places
            .volumes
            .insert(volume, start.seat.site.storage.path(&id).await?);
    }
    start.made = Some(resolve::resolve(start.seat.id, config, &places)?);
    Ok(())
}

async fn write_cloud_init(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    if start.saved.is_some() {
        return Ok(()); // The guest has the drive as it was.
    }
    let config = start.config()?;
    for (key, volume) in disks::own_volumes(&start.seat, &config.current.values) {
        if !cloud_init::is_drive(&volume.name) {
            continue;
        }
        let path = start.seat.site.storage.path(&volume).await?;
        let image = cloud_init::image(start.seat.id, config)?;
        task.log(&format!("{key}: writing cloud-init data"));
        tokio::fs::write(&path, image)
            .await
            .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
    }
    Ok(())
}

async fn make_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.make_run_folder().await?;
    let spec =
        serde_json::to_vec_pretty(&start.made).map_err(|e| Error::failed("write the spec", e))?;
    let path = vm(start).spec_file();
    tokio::fs::write(&path, spec)
        .await
        .map_err(|e| Error::failed(format!("write {}", path.display()), e))
}

async fn bring_saved(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let Some(volume) = &start.saved else {
        return Ok(());
    };
    task.log(&format!("going on from {volume}"));
    saved::bring(&start.seat, volume).await
}

/// A guest with firmware and no volume for its variables gets some that last for this run, as in PVE.
async fn make_variables(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let config = start.config()?;
    let is_firmware = boot::way(start.seat.id, config)? == boot::Way::Firmware;
    if !is_firmware || boot::variables(config).is_some() {
        return Ok(());
    }
    task.warn("no efidisk0: boot entries that the guest makes are lost when it stops");
    boot::write_temporary(&start.seat, &places(&start.seat)).await
}

async fn remove_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.remove_run_folder().await
}

async fn create_taps(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for card in resolve::cards(start.seat.id, start.config()?)? {
        link::create_tap(&card.tap, &card.attachment).await?;
    }
    Ok(())
}

async fn delete_taps(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for card in resolve::cards(start.seat.id, start.config()?)? {
        link::delete(&card.tap).await?;
    }
    Ok(())
}

async fn start_process(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let vm = vm(start);
    let mut program = Program::new(start.seat.site.program("atoll-vmm"))
        .arg("run")
        .arg("--spec")
        .arg(vm.spec_file())
        .arg("--api-socket")
        .arg(vm.api_socket());
    if start.saved.is_some() {
        program = program.arg("--restore").arg(saved::folder(&start.seat));
    }
    let child = program.spawn_detached(&vm.log_file())?;
    let pid = child.id().unwrap_or_default();
    let written = tokio::fs::write(vm.pid_file(), format!("{pid}\n")).await;
    if let Err(error) = written {
        // Without the file nobody would find the process again, the undo included.
        if let Some(process) = Process::open(pid) {
            process.signal(Signal::KILL);
        }
        return Err(Error::failed("write the process id", error));
    }
    if let Err(error) = vm.group().adopt(pid) {
        task.warn(&format!("no control group: {error}"));
    }
    Ok(())
}

async fn end_process(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let vm = vm(start);
    if let Some(process) = vm.process() {
        process.signal(Signal::KILL);
        process.ended_before(Instant::now() + KILL_MAX).await;
    }
    vm.group().remove().await;
    Ok(())
}

async fn await_machine(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let vm = vm(start);
    let deadline = Instant::now() + READY_MAX;
    loop {
        let answer = vm.info().await;
        match answer {
            Ok(info) if info.state == MachineState::Running => {
                task.log(&format!("running as process {}", info.pid));
                return Ok(());
            }
            // setsid(1) has not become atoll-vmm yet, or the socket is not there yet.
            Ok(_) | Err(_) if Instant::now() < deadline => {}
            Ok(info) => return Err(Error::refused(format!("the machine is {:?}", info.state))),
            Err(error) => return Err(error),
        }
        let alive = std::fs::read_to_string(vm.pid_file())
            .ok()
            .and_then(|text| Process::open(text.trim().parse().ok()?));
        if alive.is_none() {
            let log = std::fs::read_to_string(vm.log_file()).unwrap_or_default();
            let said = log.lines().rev().find(|line| !line.trim().is_empty());
            return Err(Error::refused(format!(
                "start failed: {}",
                said.unwrap_or("atoll-vmm ended without a message").trim()
            )));
        }
        tokio::time::sleep(READY_POLL).await;
        if task.is_cancelled() {
            return Err(Error::Interrupted);
        }
    }
}
