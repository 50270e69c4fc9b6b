#!/usr/bin/python3
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""Runs a shell command in a guest through its console socket; runs on a lab host.

    console.py SOCKET TIMEOUT COMMAND

Signs in as root where the console asks for it. Prints the command's output; exits with its code, or with 255
and the console's last lines when the guest does not answer in time.
"""
import os
import re
import socket
import sys
import time

PASSWORD = "atoll"


class Console:
    def __init__(self, path, deadline):
        self.deadline = deadline
        self.seen = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.settimeout(1.0)

    def send(self, text):
        self.socket.sendall(text.encode())

    def wait(self, *patterns, nudge=None):
        """Index and match of the first pattern that appears; what was before it is forgotten."""
        last_nudge = time.monotonic()
        while True:
            for index, pattern in enumerate(patterns):
                match = re.search(pattern, self.seen)
                if match:
                    self.seen = self.seen[match.end():]
                    return index, match
            if time.monotonic() > self.deadline:
                tail = self.seen[-2000:].decode(errors="replace")
                print(f"the guest's console does not show {patterns}; its end:\n{tail}")
                sys.exit(255)
            if nudge and time.monotonic() - last_nudge > 5:
                last_nudge = time.monotonic()
                self.send(nudge)
            try:
                data = self.socket.recv(65536)
                if not data:
                    print("the guest's console was closed; its end:\n" + self.seen[-2000:].decode(errors="replace"))
                    sys.exit(255)
                self.seen += data
            except socket.timeout:
                pass


def main():
    path, timeout, command = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    console = Console(path, time.monotonic() + timeout)
    # No echo and a plain prompt, so that what comes back is output. The marks are put together by printf: where
    # a line is echoed after all, the echo does not look like the answer.
    mark = f"M{os.getpid()}x{int(time.time())}"
    hello = f"stty -echo; bind 'set enable-bracketed-paste off'; PS1='# '; printf '<%s:%s>\\n' ready {mark}\r"
    ready = f"<ready:{mark}>".encode()
    console.send("\r")
    # What is seen first may be from before a restart of the guest, so every answer is good at any time.
    while True:
        index, _ = console.wait(ready, rb"login: ?$", rb"Password: ?$", rb"[#$] ?$", nudge="\r")
        if index == 0:
            break
        console.send(["", "root\r", PASSWORD + "\r", hello][index])
    console.send(f"printf '<%s:%s>\\n' begun {mark}; {command}\rprintf '\\n<%s:%d>\\n' {mark} $?\r")
    console.wait(f"<begun:{mark}>".encode())
    _, match = console.wait(f"<{mark}:(\\d+)>".encode())
    text = match.string[: match.start()].decode(errors="replace").replace("\r", "")
    # A prompt that was answered twice is ready twice.
    lines = [line.removeprefix("# ") for line in text.split("\n") if mark not in line]
    print("\n".join(lines).strip())
    sys.exit(int(match.group(1)))


main()
