// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The pitfalls that other VMMs fell into, by family, each with the tests here that play it; and those tests that belong
//! to no one device. A row whose test is gone fails.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use atoll_devices::counters::CounterList;
use atoll_devices::memory::Memory;
use atoll_devices::state::{DeviceState, Saved, StateError};
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::rng::Rng;
use atoll_devices::virtio::{QueueStart, StartError, StartedQueue, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::blk::{device, memory_disk};

/// Family, pitfall, and `file::test` for each test that plays it. Files are in this folder, in `vmm/tests`, or named by
/// their path from the repository's root.
const PITFALLS: &[(&str, &str, &[&str])] = &[
    (
        "rings",
        "a header or descriptor that changes between check and use",
        &[
            "pitfalls.rs::a_header_that_changes_while_it_is_read",
            "scsi.rs::a_command_that_changes_while_it_is_read",
            "net.rs::a_command_that_changes_while_it_is_read",
            "vsock.rs::a_packet_that_changes_while_it_is_read",
            "console.rs::a_message_that_changes_while_it_is_read",
            "balloon.rs::a_page_number_that_changes_while_it_is_read",
            "net.rs::a_packet_that_changes_while_it_is_sent",
        ],
    ),
    (
        "rings",
        "address plus size that overflows or leaves RAM, rings and tables at its ends",
        &[
            "bounds.rs::every_range_around_the_edges_of_ram",
            "bounds.rs::rings_around_the_edges_of_ram",
            "bounds.rs::indirect_tables_around_the_edges_of_ram",
            "hostile.rs::blk_withstands",
        ],
    ),
    (
        "rings",
        "an available index that runs ahead",
        &[
            "bounds.rs::every_distance_of_the_available_index",
            "hostile.rs::rng_withstands",
        ],
    ),
    (
        "rings",
        "chains without an end or of 4 GiB, links and indirect tables of every wrong form",
        &[
            "hostile.rs::blk_withstands",
            "bounds.rs::every_head_and_every_link",
            "bounds.rs::a_chain_of_4_gib_less_one_byte",
            "fuzz.rs::queue",
        ],
    ),
    (
        "rings",
        "the same head twice in flight",
        &["hostile.rs::the_same_head_many_times"],
    ),
    (
        "rings",
        "a chain that claims more memory than there is",
        &[
            "rng.rs::a_huge_claim_is_bounded",
            "balloon.rs::too_many_page_numbers",
            "vsock.rs::packets_of_impossible_size",
            "net.rs::impossible_packets",
            "devices/disk/src/raw/tests.rs::conforms_with_uring",
        ],
    ),
    (
        "rings",
        "a request that fails in its middle is done twice, or leaves stale data",
        &[
            "blk.rs::read_only_and_failing_disks",
            "bounds.rs::every_part_of_scattered_buffers",
            "hostile.rs::a_good_request_then_a_malformed_chain",
            "devices/disk/src/raw/tests.rs::a_file_that_shrank_gives_an_error_and_no_stale_data",
        ],
    ),
    (
        "rings",
        "queue and vector numbers out of range",
        &[
            "transport.rs::vectors_out_of_range_read_back_as_none",
            "transport.rs::queue_registers_only_between_features_and_driver_ok",
            "devices/src/pci/msix.rs::strange_accesses_do_nothing",
        ],
    ),
    (
        "rings",
        "accesses of odd sizes",
        &[
            "transport.rs::accesses_of_every_size_everywhere",
            "bounds.rs::every_access_by_the_configuration_window",
            "fuzz.rs::pci",
        ],
    ),
    (
        "rings",
        "rings that overlap, and buffers over the rings",
        &[
            "hostile.rs::overlapping_rings_do_not_hang",
            "hostile.rs::net_buffers_over_the_rings",
        ],
    ),
    (
        "status",
        "steps left out or taken back",
        &["transport.rs::wrong_steps_of_the_status_machine_break_the_device"],
    ),
    (
        "status",
        "features after FEATURES_OK, or not offered",
        &["transport.rs::features_are_checked"],
    ),
    (
        "status",
        "queue registers outside their time",
        &["transport.rs::queue_registers_only_between_features_and_driver_ok"],
    ),
    (
        "status",
        "a read-only disk of a driver that did not accept the feature",
        &["blk.rs::read_only_and_failing_disks"],
    ),
    (
        "status",
        "a queue that fails to start keeps the vCPU, or the device, for ever",
        &["pitfalls.rs::a_queue_that_cannot_start_breaks_the_device_until_a_reset"],
    ),
    (
        "status",
        "a reset that leaves something behind",
        &[
            "fuzz.rs::pci",
            "blk.rs::pause_keeps_the_rings_and_reset_forgets_them",
        ],
    ),
    (
        "status",
        "event index: missed or surplus interrupts, also where indices wrap",
        &[
            "bounds.rs::every_event_index_around_a_batch",
            "blk.rs::event_index_suppresses_interrupts",
            "state.rs::a_queue_that_has_nothing_to_do_is_told_once_more_in_a_copy_and_rings",
        ],
    ),
    (
        "stop",
        "a half-done access to a port or a device is lost by a pause",
        &["vmm/src/vcpu/thread.rs::a_kick_while_an_exit_is_answered_is_not_lost"],
    ),
    (
        "stop",
        "a kick finds the vCPU on its way into the guest, and is lost",
        &[
            "vmm/src/vcpu/thread.rs::a_kick_on_the_way_into_the_guest_is_not_lost",
            "vmm/src/vcpu/thread.rs::a_kick_while_an_exit_is_answered_is_not_lost",
        ],
    ),
    (
        "stop",
        "requests in flight are lost by a pause",
        &["probe.rs::pausing_again_and_again_loses_no_request"],
    ),
    (
        "stop",
        "a vCPU that accesses a device, and a reset, a pause or an unplugging, wait for each other",
        &["pitfalls.rs::accesses_while_the_machine_is_reset_paused_and_unplugged"],
    ),
    (
        "stop",
        "a pause waits for a disk that makes its requests wait, or tears what is under way",
        &[
            "blk.rs::limited_disks_pause_at_once",
            "blk.rs::what_the_kernel_has_is_done_when_a_pause_returns",
            "scsi.rs::what_is_in_flight_is_not_aborted_and_not_lost",
            "scsi.rs::pause_and_reset_lose_nothing",
            "vsock.rs::a_program_that_accepts_nobody_holds_nothing_up",
            "snapshot.rs::memory_is_the_same_page_by_page",
        ],
    ),
    (
        "stop",
        "late completions lose their interrupt, since vCPUs were saved before devices",
        &[
            "state.rs::a_queue_that_has_nothing_to_do_is_told_once_more_in_a_copy_and_rings",
            "state.rs::a_change_of_the_configuration_is_told_once_more_in_a_copy",
            "tests/lab/migration.rs::a_working_guest_moves_back_and_forth_between_hosts",
        ],
    ),
    (
        "stop",
        "vCPUs that never ran hold up a stop",
        &[
            "machine.rs::shutdown_ends_the_process_from_any_state",
            "probe.rs::more_vcpus_than_the_guest_starts_do_no_harm",
        ],
    ),
    (
        "state",
        "a device in a copy is not the device that it was",
        &[
            "state.rs::a_device_goes_on_in_a_copy",
            "state.rs::a_broken_device_stays_broken",
        ],
    ),
    (
        "state",
        "a queue that waits for its doorbell, or an interrupt under way, when it is saved",
        &["state.rs::a_device_goes_on_in_a_copy"],
    ),
    (
        "state",
        "a serial port's input, or its interrupt, that the guest has not taken is lost",
        &["console.rs::a_serial_port_in_a_copy_has_its_input_and_its_interrupts"],
    ),
    (
        "state",
        "vCPU and interrupt controllers after a reset",
        &["machine.rs::a_reset_machine_boots_again"],
    ),
    (
        "state",
        "registers or MSRs that are left out, or put back in an order that loses them",
        &[
            "vmm/src/vcpu/state.rs::a_state_that_is_put_into_another_vcpu_is_the_same",
            "vmm/src/vcpu/state.rs::every_msr_that_a_guest_may_have_set_is_in_the_state",
            "golden.rs::machines_of_every_release_go_on",
        ],
    ),
    (
        "state",
        "a timer's deadline, an exception or an NMI that is pending is lost",
        &["vmm/src/vcpu/state.rs::a_deadline_and_what_is_pending_reach_the_guest_in_another_vcpu"],
    ),
    (
        "state",
        "an MSR that is refused goes unnoticed",
        &["vmm/src/vcpu/state.rs::a_refused_msr_is_an_error_with_its_number"],
    ),
    (
        "state",
        "guests of the guest are lost",
        &[
            "vmm/src/kvm/cpu/tests.rs::nested_virtualization_is_not_given_where_it_cannot_be_saved",
            "vmm/src/saved/vcpu.rs::nested_state_is_as_long_as_it_says",
        ],
    ),
    (
        "state",
        "a part of memory is taken for another where RAM has more than one slot",
        &[
            "vmm/src/saved/image.rs::memory_around_the_hole_comes_back",
            "snapshot.rs::children_of_a_snapshot_have_what_was_written_since",
            "migration.rs::a_guest_at_work_above_4_gib_moves_there_and_back",
        ],
    ),
    (
        "state",
        "sizes of memory that wrap as bytes",
        &[
            "vmm/src/check.rs::sizes_that_wrap_are_refused",
            "machine.rs::more_memory_than_the_host_has_is_refused",
        ],
    ),
    (
        "state",
        "a state of an older or a newer program",
        &[
            "golden.rs::machines_of_every_release_go_on",
            "vmm/src/saved/mod.rs::the_head_is_looked_at_first",
        ],
    ),
    (
        "state",
        "a device is seen before it is there, or after it is gone",
        &[
            "hotplug.rs::nothing_answers_in_the_place_of_what_is_gone",
            "hotplug.rs::a_function_comes_is_asked_for_and_goes_again_and_again",
            "hotplug.rs::a_function_that_is_seen_answers_at_once",
        ],
    ),
    (
        "time",
        "a guest notices a pause as a lockup",
        &["snapshot.rs::a_guest_that_was_paused_is_told"],
    ),
    (
        "time",
        "clocks jump in a copy, or stand still over a move",
        &[
            "snapshot.rs::clocks_of_a_restored_guest_go_on_where_they_stopped",
            "migration.rs::clocks_of_a_moved_guest_count_the_time_of_its_move",
        ],
    ),
    (
        "time",
        "an alarm is not set in a copy, or falls into a move",
        &[
            "devices/src/platform/rtc.rs::an_alarm_goes_on_in_a_copy",
            "devices/src/platform/rtc.rs::an_alarm_that_falls_into_an_absence_is_told_late",
        ],
    ),
    (
        "time",
        "a copy has the random numbers of its original",
        &["snapshot.rs::a_copy_learns_that_it_is_one"],
    ),
    (
        "time",
        "time stamp counters of a machine's vCPUs that differ after a move",
        &["vmm/src/vcpu/counter.rs::counters_of_all_vcpus_are_set_alike_whenever_they_were_saved"],
    ),
    (
        "time",
        "time stamp counters of another speed",
        &["vmm/src/machine/saved.rs::a_counter_of_another_speed_is_refused"],
    ),
    (
        "filters",
        "a rare path makes a denied system call",
        &["sandbox.rs::every_thread_has_its_filter_and_vcpus_only_one"],
    ),
    (
        "filters",
        "the handler of a denied call waits for a lock that its thread, or another one, holds",
        &["vmm/src/sandbox/seccomp.rs::a_denied_call_is_named_while_the_log_is_locked"],
    ),
];

#[test]
fn every_pitfall_is_played_by_a_test() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (family, pitfall, tests) in PITFALLS {
        assert!(!tests.is_empty(), "{family}: {pitfall}");
        for test in *tests {
            let (file, name) = test.split_once("::").unwrap();
            let found = ["tests/it", "../vmm/tests", ".."].iter().any(|folder| {
                let text = std::fs::read_to_string(here.join(folder).join(file));
                text.is_ok_and(|text| text.contains(&format!("fn {name}()")))
            });
            assert!(found, "{family}, {pitfall}: there is no {test}");
        }
    }
}

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x10_1000;

