# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""What the clients here share: how to reach the daemon under test, tasks, terminals.

The first argument of a client is the daemon's state directory. A client prints a line a check, and ends at the first
that fails.
"""

import json
import pathlib
import ssl
import sys
import time
import urllib.parse

import websocket
from proxmoxer import ProxmoxAPI, ResourceException

STATE = pathlib.Path(sys.argv[1])
LOGIN = json.loads((STATE / "initial-login.json").read_text())
DAEMON = json.loads((STATE / "run/atolld.json").read_text())
CA = LOGIN["ca_file"]
URL = LOGIN["url"]


def said(text):
    print("ok:", text, flush=True)


def client(**credentials):
    return ProxmoxAPI("localhost", port=DAEMON["port"], verify_ssl=CA, timeout=30, **credentials)


def refused(call, *texts):
    """The call is refused, and each of the texts is in what proxmoxer tells of it."""
    try:
        answer = call()
    except ResourceException as error:
        for text in texts:
            assert text in str(error), f"expected {text!r} in {error}"
        return error
    raise AssertionError(f"not refused: {answer}")


def finish(api, upid, expected="OK"):
    """Waits for a task; its log must end as PVE's do."""
    deadline = time.monotonic() + 120
    node = api.nodes(upid.split(":")[1])
    while (status := node.tasks(upid).status.get())["status"] != "stopped":
        assert "exitstatus" not in status, status
        assert time.monotonic() < deadline, f"{upid} does not end"
        time.sleep(0.1)
    lines = [row["t"] for row in node.tasks(upid).log.get(limit=500)]
    if expected is not None:
        assert status["exitstatus"] == expected, (status, lines)
        assert lines[-1] == f"TASK {expected}", lines
    return lines


class Terminal:
    """A guest's console, opened as PVE's own page does it: termproxy, then a websocket that begins with the ticket."""

    def __init__(self, api, path, opened):
        """`path` is the guest's below the node, `opened` what its termproxy answered."""
        query = urllib.parse.urlencode({"port": opened["port"], "vncticket": opened["ticket"]})
        self.upid = opened["upid"]
        self.socket = websocket.create_connection(
            f"{URL.replace('https', 'wss')}/api2/json/nodes/{DAEMON['node']}/{path}/vncwebsocket?{query}",
            cookie=f"PVEAuthCookie={urllib.parse.quote(api.get_tokens()[0])}",
            subprotocols=["binary"],
            sslopt={"ca_certs": CA, "cert_reqs": ssl.CERT_REQUIRED},
            timeout=30,
        )
        assert self.socket.subprotocol == "binary", self.socket.subprotocol
        self.socket.send_binary(f"{opened['user']}:{opened['ticket']}\n".encode())
        self.seen = self.socket.recv()
        assert self.seen.startswith(b"OK"), self.seen
        self.socket.send_binary(b"1:100:30:")

    def type(self, line):
        typed = line.encode()
        self.socket.send_binary(b"0:%d:%s" % (len(typed), typed))

    def expect(self, text):
        """Reads on until the text has been seen."""
        deadline = time.monotonic() + 60
        while text.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.seen += self.socket.recv()
