# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""A container that takes all it can get, beside the daemon: memory, files, room in the log, processes.

Run by tests/it/api.rs. While each bomb goes off, another client asks the daemon on and on, and is answered.
"""

import threading
import time

from pve import DAEMON, LOGIN, STATE, Terminal, client, finish, said

CT = 101
LIMIT_MIB = 64
LOG = STATE / f"run/ct/ct-{CT}/console.log"
# Its longest length, and a part that is being written.
LOG_BYTES_MAX = 512 << 10


class Asker:
    """Asks until the end of the block; every question must be answered, and at least one was."""

    def __enter__(self):
        self.answers, self.error, self.ended = 0, None, threading.Event()
        self.thread = threading.Thread(target=self.ask)
        self.thread.start()
        return self

    def ask(self):
        api = client(user=LOGIN["username"], password=LOGIN["password"])
        node = api.nodes(DAEMON["node"])
        try:
            while not self.ended.is_set() or self.answers == 0:
                assert node.status.get()["memory"]["total"] > 0
                assert node.lxc(CT).status.current.get()["maxmem"] == LIMIT_MIB << 20
                self.answers += 1
        except Exception as error:
            self.error = error

    def __exit__(self, *failure):
        self.ended.set()
        self.thread.join()
        if not any(failure):
            assert self.error is None and self.answers > 0, self.error


def until(what, done):
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def goes_off(name, bomb, expected):
    with Asker() as asker:
        console = Terminal(api, f"lxc/{CT}", node.lxc(CT).termproxy.post())
        console.type(bomb + "\n")
        console.expect(expected)
        console.socket.close()
        finish(api, console.upid)
    assert node.lxc(CT).status.current.get()["status"] == "running"
    said(f"a bomb of {name}: contained, and {asker.answers} questions were answered beside it")


def floods_the_log():
    with Asker() as asker:
        console = Terminal(api, f"lxc/{CT}", node.lxc(CT).termproxy.post())
        # Nobody reads it.
        console.type("yes 0123456789abcdef | head -c 20000000; echo; echo flood-$((40+2))\n")
        console.socket.close()
        finish(api, console.upid)

        def ended():
            log = LOG.read_bytes()
            assert len(log) <= LOG_BYTES_MAX, len(log)
            return b"\nflood-42" in log

        until("the flood does not end", ended)
    said(f"a flood of the log: cut back, and {asker.answers} questions were answered beside it")


def forks():
    with Asker() as asker:
        console = Terminal(api, f"lxc/{CT}", node.lxc(CT).termproxy.post())
        console.type("(for i in $(seq 4000); do sleep 1000 & done) >/dev/null 2>&1; echo forks-$((40+2))\n")

        def is_full():
            status = node.lxc(CT).status.current.get()
            assert status.get("mem", 0) <= LIMIT_MIB << 20, status
            # Its first process is one of those that the kernel may choose to kill.
            return status.get("mem", 0) > LIMIT_MIB << 19 or status["status"] == "stopped"

        until("it takes no memory", is_full)
        console.socket.close()
        finish(api, console.upid, expected=None)
    finish(api, node.lxc(CT).delete(force=1))
    said(f"a bomb of processes: contained, and {asker.answers} questions were answered beside it")


api = client(user=LOGIN["username"], password=LOGIN["password"])
node = api.nodes(DAEMON["node"])
finish(api, node.lxc.post(
    vmid=CT, ostemplate="local:vztmpl/small.tar.gz", memory=LIMIT_MIB, swap=0, cpulimit=1, rootfs="local:1",
    unprivileged=1, cmode="console",
))
finish(api, node.lxc(CT).status.start.post())
goes_off("memory", "dd if=/dev/zero of=/dev/null bs=256M count=1 2>/dev/null; echo memory-$?", "memory-137")
goes_off("files", "mkdir /f; cd /f; seq 200000 | xargs touch 2>&1 | tail -n 1; cd /; rm -r /f; echo files-$((40+2))", "No space left")
floods_the_log()
forks()
