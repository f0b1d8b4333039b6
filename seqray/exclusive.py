"""Files that are created once and never written over: of several writers of one name exactly one is let through.

pyarrow's file systems have no conditional write, so a local file is created by a hard link, which fails where the name
is taken (on NFS too), and an object on S3 by boto3 with `If-None-Match: *`. Other stores are refused: to look first and
write then would let two writers through.
"""

import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from seqray.errors import DataError

CONFLICT_TRIES = 5


def create_file(path: Path, content: bytes) -> bool:
    """Creates a local file, whole from the first moment; false where the name is taken. OSError as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def create_object(uri: str, content: bytes, region: str | None) -> bool:
    """Creates an object on S3; false where the key is taken by another content.

    `uri` is pyarrow's, with its `scheme` and `endpoint_override`; the credentials are those of the environment, as
    pyarrow takes them. A write whose answer got lost is repeated and then finds the key taken by itself, so the content
    has to be unique to the writer. DataError when the store cannot be asked or is not S3.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise DataError(f"{uri}: creating a file exclusively on S3 needs boto3: pip install 'seqray[s3]'") from error
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise DataError(f"{uri}: exclusive files are created on a local disk or s3://, not on {parts.scheme}://")
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    host = options.get("endpoint_override")
    endpoint = f"{options.get('scheme', 'https')}://{host}" if host else None
    place = {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}
    try:
        client = boto3.client(
            "s3",
            region_name=options.get("region") or region,
            endpoint_url=endpoint,
            config=Config(s3={"addressing_style": "path"} if endpoint else {}),
        )
        return _put(client, place, content, ClientError)
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{uri}: cannot be created: {error}") from error


def _put(client: Any, place: dict[str, str], content: bytes, client_error: type[Any]) -> bool:
    for left in reversed(range(CONFLICT_TRIES)):
        try:
            client.put_object(**place, Body=content, IfNoneMatch="*")
            return True
        except client_error as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return bool(client.get_object(**place)["Body"].read() == content)
            if status != 409 or not left:  # 409: another writer of the key is under way; the next try tells who won
                raise
    raise AssertionError
