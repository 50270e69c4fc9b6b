# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""A virtual machine's life through an unmodified PVE client: made, started, typed into, changed, switched off, removed.

Run by tests/it/api.rs where KVM works, with the probe guest (firmware/probe) as `local:snippets/probe`: it boots in
a moment, gets its address by DHCP, has a shell on its serial port and obeys the power button.
"""

import os
import re
import time

from pve import DAEMON, LOGIN, STATE, Terminal, client, finish, refused, said

VM = 100
DISK = "local:100/vm-100-disk-1.raw"


def until(what, expected, max_s=60):
    """Asks again until the answer is the expected one."""
    deadline = time.monotonic() + max_s
    while (seen := what()) != expected:
        assert time.monotonic() < deadline, f"still {seen!r}, not {expected!r}"
        time.sleep(0.1)


def made_and_started(api, node):
    upid = node.qemu.post(
        vmid=VM,
        name="probe",
        memory=128,
        kernel="local:snippets/probe",
        cmdline="stay",
        serial0="socket",
        virtio0="local:1",
        scsi1="local:1,format=qcow2,iothread=1,ssd=1",
        ide2="none,media=cdrom",
        net0="virtio,bridge=vmbr0",
    )
    finish(api, upid)
    config = node.qemu(VM).config.get()
    assert config["virtio0"].startswith(f"{DISK},") and "size=1G" in config["virtio0"], config
    assert re.fullmatch(r"virtio=([0-9A-F]{2}:){5}[0-9A-F]{2},bridge=vmbr0", config["net0"]), config
    lines = finish(api, node.qemu(VM).status.start.post())
    status = node.qemu(VM).status.current.get()
    assert (status["status"], status["qmpstatus"]) == ("running", "running"), status
    assert f"running as process {status['pid']}" in lines, (status, lines)
    refused(lambda: node.qemu(VM).delete(purge="maybe"), "400")
    again = finish(api, node.qemu(VM).status.start.post(), expected=None)
    assert again[-1] == f"TASK ERROR: VM {VM} already running", again
    said("a VM with a disk and a network card runs")


def typed_into(api, node):
    console = Terminal(api, f"qemu/{VM}", node.qemu(VM).termproxy.post())
    console.expect("probe> ")
    console.type("id\r")
    console.expect("atoll probe guest under KVM")
    console.expect(", 10.64.0.")
    console.socket.close()
    finish(api, console.upid)
    said("its shell answers on the terminal, and DHCP gave it an address")


def paused(api, node):
    def state():
        return node.qemu(VM).status.current.get()["qmpstatus"]

    finish(api, node.qemu(VM).status.suspend.post())
    assert state() == "paused"
    finish(api, node.qemu(VM).status.resume.post())
    assert state() == "running"
    said("it is suspended and resumed")


def changed(api, node):
    node.qemu(VM).config.put(memory=256, description="by the client")
    config = node.qemu(VM).config.get(current=1)
    assert (config["memory"], config["description"].strip()) == ("128", "by the client"), config
    assert node.qemu(VM).config.get()["memory"] == "256"
    rows = {row["key"]: row for row in node.qemu(VM).pending.get()}
    assert (rows["memory"]["value"], rows["memory"]["pending"]) == ("128", "256"), rows["memory"]
    assert "pending" not in rows["description"], rows["description"]
    finish(api, node.qemu(VM).resize.put(disk="virtio0", size="+1G"))
    assert "size=2G" in node.qemu(VM).config.get()["virtio0"]
    volumes = {row["volid"]: row for row in node.storage("local").content.get(content="images")}
    assert volumes[DISK]["size"] == 2 << 30, volumes
    said("memory waits for the next start, the disk has grown")


def discs(api, node):
    disc = STATE / "tools.iso"
    disc.write_bytes(bytes(2048))
    with disc.open("rb") as file:
        finish(api, node.storage("local").upload.post(content="iso", filename=file))
    for value in ["local:iso/tools.iso,media=cdrom", "none,media=cdrom"]:
        node.qemu(VM).config.put(ide2=value)
        assert node.qemu(VM).config.get(current=1)["ide2"].startswith(value)
    rows = {row["key"]: row for row in node.qemu(VM).pending.get()}
    assert "pending" not in rows["ide2"], rows["ide2"]
    finish(api, node.storage("local").content("local:iso/tools.iso").delete())
    error = refused(lambda: node.qemu(VM).config.put(sata0="local:1"), "400")
    assert "CD-ROM drives only" in error.errors["sata0"], error.errors
    said("a disc goes in and out while it runs")


def measured(node):
    def columns():
        rows = node.qemu(VM).rrddata.get(timeframe="hour")
        assert all(rows[i]["time"] < rows[i + 1]["time"] for i in range(len(rows) - 1)), rows
        return {"time", "maxcpu", "maxmem", "mem"} <= set().union(*rows)

    until(columns, True)
    said("its figures are on record")


def switched_off(api, node):
    finish(api, node.qemu(VM).status.shutdown.post(timeout=60))
    status = node.qemu(VM).status.current.get()
    assert (status["status"], status["qmpstatus"]) == ("stopped", "stopped") and "pid" not in status, status
    finish(api, node.qemu(VM).status.start.post())
    until(lambda: node.qemu(VM).status.current.get()["maxmem"], 256 << 20)
    assert "pending" not in {row["key"]: row for row in node.qemu(VM).pending.get()}["memory"]
    finish(api, node.qemu(VM).status.stop.post())
    said("the power button ends it, and its next start has the new memory")


def disks_moved(api, node):
    config = node.qemu(VM).config.get()
    former = config["scsi1"].split(",")[0]
    assert former.endswith(".qcow2"), config
    finish(api, node.qemu(VM).move_disk.post(disk="scsi1", format="raw", delete=1))
    moved = node.qemu(VM).config.get()["scsi1"]
    assert moved.split(",")[0].endswith(".raw") and "iothread=1" in moved, moved
    volumes = {row["volid"]: row for row in node.storage("local").content.get(content="images")}
    assert former not in volumes and volumes[moved.split(",")[0]]["size"] == 1 << 30, volumes
    node.qemu(VM).unlink.put(idlist="scsi1")
    unused = node.qemu(VM).config.get()["unused0"]
    assert unused == moved.split(",")[0], unused
    copied = f"local:0,import-from={unused},format=qcow2"
    node.qemu(VM).config.put(scsi2=copied)
    node.qemu(VM).unlink.put(idlist="unused0,scsi2", force=1)
    left = [row["volid"] for row in node.storage("local").content.get(content="images")]
    assert left == [DISK], left
    said("a disk is moved to another format, taken out, copied and freed")


def by_firmware(api, node):
    finish(api, node.qemu.post(vmid=VM + 1, name="uefi", scsi0="local:1", scsihw="virtio-scsi-single"))
    config = node.qemu(VM + 1).config.get()
    assert config["bios"] == "ovmf" and config["smbios1"].startswith("uuid="), config
    finish(api, node.qemu(VM + 1).delete())
    lines = finish(api, node.qemu.post(vmid=VM + 1, bios="seabios"), expected="WARNINGS: 1")
    assert any("set 'bios: ovmf'" in line for line in lines), lines
    finish(api, node.qemu(VM + 1).delete())
    said("who says nothing gets firmware, who asks for legacy boot is told what to set")


def removed(api, node):
    pid = node.qemu(VM).status.current.get().get("pid")
    assert pid is None, pid
    finish(api, node.qemu(VM).delete())
    assert node.storage("local").content.get(content="images") == []
    assert not os.path.exists("/sys/class/net/tap100i0")
    types = [row["type"] for row in node.tasks.get(vmid=VM, limit=100)]
    expected = {"qmmove", "qmconfig", "qmcreate", "qmstart", "vncproxy", "qmpause", "qmresume", "resize", "qmshutdown", "qmstop", "qmdestroy"}
    assert expected <= set(types), types
    said("nothing is left of it but its tasks")


def by_token(api):
    """The rest of the walk as a script would do it, without a password."""
    made = api.access.users(LOGIN["username"]).token("machine").post(privsep=0)
    return client(user=LOGIN["username"], token_name="machine", token_value=made["value"])


administrator = client(user=LOGIN["username"], password=LOGIN["password"])
here = administrator.nodes(DAEMON["node"])
made_and_started(administrator, here)
typed_into(administrator, here)
script = by_token(administrator)
there = script.nodes(DAEMON["node"])
paused(script, there)
changed(script, there)
discs(script, there)
measured(there)
switched_off(script, there)
disks_moved(script, there)
by_firmware(script, there)
removed(script, there)