/// Does `one` many times, while another vCPU writes both `values` to `address`, one after the other, all the time. `one`
/// says whether the device has seen the first; it has to see either often enough, however busy this machine is.
pub fn while_it_changes<const N: usize>(
    memory: &Memory,
    address: u64,
    values: [[u8; N]; 2],
    mut one: impl FnMut() -> bool,
) {
    let ends = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = Ends(ends);
        let other_vcpu = move || {
            let memory = memory.memory();
            while !ends.load(Ordering::Relaxed) {
                for value in &values {
                    memory.write_slice(value, GuestAddress(address)).unwrap();
                }
            }
        };
        let thread = std::thread::Builder::new();
        thread.spawn_scoped(scope, other_vcpu).unwrap();
        let mut seen = [0; 2];
        while seen.iter().sum::<usize>() < 5000 || seen.iter().any(|count| *count < 200) {
            seen[usize::from(one())] += 1;
        }
    });
}

/// Another vCPU rewrites the header of a request all the time, between a read of the first sector and a write far behind
/// the disk's end. Whichever the device sees, it sees one of them: a read ends well with its data, a write fails.
#[test]
fn a_header_that_changes_while_it_is_read() {
    let mut driver = device(memory_disk(), 1);
    driver.start(u64::MAX);
    let read = [0_u8; 16];
    let mut write = [0xff_u8; 16];
    write[..8].copy_from_slice(&1_u64.to_le_bytes());
    while_it_changes(&driver.memory.clone(), HEADER, [read, write], || {
        driver.put(STATUS, &[0xee]);
        let chain = [
            Segment::readable(HEADER, 16),
            Segment::writable(DATA, 512),
            Segment::writable(STATUS, 1),
        ];
        driver.add(0, &chain);
        driver.kick(0);
        let (_, written) = driver.wait_used(0);
        let status = driver.get(STATUS, 1)[0];
        // 0: read. 1: out of range, or a write without readable data. 2: half of either header is no kind at all.
        let expected: &[u32] = if status == 0 { &[513] } else { &[1, 513] };
        assert!(
            status <= 2 && expected.contains(&written),
            "{status} {written}"
        );
        status == 0
    });
    assert_eq!(driver.status(), 15);
}

