"""A real S3 server of the tests' own: moto in a process of its own, spoken to over HTTP."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
"""Credentials; what works with S3 here takes them from its environment alone."""


class Bucket:
    """A bucket on a server that listens on `port`."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self._options = f"scheme=http&endpoint_override=127.0.0.1:{port}"
        filesystem, _ = pafs.FileSystem.from_uri(f"s3://{name}?{self._options}&allow_bucket_creation=true")
        filesystem.create_dir(name)
        self.filesystem = filesystem

    def uri(self, key: str) -> str:
        """The URI of a key or folder."""
        return f"s3://{self.name}/{key}?{self._options}"

    def keys(self, folder: str = "") -> list[str]:
        """All objects under a folder, by key."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(f"{self.name}/{folder}", recursive=True))
        return sorted(info.path.removeprefix(f"{self.name}/") for info in infos if info.type == pafs.FileType.File)

    def read(self, key: str) -> bytes:
        """An object."""
        return bytes(self.filesystem.open_input_stream(f"{self.name}/{key}", compression=None).read())

    def write(self, key: str, content: bytes) -> None:
        """Puts an object."""
        with self.filesystem.open_output_stream(f"{self.name}/{key}", compression=None) as stream:
            stream.write(content)

    def put_file(self, key: str, file: Path) -> str:
        """Copies a local file there; its URI."""
        self.write(key, file.read_bytes())
        return self.uri(key)


@contextmanager
def s3_server(port: int) -> Iterator[Bucket]:
    """A bucket on a server that runs as long as the block; ENVIRONMENT has to be set."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONWARNINGS": "ignore"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
        yield Bucket("bucket", port)
    finally:
        server.kill()
        server.wait()
