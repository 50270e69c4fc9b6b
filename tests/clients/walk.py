# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""An unmodified PVE client against atolld, as a user would go: sign in, make guests, use them, remove them.

Run by tests/it/api.rs; containers are real here, machine.py does the same for a virtual machine.
"""

import functools
import gzip
import hashlib
import http.server
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import requests
from proxmoxer import AuthenticationError
from pve import CA, DAEMON, LOGIN, STATE, URL, Terminal, client, finish, refused, said

VM, CT = 100, 101


def signing_in():
    started = time.monotonic()
    try:
        client(user=LOGIN["username"], password="wrong-password")
        raise AssertionError("a wrong password was accepted")
    except AuthenticationError:
        pass
    waited = time.monotonic() - started
    assert waited >= 2.9, f"a wrong password was refused after {waited:.2f} s"
    said("a wrong password is refused, late")
    api = client(user=LOGIN["username"], password=LOGIN["password"])
    assert api.version.get()["release"]
    said("the first administrator signs in")
    assert {row["realm"] for row in api.access.domains.get()} >= {"pam", "pve"}
    return api


def raw(method, path, headers=None, **options):
    return requests.request(method, f"{URL}/api2/json{path}", headers=headers, verify=CA, timeout=30, **options)


def wire_format():
    """What clients other than proxmoxer look at: status line, content type, body."""
    form = {"username": LOGIN["username"], "password": LOGIN["password"]}
    answer = raw("POST", "/access/ticket", data=form)
    assert answer.headers["Content-Type"] == "application/json;charset=UTF-8", answer.headers
    ticket = answer.json()["data"]
    assert re.fullmatch(r"PVE:admin@pve:[0-9A-F]{8}::.+", ticket["ticket"]), ticket
    cookie = {"Cookie": "PVEAuthCookie=" + urllib.parse.quote(ticket["ticket"])}
    token = {"CSRFPreventionToken": ticket["CSRFPreventionToken"]}

    answer = raw("POST", "/access/users", cookie, data={"userid": "x@pve"})
    assert (answer.status_code, answer.reason) == (401, "Permission denied - invalid csrf token"), answer.reason
    said("a change without its CSRF token is refused")
    answer = raw("GET", "/version")
    assert (answer.status_code, answer.reason) == (401, "No ticket")
    answer = raw("POST", "/access/users", cookie | token, json={"userid": "json@pve", "enable": True})
    assert answer.json() == {"data": None}, answer.text
    answer = raw("GET", "/nope", cookie)
    assert (answer.status_code, answer.reason) == (501, "Method 'GET /nope' not implemented")
    answer = requests.get(f"{URL}/api2/extjs/nope", headers=cookie, verify=CA, timeout=30)
    assert (answer.status_code, answer.json()["success"], answer.json()["status"]) == (200, 0, 501)
    renewed = raw("POST", "/access/ticket", data={"username": LOGIN["username"], "password": ticket["ticket"]})
    assert renewed.status_code == 200
    said("reason phrases, content type, both envelopes, JSON bodies, renewal by ticket")


def users_and_tokens(admin):
    admin.access.users.post(userid="ci@pve", password="correct horse", comment="builds")
    limited = client(user="ci@pve", password="correct horse")
    assert limited.cluster.resources.get(type="vm") == []
    refused(lambda: limited.nodes(DAEMON["node"]).status.get(), "403", "Sys.Audit")
    made = admin.access.users("ci@pve").token("deploy").post(privsep=0)
    assert made["full-tokenid"] == "ci@pve!deploy"
    by_token = client(user="ci@pve", token_name="deploy", token_value=made["value"])
    assert by_token.version.get()["release"]
    refused(lambda: by_token.nodes(DAEMON["node"]).status.get(), "403")
    admin.access.acl.put(path="/", roles="PVEAuditor", users="ci@pve")
    assert by_token.nodes(DAEMON["node"]).status.get()["memory"]["total"] > 0
    assert by_token.access.permissions.get()["/"]["VM.Audit"] == 1
    wrong = client(user="ci@pve", token_name="deploy", token_value="0" * 36)
    refused(wrong.version.get, "401")
    admin.access.users("ci@pve").token("deploy").delete()
    refused(by_token.version.get, "401")
    admin.access.users("ci@pve").delete()
    said("users, roles and tokens: made, limited, used, removed")


def storages(node):
    local = next(row for row in node.storage.get() if row["storage"] == "local")
    assert local["active"] == 1 and local["total"] > 0, local
    iso = STATE / "small.iso"
    iso.write_bytes(b"not much of an image")
    with iso.open("rb") as file:
        upid = node.storage("local").upload.post(content="iso", filename=file)
    lines = finish(node_api, upid)
    rows = node.storage("local").content.get(content="iso")
    assert [row["volid"] for row in rows] == ["local:iso/small.iso"], (rows, lines)
    finish(node_api, node.storage("local").content("local:iso/small.iso").delete())
    assert node.storage("local").content.get(content="iso") == []
    said("a file is uploaded, listed and removed")


def templates(api, node):
    """A signed index of templates, served from a folder."""
    refused(node.aplinfo.get, "500", "no index of container templates is configured", str(STATE / "templates/sources"))
    if not all(map(shutil.which, ("gpg", "gpgv", "gpg-agent"))):
        print("no GnuPG here: no index of templates is made", flush=True)
        return
    with tempfile.TemporaryDirectory() as home:

        def gpg(*args):
            command = ["gpg", "--homedir", home, "--batch", "--quiet", *args]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout

        served, kept = Path(home, "served"), STATE / "templates"
        served.mkdir()
        gpg("--passphrase", "", "--quick-generate-key", "Walk <walk@a.example>", "ed25519", "sign", "never")
        (kept / "walk.gpg").write_bytes(gpg("--export"))
        (served / "tiny_1_amd64.tar.gz").write_bytes(gzip.compress(b"not much of a template"))
        digest = hashlib.sha512((served / "tiny_1_amd64.tar.gz").read_bytes()).hexdigest()
        index = served / "aplinfo.dat"
        index.write_text(
            "Package: tiny\nVersion: 1\nType: lxc\nOS: none\nSection: system\nInfopage: https://a.example/\n"
            f"Location: tiny_1_amd64.tar.gz\nsha512sum: {digest}\nDescription: Tiny\n and useless\n"
        )
        (served / "aplinfo.dat.gz").write_bytes(gzip.compress(index.read_bytes()))
        (served / "aplinfo.dat.asc").write_bytes(gpg("--armor", "--output", "-", "--detach-sign", str(index)))
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "gpg-agent"], check=True)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/aplinfo.dat"
            (kept / "sources").write_text(f"Name: walk\nURL: {url}\nKeyring: walk.gpg\n")
            finish(api, node.aplinfo.put())
            row = node.aplinfo.get()[0]
            assert (row["package"], row["headline"], row["description"]) == ("tiny", "Tiny", "and useless"), row
            assert row["sha512sum"] == digest and row["template"] == "tiny_1_amd64.tar.gz", row
            error = refused(lambda: node.aplinfo.post(storage="local", template="other.tar.gz"), "400")
            assert error.errors == {"template": "no such template"}, error.errors
            finish(api, node.aplinfo.post(storage="local", template=row["template"]))
            server.shutdown()
    volume = f"local:vztmpl/{row['template']}"
    assert volume in [volume["volid"] for volume in node.storage("local").content.get(content="vztmpl")]
    finish(api, node.storage("local").content(volume).delete())
    said("a template of a signed index is downloaded")


def schema(node):
    listed = [row["name"] for row in node.get()]
    assert {"qemu", "lxc", "storage", "tasks", "status"} <= set(listed), listed
    error = refused(lambda: node.qemu.post(vmid=VM, nonsense=1), "400", "Parameter verification failed.")
    assert "property is not defined in schema" in error.errors["nonsense"], error.errors
    error = refused(lambda: node.qemu.post(vmid="x"), "400")
    assert "vmid" in error.errors, error.errors
    gone = f"Configuration file 'nodes/{DAEMON['node']}/qemu-server/9999.conf' does not exist"
    refused(lambda: node.qemu(9999).config.get(), "500", gone)
    refused(lambda: node.qemu(9999).status.start.post(), "500", gone)
    said("unknown parameters and unknown guests are named")


def machine(api, node):
    created = node.qemu.post(vmid=VM, name="probe", memory=128, cores=1, serial0="socket", bios="seabios")
    warned = finish(api, created, expected=None)
    assert "legacy BIOS" in " ".join(warned) and warned[-1] == "TASK WARNINGS: 1", warned
    assert api.cluster.nextid.get() != VM
    error = refused(lambda: api.cluster.nextid.get(vmid=VM), "400")
    assert f"VM {VM} already exists" in error.errors["vmid"], error.errors
    refused(lambda: node.qemu.post(vmid=VM), "500", "already exists")
    config = node.qemu(VM).config.get()
    assert config["memory"] == "128" and config["cores"] == 1, config
    node.qemu(VM).config.put(cores=2, digest=config["digest"])
    refused(lambda: node.qemu(VM).config.put(cores=3, digest=config["digest"]), "500", "checksum mismatch")
    finish(api, node.qemu(VM).config.post(description="by the walk"))
    assert node.qemu(VM).config.get()["description"].strip() == "by the walk"
    lines = finish(api, node.qemu(VM).status.start.post(), expected=None)
    assert lines[-1].startswith("TASK ERROR") and "bios: ovmf" in lines[-1], lines
    assert node.qemu(VM).status.current.get()["status"] == "stopped"
    said("a VM: created, changed, a stale digest refused, a start by a BIOS told why")


def container(api, node):
    upid = node.lxc.post(
        vmid=CT, ostemplate="local:vztmpl/small.tar.gz", hostname="small", memory=128, rootfs="local:1", unprivileged=1,
        cmode="console",
    )
    lines = finish(api, upid)
    assert len(lines) > 1, lines
    finish(api, node.lxc(CT).status.start.post())
    assert node.lxc(CT).status.current.get()["status"] == "running"
    row = next(row for row in api.cluster.resources.get(type="vm") if row["id"] == f"lxc/{CT}")
    assert row["status"] == "running" and row["node"] == DAEMON["node"], row
    assert CT in [row["vmid"] for row in node.lxc.get()]
    said("a container: created and running")


def terminal(api, node):
    opened = node.lxc(CT).termproxy.post()
    for wrong in ({"port": int(opened["port"]) ^ 1}, {"vncticket": "PVEVNC:00000000::AAAA"}):
        query = {"port": opened["port"], "vncticket": opened["ticket"]} | wrong
        refused(lambda: node.lxc(CT).vncwebsocket.get(**query), "401")
    console = Terminal(api, f"lxc/{CT}", opened)
    console.type("echo typed-$((40+2))\n")
    console.expect("typed-42")
    console.socket.close()
    lines = finish(api, console.upid)
    said(f"a terminal: typed into and answered ({len(lines)} lines of log)")
    node.lxc(CT).config.put(cmode="shell")
    console = Terminal(api, f"lxc/{CT}", node.lxc(CT).termproxy.post())
    console.type("echo $0-$((40+2))\n")
    console.expect("/bin/sh-42")
    console.socket.close()
    finish(api, console.upid)
    said("a shell in a container: typed into and answered")


def node_terminal(api, node):
    console = Terminal(api, "", node.termproxy.post())
    console.expect("login: ")
    console.socket.close()
    finish(api, console.upid)
    said("a terminal of the node: asks who signs in")


def removal(api, node):
    refused_upid = node.lxc(CT).delete()
    lines = finish(api, refused_upid, expected=None)
    assert "is running" in lines[-1], lines
    finish(api, node.lxc(CT).status.stop.post())
    finish(api, node.lxc(CT).delete())
    finish(api, node.qemu(VM).delete())
    assert api.cluster.resources.get(type="vm") == []
    types = {row["type"] for row in node.tasks.get(limit=100)}
    assert {"vzcreate", "vzstart", "vncproxy", "vzstop", "vzdestroy", "qmcreate", "qmdestroy"} <= types, types
    said("guests are stopped and removed, and the tasks are on record")


signing_in()
wire_format()
node_api = client(user=LOGIN["username"], password=LOGIN["password"])
here = node_api.nodes(DAEMON["node"])
users_and_tokens(node_api)
storages(here)
templates(node_api, here)
schema(here)
machine(node_api, here)
container(node_api, here)
terminal(node_api, here)
node_terminal(node_api, here)
removal(node_api, here)
