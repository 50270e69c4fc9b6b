#!/usr/bin/python3 -ISB
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""Takes terminals from a runtime's --console-socket and reads what they print: what runc's suite calls `recvtty`.
It does not wait for this program to begin, so nothing is imported that is not needed.

recvtty.py [--pid-file FILE] [--mode null] SOCKET
"""

import array
import os
import select
import socket
import sys


def receive(connection):
    """The terminal that came over a connection, or nothing."""
    space = socket.CMSG_SPACE(array.array("i").itemsize)
    _, controls, _, _ = connection.recvmsg(4096, space)
    for level, kind, data in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors = array.array("i")
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            return descriptors[0]
    return None


def discard(terminal):
    """Reads what there is. Answers whether more can come."""
    try:
        return bool(os.read(terminal, 65536))
    except OSError:
        # The last holder of the other side has gone.
        return False


def main():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[-1])
    listener.listen(16)
    if "--pid-file" in sys.argv:
        with open(sys.argv[sys.argv.index("--pid-file") + 1], "w") as file:
            file.write(str(os.getpid()))
    terminals = []
    while True:
        for ready in select.select([listener, *terminals], [], [])[0]:
            if ready is listener:
                connection, _ = listener.accept()
                with connection:
                    terminal = receive(connection)
                if terminal is not None:
                    terminals.append(terminal)
            elif not discard(ready):
                terminals.remove(ready)
                os.close(ready)


if __name__ == "__main__":
    main()
