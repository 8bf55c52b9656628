"""Protocols of URLs that are known by name: mounted folders, and the object stores with conditional writes."""

from __future__ import annotations

from urllib.parse import urlsplit

FOLDER = ("file", "local")
OBJECT_STORES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
}
"""Protocols of S3, GCS and Azure, and the package with fsspec's file system for each."""
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}


def protocol_of(url: str) -> str:
    """The protocol of a URL or an absolute path.

    Examples
    --------
    >>> protocol_of("s3://bucket/prefix"), protocol_of("/mnt/artifacts")
    ('s3', 'file')
    """
    return urlsplit(url).scheme or "file"


def extra_of(protocol: str) -> str:
    """The extra of this package that installs what a protocol needs."""
    return _EXTRAS.get(OBJECT_STORES.get(protocol, ""), "remote")
