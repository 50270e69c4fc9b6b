# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""A virtual machine's life through an unmodified PVE client: made, started, typed into, changed, switched off, removed.

Run by tests/it/api.rs where KVM works, with the probe guest (firmware/probe) as `local:snippets/probe`: it boots in
a moment, gets its address by DHCP, has a shell on its serial port and obeys the power button.
"""

import os
import re
import time

from pve import DAEMON, LOGIN, Terminal, client, finish, refused, said

VM = 100
DISK = "local:100/vm-100-disk-0.raw"


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


def removed(api, node):
    pid = node.qemu(VM).status.current.get().get("pid")
    assert pid is None, pid
    finish(api, node.qemu(VM).delete())
    assert node.storage("local").content.get(content="images") == []
    assert not os.path.exists("/sys/class/net/tap100i0")
    types = [row["type"] for row in node.tasks.get(vmid=VM, limit=100)]
    expected = {"qmcreate", "qmstart", "vncproxy", "qmpause", "qmresume", "resize", "qmshutdown", "qmstop", "qmdestroy"}
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
measured(there)
switched_off(script, there)
removed(script, there)
