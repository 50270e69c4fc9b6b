#!/usr/bin/env python3
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""Answers the system calls that a container's seccomp filter asks about: what runc's suite calls `seccompagent`.

seccomp_agent.py -socketfile=SOCKET -pid-file FILE

mkdir makes the directory with the listener's metadata as a suffix (`-metadata`), chmod fails with ENOMEDIUM, anything
else goes on. The protocol is the runtime-spec's "containerProcessState" and the kernel's seccomp_unotify(2).
"""

import array
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading

# <linux/seccomp.h>, x86-64: struct seccomp_notif is 80 bytes, struct seccomp_notif_resp 24.
RECEIVE = 0xC0502100
SEND = 0xC0182101
CONTINUE = 1
MKDIR, CHMOD, FCHMOD, FCHMODAT = 83, 90, 91, 268


def text_at(pid, address):
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).split(b"\0", 1)[0].decode()


def make_directory(pid, name, mode, suffix):
    base = f"/proc/{pid}/root" if name.startswith("/") else f"/proc/{pid}/cwd/"
    os.mkdir(f"{base}{name}-{suffix}", mode)


def serve(listener, suffix):
    while True:
        request = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, request)
        except OSError as error:
            if error.errno == errno.EINTR:
                continue
            return
        # id, pid, flags, then struct seccomp_data: nr, arch, instruction pointer, six arguments.
        identity, pid, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", request)
        value, error, flags = 0, 0, CONTINUE
        if number == MKDIR:
            flags = 0
            try:
                make_directory(pid, text_at(pid, arguments[0]), arguments[1] & 0o7777, suffix)
            except OSError:
                value, error = -1, -errno.ENOSYS
        elif number in (CHMOD, FCHMOD, FCHMODAT):
            value, error, flags = -1, -errno.ENOMEDIUM, 0
        try:
            fcntl.ioctl(listener, SEND, struct.pack("=QqiI", identity, value, error, flags))
        except OSError:
            # The process that asked has ended.
            pass


def receive(connection):
    """The state and the listener that a runtime sent."""
    text, controls, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 4))
    descriptors = array.array("i")
    for level, kind, data in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    state = json.loads(text)
    listener = descriptors[state["fds"].index("seccompFd")]
    for other in descriptors:
        if other != listener:
            os.close(other)
    return state, listener


def main():
    words = " ".join(sys.argv[1:]).replace("=", " ").split()
    options = dict(zip(words[::2], words[1::2]))
    with open(options["-pid-file"], "w") as file:
        file.write(str(os.getpid()))
    # Directories get exactly the mode that was asked for.
    ctypes.CDLL(None).umask(0)
    server = socket.socket(socket.AF_UNIX)
    server.bind(options["-socketfile"])
    server.listen(16)
    while True:
        connection, _ = server.accept()
        with connection:
            try:
                state, listener = receive(connection)
            except (ValueError, KeyError, IndexError) as error:
                print(f"seccomp_agent: not a container's state: {error!r}", file=sys.stderr)
                continue
        suffix = os.path.basename(state.get("metadata", ""))
        threading.Thread(target=serve, args=(listener, suffix), daemon=True).start()


if __name__ == "__main__":
    main()
