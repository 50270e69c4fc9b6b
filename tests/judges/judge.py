#!/usr/bin/env python3
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
"""Lets the test suites of other container runtimes judge ours: crun's (Python) and runc's (bats), each run in the
same minutes against `atoll-ct`, Debian's crun and Debian's runc, so that a failure that all share is known as the
machine's.

Nothing of those suites is in this tree. They come from Debian's source packages, by the machine's own apt sources,
into the cache ($ATOLL_CACHE, default /var/cache/atoll). What the suites take from elsewhere is ours: two root file
systems made of this machine's packages, and the two helper programs beside this file.

The table goes to --output: suite, file, case, and a verdict a runtime. The exit code is 1 when a case that runc passes
fails for us and is not in KNOWN, 77 when the suites cannot be had.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path(os.environ.get("ATOLL_CACHE", "/var/cache/atoll"))
RUNTIMES = ["atoll-ct", "crun", "runc"]

# What `make test` runs: the files that are quick and whose cases differ most between runtimes.
FAST = {
    "crun": ["capabilities", "cwd", "devices", "exec", "hooks", "mounts", "paths", "rlimits", "start", "tty", "uid_gid"],
    "runc": ["create", "cwd", "kill", "start", "umask"],
}

# The same for `--v2`: a few files, since the suites differ little there and other tests are about v2 itself.
FAST_V2 = {"crun": ["devices", "pid"], "runc": ["pause", "state"]}

# Files about limits, which are not judged with `--v2`: a hybrid host's v1 has the controllers.
LIMITS = {"crun": ["limits", "resources", "update"], "runc": ["cgroups", "events", "update"]}

# Puts cgroup v2 alone into a mount namespace.
V2 = "mount --make-rprivate /; { umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup; } || exit 1;"

# Cases that are about a runtime's own name or a build option, not about containers.
NOT_JUDGED = [
    ("runc help.bats", "the text of runc's own help"),
    ("runc version.bats", "the text of runc's own version"),
    ("runc debug.bats", "debug messages of runc's own functions"),
    ("runc exec.bats: runc --debug", "the same"),
    ("runc cgroups.bats: runc run/create should warn about a non-empty cgroup", "we refuse: each would kill the other"),
    ("crun test_start.py: start", "reads crun's own state file"),
    ("crun test_start.py: listen_pid_env", "an option of crun's"),
    ("crun test_exec.py: exec_add_no_new_privileges", "the container's own setting holds, as with runc"),
]


# What we fail and runc passes, with what is missing.
KNOWN = {
}


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


@contextlib.contextmanager
def made_once(directory):
    """Yields a scratch directory that becomes `directory` when all went well, or nothing when it exists already."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            yield None
            return
        scratch = pathlib.Path(tempfile.mkdtemp(dir=CACHE))
        try:
            yield scratch
            scratch.chmod(0o755)
            scratch.rename(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def source_lists(directory):
    """The machine's own Debian sources, asked for source packages; its configuration is not touched."""
    found = []
    for path in [pathlib.Path("/etc/apt/sources.list"), *pathlib.Path("/etc/apt/sources.list.d").glob("*")]:
        if not path.is_file():
            continue
        text = path.read_text()
        if path.suffix == ".sources" and "debian-archive-keyring" in text:
            text = re.sub(r"^Types:.*$", "Types: deb-src", text, flags=re.M)
        elif path.suffix == ".list" and "debian" in text:
            text = re.sub(r"^deb\s", "deb-src ", text, flags=re.M)
        else:
            continue
        (directory / path.name).write_text(text)
        found.append(path.name)
    if not found:
        raise SystemExit("judge: the machine has no Debian package sources below /etc/apt")


def version_of(package):
    query = ["dpkg-query", "--show", "--showformat=${source:Version}", package]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout


def suite_source(package):
    """The unpacked source of the installed version of a package."""
    version = version_of(package)
    directory = CACHE / f"judge-{package}-{re.sub(r'[^A-Za-z0-9.+~-]', '_', version)}"
    with made_once(directory) as scratch:
        if scratch:
            with tempfile.TemporaryDirectory() as apt:
                apt = pathlib.Path(apt)
                for sub in ["parts", "lists/partial", "cache/archives/partial"]:
                    (apt / sub).mkdir(parents=True)
                source_lists(apt / "parts")
                options = ["-qq", "-o", "Dir::Etc::sourcelist=/dev/null", "-o", f"Dir::Etc::sourceparts={apt}/parts"]
                options += ["-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"]
                options += ["-o", "APT::Sandbox::User=root"]
                run("apt-get", *options, "update", cwd=apt, stdout=sys.stderr)
                run("apt-get", *options, "source", "--download-only", f"{package}={version}", cwd=apt, stdout=sys.stderr)
                description = next(apt.glob("*.dsc"))
                unpack = ["dpkg-source", "--no-check", "-x", description, scratch / "source"]
                run(*unpack, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return directory / "source"


def busybox_image(path):
    """A root file system of Debian's static busybox, as a tar archive."""
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        for sub in ["bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr/bin", "usr/sbin", "sbin", "var/tmp"]:
            (root / sub).mkdir(parents=True)
        root.chmod(0o755)
        (root / "tmp").chmod(0o1777)
        shutil.copy2("/bin/busybox", root / "bin/busybox")
        applets = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout
        for applet in applets.split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
        (root / "etc/group").write_text("root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")


class Crun:
    """crun's own suite: a program of test functions a file, and a C program that is every container's init."""

    name = "crun"
    seconds_max = 90

    def __init__(self, work):
        self.work = work
        self.tests = suite_source("crun") / "tests"
        self.init = work / "init"
        (work / "config.h").write_text("#define HAVE_SECCOMP 1\n")
        run("cc", "-static", "-w", "-O1", "-I", work, "-o", self.init, self.tests / "init.c", "-lseccomp")

    def files(self):
        return sorted(path.stem.removeprefix("test_") for path in self.tests.glob("test_*.py"))

    def command(self, file):
        return ["python3", "-B", self.tests / f"test_{file}.py"]

    def environment(self, runtime, scratch):
        # One file looks for the init here, whatever the variable says.
        (scratch / "tests").mkdir()
        (scratch / "tests/init").symlink_to(self.init)
        return {"OCI_RUNTIME": runtime_for_crun(runtime, scratch), "INIT": self.init}

    def label(self, file):
        return f"test_{file}.py"


class Runc:
    """runc's own suite, in bats. Its helpers are Go programs; ours speak the same protocols."""

    name = "runc"
    seconds_max = 240

    def __init__(self, work):
        source = suite_source("runc")
        self.tree = work / "runc"
        shutil.copytree(source, self.tree, symlinks=True)
        self.tests = self.tree / "tests/integration"
        for helper, program in [("recvtty", "recvtty.py"), ("seccompagent", "seccomp_agent.py")]:
            target = self.tree / "contrib/cmd" / helper / helper
            target.unlink(missing_ok=True)
            target.symlink_to(HERE / program)
        images = work / "busybox.tar"
        busybox_image(images)
        debian = subprocess.run([HERE / "../../run/guest-image.sh"], check=True, capture_output=True, text=True)
        template = pathlib.Path(debian.stdout.strip()) / "template.tar.zst"
        script = f"#!/bin/sh\necho BUSYBOX_IMAGE={images}\necho DEBIAN_IMAGE={template}\n"
        (self.tests / "get-images.sh").write_text(script)
        (self.tests / "get-images.sh").chmod(0o755)

    def files(self):
        return sorted(path.stem for path in self.tests.glob("*.bats"))

    def command(self, file):
        # Some cases need a terminal.
        inner = f"bats --tap {self.tests}/{file}.bats"
        return ["script", "--quiet", "--return", "--flush", "--command", inner, "/dev/null"]

    def environment(self, runtime, _scratch):
        return {"RUNC": runtime, "TERM": "dumb"}

    def label(self, file):
        return f"{file}.bats"


def runtime_for_crun(runtime, scratch):
    """crun's suite gives options that runc does not have; a script drops those that say the default."""
    if "runc" not in pathlib.Path(runtime).name:
        return runtime
    wrapper = scratch / "runc"
    wrapper.write_text(f"""#!/bin/bash
words=()
while [ $# -gt 0 ]; do
    case $1 in
        --cgroup-manager | --config) shift ;;
        *) words+=("$1") ;;
    esac
    shift
done
exec {runtime} "${{words[@]}}"
""")
    wrapper.chmod(0o755)
    return wrapper


RESULT = re.compile(r"^(not ok|ok) \d+ -? ?(.*)$")


def verdicts(output):
    """Cases and what became of them, from the lines of the Test Anything Protocol."""
    found = {}
    for line in output.replace("\r", "").split("\n"):
        match = RESULT.match(line)
        if match:
            case, _, remark = match[2].partition("#")
            case = re.sub(r" in \d+ms$", "", case.strip())
            skipped = remark.strip().lower().startswith("skip")
            found[case] = "fail" if match[1] == "not ok" else "skip" if skipped else "ok"
    return found


def judged(suite, file, name, runtime, work, logs, v2):
    """Runs one file against one runtime, in namespaces that end with it. Answers its cases' verdicts."""
    scratch = pathlib.Path(tempfile.mkdtemp(dir=work))
    scratch.chmod(0o711)
    environment = {**os.environ, "TMPDIR": str(scratch), "LANG": "C"}
    environment |= {key: str(value) for key, value in suite.environment(runtime, scratch).items()}
    # crun 1.8 refuses a host that has cgroup v1 and v2 both.
    hybrid = "umount /sys/fs/cgroup/unified 2>/dev/null;" if name == "crun" else ""
    setup = V2 if v2 else hybrid
    # runc 1.1 gives its containers' users whatever their input is, also the host's /dev/null.
    setup += f"mknod -m 666 {scratch}/null c 1 3 && mount --bind {scratch}/null /dev/null;"
    # One case wants process ids of five digits.
    inner = f'mount --make-rprivate /; {setup} cd {scratch}; echo 20000 > /proc/sys/kernel/ns_last_pid; exec "$@"'
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", inner, "sh"]
    command += [str(word) for word in suite.command(file)]
    log = logs / f"{suite.name}-{file}-{name}.log"
    with open(log, "wb") as output:
        # The input is never written to: script(1) turns in circles at the end of its input.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=scratch
        )
        try:
            process.wait(suite.seconds_max)
        except subprocess.TimeoutExpired:
            process.kill()
            # What is frozen does not even die.
            while process.poll() is None:
                thaw(scratch)
                time.sleep(0.1)
            output.write(b"\nnot ok 0 the file did not end\n")
    shutil.rmtree(scratch, ignore_errors=True)
    return verdicts(log.read_text(errors="replace"))


def thaw(scratch):
    """Thaws what runs below a directory: processes that name it in their mounts, whatever cgroup they are in."""
    for states in pathlib.Path("/sys/fs/cgroup/freezer").glob("**/freezer.state"):
        with contextlib.suppress(OSError):
            if states.read_text() == "THAWED\n":
                continue
            mounts = [pathlib.Path(f"/proc/{pid}/mountinfo") for pid in (states.parent / "tasks").read_text().split()]
            if any(str(scratch) in mount.read_text() for mount in mounts):
                states.write_text("THAWED")


def sweep():
    """Removes the cgroups that the suites leave."""
    for hierarchy in pathlib.Path("/sys/fs/cgroup").iterdir():
        for left in ["runc-cgroups-integration-test"]:
            for directory, _, _ in os.walk(hierarchy / left, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def table(suites, runtimes, arguments, work, logs):
    """Every row: suite, file, case and its verdicts by runtime."""
    jobs = {}
    with contextlib.ExitStack() as lanes:
        # One file of a runtime at a time: the containers of all files have the same names, and so the same cgroups.
        pools = {name: lanes.enter_context(concurrent.futures.ThreadPoolExecutor(1)) for name in runtimes}
        for suite in suites:
            fast = FAST_V2 if arguments.v2 else FAST
            wanted = fast[suite.name] if arguments.fast else None
            for file in suite.files():
                if wanted is not None and file not in wanted:
                    continue
                if arguments.v2 and file in LIMITS[suite.name]:
                    continue
                if arguments.only and not re.search(arguments.only, f"{suite.name}/{file}"):
                    continue
                for name, runtime in runtimes.items():
                    job = pools[name].submit(judged, suite, file, name, runtime, work, logs, arguments.v2)
                    jobs[suite.name, file, name] = (suite, job)
        rows = {}
        for (suite_name, file, name), (suite, job) in jobs.items():
            for case, verdict in job.result().items():
                rows.setdefault((suite_name, suite.label(file), case), {})[name] = verdict
    return rows


def report(rows, runtimes, output):
    """Writes the table, prints the totals and what only we fail. Answers whether that is nothing, and something passes."""
    lines = ["\t".join(["suite", "file", "case", *runtimes])]
    ours = []
    for (suite, file, case), found in sorted(rows.items()):
        lines.append("\t".join([suite, file, case, *(found.get(name, "-") for name in runtimes)]))
        name = f"{suite} {file}: {case}"
        if found.get("atoll-ct") in ("ok", "skip") or any(name.startswith(start) for start, _ in NOT_JUDGED):
            continue
        passed = [peer for peer in ("crun", "runc") if found.get(peer) == "ok"]
        if passed:
            ours.append((name, passed))
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(output).write_text("\n".join(lines) + "\n")
    for suite in dict.fromkeys(key[0] for key in rows):
        for name in runtimes:
            counts = [found.get(name, "-") for key, found in rows.items() if key[0] == suite]
            numbers = ", ".join(f"{counts.count(word)} {word}" for word in ("ok", "skip", "fail", "-"))
            print(f"{suite}'s suite on {name}: {numbers}")
    for case, passed in ours:
        print(f"fails only here ({' and '.join(passed)} pass): {case}")
    if not any(found.get("atoll-ct") == "ok" for found in rows.values()):
        print("no case passes: nothing was judged")
        return False
    return not any("runc" in passed and case not in KNOWN for case, passed in ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, help="path of atoll-ct")
    parser.add_argument("--output", default="target/test/judges.tsv")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--fast", action="store_true", help="the subset of `make test`")
    parser.add_argument("--v2", action="store_true", help="with cgroup v2 alone, whatever this host has")
    parser.add_argument("--only", help="regular expression of suite/file")
    parser.add_argument("--logs", help="keep every file's output in this directory")
    arguments = parser.parse_args()
    paths = {"atoll-ct": str(pathlib.Path(arguments.ours).resolve()), "crun": shutil.which("crun"), "runc": shutil.which("runc")}
    runtimes = {name: paths[name] for name in arguments.runtimes.split(",")}
    with tempfile.TemporaryDirectory(prefix="judge.") as work:
        work = pathlib.Path(work)
        work.chmod(0o711)
        logs = pathlib.Path(arguments.logs) if arguments.logs else work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if arguments.v2 and subprocess.run(["unshare", "--mount", "sh", "-c", V2]).returncode != 0:
            print("cgroup v2 cannot be mounted alone here")
            return 77
        try:
            suites = [Crun(work), Runc(work)]
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"the suites cannot be made ready: {error}")
            return 77
        # One run at a time, for the same reason as one file at a time.
        with open(CACHE / "judge.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                rows = table(suites, runtimes, arguments, work, logs)
            finally:
                sweep()
    return 0 if report(rows, list(runtimes), arguments.output) else 1


if __name__ == "__main__":
    sys.exit(main())