/// A device whose queue the host cannot serve at the moment.
struct Unlucky(AtomicBool);

impl DeviceState for Unlucky {
    fn save(&self) -> Saved {
        unreachable!("nobody saves it")
    }

    fn restore(&self, _: &Saved) -> Result<(), StateError> {
        Ok(())
    }
}

impl VirtioDevice for Unlucky {
    fn device_id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn config_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        if self.0.swap(false, Ordering::SeqCst) {
            let source = io::Error::other("no thread left");
            return Err(StartError { index: 0, source });
        }
        Rng::new().start_queue(start)
    }

    fn counters(&self) -> CounterList {
        Vec::new()
    }
}

#[test]
fn a_queue_that_cannot_start_breaks_the_device_until_a_reset() {
    let mut driver = Driver::new(Arc::new(Unlucky(AtomicBool::new(true))));
    driver.start(u64::MAX);
    assert_ne!(driver.status() & 0x40, 0, "the driver is told");
    driver.reset();
    assert_eq!(driver.status(), 0);
    driver.start(u64::MAX);
    driver.add(0, &[Segment::writable(DATA, 32)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 32);
}

/// Lets threads end with a scope, also when it fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Three locks meet here: the bus's, the device's and its MSI-X table's. Whoever takes two in another order than the rest
/// waits for ever, sooner or later.
#[test]
fn accesses_while_the_machine_is_reset_paused_and_unplugged() {
    const ROUNDS: usize = 300;
    let driver = Driver::new(Arc::new(Rng::new()));
    let msix = driver.capability(0x11).unwrap();
    // A vCPU that sets the device up again and again, and one that moves its BAR and masks its vectors.
    let sets_up = |driver: &Driver| {
        driver.negotiate(1 << 32);
        driver.write(0x1c, &1u16.to_le_bytes());
        driver.set_status(15);
        driver.kick(0);
        driver.reset();
    };
    let moves = |driver: &Driver| {
        driver.config_write(0x10, &0xc004_0000_u32.to_le_bytes());
        driver.config_write(msix + 2, &0xc000_u16.to_le_bytes());
        driver.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
        driver.config_write(msix + 2, &0x8000_u16.to_le_bytes());
    };
    let acts: [&(dyn Fn(&Driver) + Sync); 2] = [&sets_up, &moves];
    let (driver, ends) = (&driver, &AtomicBool::new(false));
    // What is saved is saved while no vCPU runs: the machine holds them first.
    let runs = &RwLock::new(());
    std::thread::scope(|scope| {
        let _ends = Ends(ends);
        for act in acts {
            let vcpu = move || {
                while !ends.load(Ordering::Relaxed) {
                    let _runs = runs.read().unwrap_or_else(PoisonError::into_inner);
                    act(driver);
                }
            };
            let thread = std::thread::Builder::new();
            thread.spawn_scoped(scope, vcpu).unwrap();
        }
        for round in 0..ROUNDS {
            match round % 5 {
                0 => driver.device.reset(),
                1 => driver.bus.reset(),
                2 => driver.config_write(4, &6u16.to_le_bytes()),
                3 => drop(driver.bus.save()),
                _ => {
                    let _held = runs.write().unwrap();
                    driver.device.pause();
                    driver.device.save();
                    driver.device.resume().unwrap();
                }
            }
        }
        driver.bus.hide(1);
        driver.device.retire();
        assert!(driver.bus.remove(1));
    });
    assert_eq!(driver.config_read::<4>(0), [0xff; 4]);
}
