# SPDX-License-Identifier: Apache-2.0
"""TLS with programs that we did not write (GnuTLS under all but one): both our ends, who may come in, who not."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.peers import certificates
from tests.peers.certificates import Authority, Issued, name_of
from tests.peers.programs import Spawned

pytestmark = pytest.mark.peer

MIB = 1 << 20
NO_PSK = "needs Python 3.13, whose ssl knows pre-shared keys"
SECONDS_MAX = 60
OURS = {name: [sys.executable, "-m", f"bottomhalf.tools.{name}"] for name in ("bh_nbd", "bh_storage_daemon")}
OUR_NAME = "bh_nbd.py:"  # as it is run here
HOSTS = ("localhost", "127.0.0.1")
# A name with everything in it that has to be escaped.
FRED = name_of(
    (certificates.NameOID.COUNTRY_NAME, "GB"),
    (certificates.NameOID.ORGANIZATION_NAME, 'A, B "C"; <x>'),
    (certificates.NameOID.COMMON_NAME, "fred#1 "),
)
FRED_TEXT = 'C=GB,O=A\\, B \\"C\\"\\; \\<x\\>,CN=fred#1\\ '


class Pki:
    """Directories of credentials: ``good`` is both ends', ``other`` of an authority that nobody here believes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.server: Issued = self.authority.issue("localhost", hosts=HOSTS)
        self.client: Issued = self.authority.issue(FRED)
        self.good = certificates.write(folder / "good", self.authority, server=self.server, client=self.client)
        stranger = Authority("Other CA")
        self.other = certificates.write(
            folder / "other",
            stranger,
            server=stranger.issue("localhost", hosts=HOSTS),
            client=stranger.issue("mallory"),
        )
        self.nobody = certificates.write(folder / "nobody", self.authority)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def creds(directory: Path, endpoint: str, more: str = "") -> list[str]:
    return ["--object", f"tls-creds-x509,id=t,dir={directory},endpoint={endpoint}{more}"]


def run(words: Sequence[str | Path], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=SECONDS_MAX, check=False, **more
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def image(folder: Path) -> Path:
    path = folder / "disk.raw"
    path.write_bytes(os.urandom(MIB) * 4)
    return path


class Served:
    """An image behind TLS, on a Unix socket."""

    def __init__(
        self,
        spawn: Callable[..., Spawned],
        program: Sequence[str],
        folder: Path,
        directory: Path,
        more: Sequence[str] = (),
    ) -> None:
        self.image = image(folder)
        self.socket = folder / "nbd.sock"
        self.child = spawn(
            [
                *program,
                *creds(directory, "server"),
                *("--tls-creds", "t", "-f", "raw", "-t", "-e", "0", "-k", self.socket, "-x", "disk"),
                *more,
                self.image,
            ],
            ready=self.socket,
        )

    def uri(self, directory: Path) -> str:
        """For libnbd; a certificate of that directory."""
        return f"nbds+unix:///disk?socket={self.socket}&tls-certificates={directory}&tls-hostname=localhost"

    def options(self, hostname: str = "localhost") -> list[str]:
        """For QEMU's tools."""
        text = f"driver=nbd,server.type=unix,server.path={self.socket},export=disk,tls-creds=t,tls-hostname={hostname}"
        return ["--image-opts", text]


@pytest.fixture
def served(spawn: Callable[..., Spawned], tmp_path: Path, pki: Pki) -> Served:
    return Served(spawn, OURS["bh_nbd"], tmp_path, pki.good)


# Our server


def test_libnbd_reads_and_copies(served: Served, require: Callable[[str], str], pki: Pki, tmp_path: Path) -> None:
    shown = json.loads(run([require("nbdinfo"), "--json", served.uri(pki.good)]).stdout)
    assert shown["TLS"] is True and shown["exports"][0]["export-size"] == 4 * MIB
    copied = tmp_path / "copy.raw"
    done = run([require("nbdcopy"), served.uri(pki.good), copied])
    assert done.returncode == 0, done.stderr
    assert copied.read_bytes() == served.image.read_bytes()
    copied.write_bytes(os.urandom(4 * MIB))
    done = run([require("nbdcopy"), copied, served.uri(pki.good)])
    assert done.returncode == 0, done.stderr
    assert copied.read_bytes() == served.image.read_bytes()


def test_qemu_reads_and_writes(served: Served, require: Callable[[str], str], pki: Pki) -> None:
    """qemu-io, with many requests at once and sizes beyond what a record holds."""
    client = creds(pki.good, "client")
    asked = [f"write -P {n + 1} {n * 300}k 300k" for n in range(10)]
    asked += [f"aio_read -q -P {n + 1} {n * 300}k 300k" for n in range(10)] + ["aio_flush", "read -P 3 600k 300k"]
    commands = [word for each in asked for word in ("-c", each)]
    done = run([require("qemu-io"), *client, *served.options(), *commands])
    assert done.returncode == 0 and "verification failed" not in done.stdout, done.stdout + done.stderr
    data = served.image.read_bytes()
    for n in range(10):
        assert data[n * 300 << 10 : (n + 1) * 300 << 10] == bytes([n + 1]) * (300 << 10)
    local = f"driver=raw,file.filename={served.image}"
    compared = run([require("qemu-img"), "compare", *client, *served.options(), local])
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_who_is_sent_away(served: Served, require: Callable[[str], str], pki: Pki) -> None:
    """No certificate, one of a stranger, another name, no TLS."""
    size = [require("nbdinfo"), "--size"]
    for directory in (pki.nobody, pki.other):
        assert run([*size, served.uri(directory)]).returncode != 0
    assert run([*size, f"nbd+unix:///disk?socket={served.socket}"]).returncode != 0
    wrong = run([require("qemu-img"), "info", *creds(pki.good, "client"), *served.options("elsewhere")])
    assert wrong.returncode != 0 and "Certificate does not match the hostname elsewhere" in wrong.stderr
    assert run([*size, served.uri(pki.good)]).stdout == f"{4 * MIB}\n"  # it serves on


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_versions(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path, version: str
) -> None:
    """A client of GnuTLS with one version only."""
    served = Served(spawn, OURS["bh_nbd"], tmp_path, pki.good)
    priority = f",priority=NORMAL:-VERS-ALL:+VERS-TLS{version}"
    done = run([require("qemu-io"), *creds(pki.good, "client", priority), *served.options(), "-c", "read 0 1M"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("server", ["ours", "qemu-nbd"])
def test_lists_are_asked(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path, server: str
) -> None:
    """The same list and the same certificate: the same name."""
    program = OURS["bh_nbd"] if server == "ours" else [require("qemu-nbd")]
    for rule, admitted in ((FRED_TEXT, True), (FRED_TEXT.lower(), False)):
        rules = [{"match": rule, "policy": "allow"}]
        authz = json.dumps({"qom-type": "authz-list", "id": "az", "policy": "deny", "rules": rules})
        folder = tmp_path / str(admitted)
        folder.mkdir()
        served = Served(spawn, program, folder, pki.good, ["--object", authz, "--tls-authz", "az"])
        done = run([require("nbdinfo"), "--size", served.uri(pki.good)])
        assert (done.returncode == 0) is admitted, done.stderr
        served.child.stop()


def test_revoked_certificate(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path
) -> None:
    directory = certificates.write(tmp_path / "crl", pki.authority, server=pki.server)
    gone = pki.authority.issue("gone")
    (directory / "ca-crl.pem").write_bytes(pki.authority.revoke(gone))
    lost = certificates.write(tmp_path / "gone", pki.authority, client=gone)
    served = Served(spawn, OURS["bh_nbd"], tmp_path, directory)
    assert run([require("nbdinfo"), "--size", served.uri(pki.good)]).returncode == 0
    assert run([require("nbdinfo"), "--size", served.uri(lost)]).returncode != 0


def test_anonymous_credentials(
    spawn: Callable[..., Spawned], require: Callable[[str], str], tmp_path: Path
) -> None:
    """Diffie-Hellman without certificates, with GnuTLS at the other end; and the other way round."""
    anon = "tls-creds-anon,id=t,priority=NORMAL:-VERS-TLS1.3:+ANON-DH,endpoint="
    disk = image(tmp_path)
    for number, (server, lister) in enumerate(
        ((OURS["bh_nbd"], [require("qemu-nbd")]), ([require("qemu-nbd")], OURS["bh_nbd"]))
    ):
        path = tmp_path / f"{number}.sock"
        child = spawn(
            [*server, "--object", f"{anon}server", "--tls-creds", "t", "-f", "raw", "-t", "-k", path, disk], ready=path
        )
        listed = run([*lister, "--object", f"{anon}client", "--tls-creds", "t", "-L", "-k", path])
        assert listed.returncode == 0 and "exports available: 1" in listed.stdout, listed.stderr + child.output()
        child.stop()


@pytest.mark.skipif(not hasattr(ssl.SSLContext, "set_psk_server_callback"), reason=NO_PSK)
def test_keys_that_both_ends_know(
    spawn: Callable[..., Spawned], require: Callable[[str], str], tmp_path: Path
) -> None:
    """Pre-shared keys, with GnuTLS at the other end, in both versions; and the other way round."""
    keys, wrong = tmp_path / "keys", tmp_path / "wrong"
    for folder, key in ((keys, "cd"), (wrong, "ee")):
        folder.mkdir()
        (folder / "keys.psk").write_text(f"fred:{'ab' * 32}\nqemu:{key * 32}\n")
    disk = image(tmp_path)
    old = ",priority=NORMAL:-VERS-TLS1.3:+ECDHE-PSK:+DHE-PSK:+PSK"
    for number, (server, lister) in enumerate(
        ((OURS["bh_nbd"], [require("qemu-nbd")]), ([require("qemu-nbd")], OURS["bh_nbd"]))
    ):
        path = tmp_path / f"{number}.sock"
        words = ["--object", f"tls-creds-psk,id=t,dir={keys},endpoint=server", "--tls-creds", "t", "-f", "raw"]
        child = spawn([*server, *words, "-t", "-e", "0", "-k", path, "-x", "disk", disk], ready=path)
        cases = ((keys, "", True), (keys, ",username=fred", True), (keys, old, True), (wrong, "", False))
        for folder, more, admitted in cases:
            client = ["--object", f"tls-creds-psk,id=t,dir={folder},endpoint=client{more}", "--tls-creds", "t"]
            listed = run([*lister, *client, "-L", "-k", path])
            assert ("exports available: 1" in listed.stdout) is admitted, listed.stderr + child.output()
        uri = f"nbds+unix://fred@/disk?socket={path}&tls-psk-file={keys / 'keys.psk'}"
        assert run([require("nbdinfo"), "--size", uri]).stdout == f"{4 * MIB}\n"
        child.stop()


def test_a_handshake_without_starttls(served: Served, require: Callable[[str], str], pki: Pki) -> None:
    """openssl s_client says hello at once: it is no NBD client."""
    done = run([require("openssl"), "s_client", "-unix", served.socket, "-CAfile", pki.good / "ca-cert.pem"], input="")
    assert done.returncode != 0


# Our client


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit", "ours"])
def test_our_list_of(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path, server: str
) -> None:
    if server == "nbdkit":
        path = tmp_path / "nbd.sock"
        options = ["--tls=require", f"--tls-certificates={pki.good}", "--tls-verify-peer"]
        spawn([require("nbdkit"), "-f", "-U", path, *options, "memory", "1M"], ready=path)
    else:
        program = OURS["bh_nbd"] if server == "ours" else [require("qemu-nbd")]
        path = Served(spawn, program, tmp_path, pki.good).socket
    ours = [*OURS["bh_nbd"], "-L", "-k", path, "--tls-creds", "t", "--tls-hostname"]
    listed = run([*ours, "localhost", *creds(pki.good, "client")])
    assert listed.returncode == 0 and "exports available: 1" in listed.stdout, listed.stderr
    wrong = run([*ours, "elsewhere", *creds(pki.good, "client")])
    assert wrong.returncode == 1 and wrong.stderr == f"{OUR_NAME} Certificate does not match the hostname elsewhere\n"
    stranger = run([*ours, "localhost", *creds(pki.other, "client")])
    assert stranger.returncode == 1 and stranger.stderr == f"{OUR_NAME} The certificate hasn't got a known issuer\n"
    nobody = run([*ours, "localhost", *creds(pki.nobody, "client")])
    assert nobody.returncode == 1 and "Traceback" not in nobody.stderr
    plain = run([*OURS["bh_nbd"], "-L", "-k", path])
    assert plain.returncode == 1 and "Did you forget a valid tls-creds?" in plain.stderr


def test_our_list_of_a_server_without_tls(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path
) -> None:
    path = tmp_path / "nbd.sock"
    spawn([require("qemu-nbd"), "-f", "raw", "-t", "-k", path, image(tmp_path)], ready=path)
    ours, theirs = (
        run([*program, "-L", "-k", path, "--tls-creds", "t", "--tls-hostname", "localhost", *creds(pki.good, "client")])
        for program in (OURS["bh_nbd"], [require("qemu-nbd")])
    )
    assert ours.returncode == theirs.returncode == 1
    assert ours.stderr == theirs.stderr.replace("qemu-nbd:", OUR_NAME)


# Monitors


def qmp(*commands: str) -> str:
    return "".join(json.dumps({"execute": name}) + "\n" for name in ("qmp_capabilities", *commands))


@pytest.mark.parametrize("daemon", ["ours", "qemu"])
def test_a_monitor_for_openssl(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, daemon: str
) -> None:
    """openssl s_client speaks QMP, and in between asks for new keys (K), which both ends must survive."""
    program = OURS["bh_storage_daemon"] if daemon == "ours" else [require("qemu-storage-daemon")]
    port = free_port()
    chardev = f"socket,id=q,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=t"
    spawn([*program, *creds(pki.good, "server"), "--chardev", chardev, "--monitor", "q"], ready=("127.0.0.1", port))
    files = {"-CAfile": "ca-cert.pem", "-cert": "client-cert.pem", "-key": "client-key.pem"}
    own = [word for option, name in files.items() for word in (option, str(pki.good / name))]
    with subprocess.Popen(
        [require("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *own],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as client:
        assert client.stdin is not None and client.stdout is not None

        def until(word: str) -> str:
            for line in client.stdout:  # type: ignore[union-attr]
                if word in line:
                    return line
            raise AssertionError(f"no {word}")

        until('"QMP"')
        client.stdin.write(json.dumps({"execute": "qmp_capabilities"}) + "\n")
        until('"return"')
        for _ in range(50 if daemon == "ours" else 5):  # GnuTLS takes eight in a second
            client.stdin.write("K\n")
            client.stdin.flush()
            until("KEYUPDATE")
        client.stdin.write(json.dumps({"execute": "query-version"}) + "\n")
        assert '"qemu"' in until('"return"')
        client.stdin.write(json.dumps({"execute": "quit"}) + "\n")
        client.stdin.close()
        client.wait(SECONDS_MAX)


@pytest.mark.parametrize("listens", ["ours", "qemu"])
def test_character_devices_of_both(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path, listens: str
) -> None:
    """One daemon's monitor listens; the other's connects to it and passes on what comes from a Unix socket by way of a
    second monitor: here, its greeting is enough."""
    port = free_port()
    programs = {"ours": OURS["bh_storage_daemon"], "qemu": [require("qemu-storage-daemon")]}
    server = f"socket,id=q,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=t,logfile={tmp_path}/server.log"
    client = f"socket,id=q,host=127.0.0.1,port={port},server=off,tls-creds=t,logfile={tmp_path}/client.log"
    spawn(
        [*programs.pop(listens), *creds(pki.good, "server"), "--chardev", server, "--monitor", "q"],
        ready=("127.0.0.1", port),
    )
    other = spawn([*next(iter(programs.values())), *creds(pki.good, "client"), "--chardev", client, "--monitor", "q"])
    # Each greets the other, and answers a greeting with an error: what has been said is in the logs.
    for name in ("server.log", "client.log"):
        wait_for(tmp_path / name, b'{"error"', other)


def wait_for(path: Path, words: bytes, child: Spawned) -> None:
    import time

    for _ in range(int(SECONDS_MAX / 0.01)):
        if path.exists() and words in path.read_bytes():
            return
        assert child.process.poll() is None, child.output()
        time.sleep(0.01)
    raise AssertionError(f"{path} has no {words!r}: {path.read_bytes()!r} {child.output()}")


# Words


BAD = (
    "--tls-creds t -f raw {disk}",
    "{server} --tls-authz a {disk}",
    "--tls-hostname h {disk}",
    "{server} --tls-creds t --tls-hostname h -f raw {disk}",
    "{client} --tls-creds t -f raw {disk}",
    "{client} --tls-creds t --tls-authz x -L",
    "-L --tls-creds nix",
    "{server} -L --tls-creds t",
    "--object secret,id=t,data=x --tls-creds t {disk} -f raw",
    "--object tls-creds-x509,id=t,dir=/nix,endpoint=server {disk}",
    "--object tls-creds-x509,id=t,endpoint=server {disk}",
    "--object tls-creds-x509,id=t,dir={pki}/nobody,endpoint=server {disk}",
    "--object tls-creds-psk,id=t,dir=/nix,endpoint=server {disk}",
    "--object authz-simple,id=t {disk}",
)


@pytest.mark.parametrize("line", BAD)
def test_mistakes_in_the_same_words(require: Callable[[str], str], pki: Pki, tmp_path: Path, line: str) -> None:
    server, client = (" ".join(creds(pki.good, end)) for end in ("server", "client"))
    words = line.format(server=server, client=client, disk=image(tmp_path), pki=pki.folder).split()
    theirs = run([require("qemu-nbd"), *words])
    ours = run([*OURS["bh_nbd"], *words])
    assert ours.stderr == theirs.stderr.replace("qemu-nbd:", OUR_NAME)
    assert ours.returncode == theirs.returncode


# The page


def test_the_page_leads_to_a_disk(
    spawn: Callable[..., Spawned], require: Callable[[str], str], tmp_path: Path
) -> None:
    """The commands of docs/tls.md make certificates that all ends take, with the name that the list asks for."""
    require("openssl")
    page = (Path(__file__).parents[2] / "docs" / "tls.md").read_text()
    script = page.partition("```sh\n")[2].partition("```")[0]
    done = run(["bash", "-e", "-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, disk = tmp_path / "s.sock", image(tmp_path)
    uri = f"nbds+unix:///disk?socket={path}&tls-hostname=localhost&tls-certificates={tmp_path / 'client'}"
    serve = [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "serve", "--tls", tmp_path / "server", "-k", path]
    laptop = "O=Example,CN=laptop"
    for allowed, admitted in (([laptop], True), (["CN=laptop"], False), (["x", laptop], True)):
        options = [word for name in allowed for word in ("--tls-allow", name)]
        served = spawn([*serve, *options, disk], ready=path)
        assert (run([require("nbdinfo"), "--size", uri]).stdout == f"{4 * MIB}\n") is admitted, served.output()
        served.stop()
        said = served.output()
        assert f"\n  nbds+unix:///disk?socket={path}\n" in said and "&tls-certificates=DIR' copy.raw\n" in said
        assert ("CN=laptop is denied" in served.output()) is not admitted
    served = spawn([*serve, "--tls-anyone", disk], ready=path)
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    (nobody / "ca-cert.pem").write_bytes((tmp_path / "client" / "ca-cert.pem").read_bytes())
    assert run([require("nbdinfo"), "--size", uri.replace(str(tmp_path / "client"), str(nobody))]).returncode == 0
    served.stop()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--tls-anyone", "--tls-anyone and --tls-allow go with --tls"),
        ("--tls-allow x", "--tls-anyone and --tls-allow go with --tls"),
        ("--tls d --tls-allow x --tls-anyone", "--tls-anyone and --tls-allow exclude each other"),
        ("--tls /nix", "Unable to access credentials /nix/ca-cert.pem: No such file or directory"),
    ],
)
def test_serve_refuses(tmp_path: Path, options: str, text: str) -> None:
    done = run([sys.executable, "-m", "bottomhalf.tools.bottomhalf", "serve", *options.split(), image(tmp_path)])
    assert done.returncode != 0 and text in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("daemon", ["ours", "qemu"])
@pytest.mark.parametrize("mode", ["control", "readline"])
def test_the_console(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, daemon: str, mode: str
) -> None:
    """bottomhalf console --tls, to monitors of both kinds."""
    program = OURS["bh_storage_daemon"] if daemon == "ours" else [require("qemu-storage-daemon")]
    if (daemon, mode) == ("qemu", "readline"):
        mode = "control"  # QEMU's daemon has no monitor for people
    port = free_port()
    chardev = f"socket,id=q,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=t"
    spawn(
        [*program, *creds(pki.good, "server"), "--chardev", chardev, "--monitor", f"q,mode={mode}"],
        ready=("127.0.0.1", port),
    )
    console = [sys.executable, "-m", "bottomhalf.tools.bottomhalf", "console", f"127.0.0.1:{port}"]
    asked = ("-e", "query-chardev" if mode == "control" else "info chardev")
    done = run([*console, "--tls", pki.good, *asked])
    assert done.returncode == 0 and ",server=on" in done.stdout, done.stderr
    wrong = run([*console, "--tls", pki.good, "--tls-hostname", "elsewhere", *asked])
    assert wrong.returncode == 2 and "Certificate does not match the hostname elsewhere" in wrong.stderr
    nothing = run([*console, "--tls", "/nix", *asked])
    assert nothing.returncode == 2 and "Unable to access credentials /nix/ca-cert.pem" in nothing.stderr
    assert "Traceback" not in done.stderr + wrong.stderr + nothing.stderr


def test_an_iothread_serves(
    spawn: Callable[..., Spawned], require: Callable[[str], str], pki: Pki, tmp_path: Path
) -> None:
    """The connection moves to another thread after its handshake; several at once."""
    disk, path = image(tmp_path), tmp_path / "nbd.sock"
    spawn(
        [
            *OURS["bh_storage_daemon"],
            *("--object", "iothread,id=io", *creds(pki.good, "server")),
            *("--blockdev", f"driver=file,node-name=f,filename={disk}"),
            *("--nbd-server", f"addr.type=unix,addr.path={path},tls-creds=t"),
            *("--export", "type=nbd,id=e,node-name=f,name=disk,writable=on,iothread=io"),
        ],
        ready=path,
    )
    uri = f"nbds+unix:///disk?socket={path}&tls-certificates={pki.good}&tls-hostname=localhost"
    content = os.urandom(4 * MIB)
    for words in ((tmp_path / "new.raw", uri), (uri, tmp_path / "back.raw")):
        (tmp_path / "new.raw").write_bytes(content)
        done = run([require("nbdcopy"), "--connections=4", *words])
        assert done.returncode == 0, done.stderr
    assert disk.read_bytes() == (tmp_path / "back.raw").read_bytes() == content
