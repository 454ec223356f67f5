# SPDX-License-Identifier: Apache-2.0
"""What a new image shall be like (qapi/block-core.json, ``BlockdevCreateOptions``): the options of each format.

``blockdev-create`` takes them as they are; the library and the tools build them from names as users know them from
qemu-img, see ``images``. And what of an image can be changed later: ``BlockdevAmendOptions``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.block import BlockdevDriver, BlockdevRef, QCryptoBlockOptionsQCow
from bottomhalf.qapi.types import Command, Doc, Size, Struct, TaggedUnion


class PreallocMode(StrEnum):
    """How much of a new image's space is taken at once."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class BlockdevQcow2Version(StrEnum):
    """Version of the format; qemu-img calls them compat 0.10 and 1.1."""

    V2 = "v2"
    V3 = "v3"


class Qcow2CompressionType(StrEnum):
    """How clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class QCryptoCipherAlgo(StrEnum):
    """Ciphers, with the bits of their keys."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"


class QCryptoCipherMode(StrEnum):
    """How a cipher's blocks are chained."""

    CBC = "cbc"
    XTS = "xts"


class QCryptoIVGenAlgo(StrEnum):
    """Where a sector's vector comes from."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgo(StrEnum):
    """Hashes."""

    SHA1 = "sha1"
    SHA256 = "sha256"
    SHA512 = "sha512"


class QCryptoBlockFormat(StrEnum):
    """Kinds of encryption."""

    QCOW = "qcow"
    LUKS = "luks"


class QCryptoBlockCreateOptionsLUKS(Struct):
    """A new LUKS header."""

    key_secret: Annotated[str | None, Doc("secret that holds the password, which is needed")] = None
    cipher_alg: Annotated[QCryptoCipherAlgo | None, Doc("cipher", default="aes-256")] = None
    cipher_mode: Annotated[QCryptoCipherMode | None, Doc("chaining", default="xts")] = None
    ivgen_alg: Annotated[QCryptoIVGenAlgo | None, Doc("vectors of sectors", default="plain64")] = None
    ivgen_hash_alg: Annotated[QCryptoHashAlgo | None, Doc("hash for essiv", default="sha256")] = None
    hash_alg: Annotated[QCryptoHashAlgo | None, Doc("hash for passwords", default="sha256")] = None
    iter_time: Annotated[
        int | None, Doc("milliseconds that trying a password takes", default="2000", name="iter-time")
    ] = None


class QCryptoBlockCreateOptions(
    TaggedUnion,
    tag="format",
    branches={"qcow": QCryptoBlockOptionsQCow, "luks": QCryptoBlockCreateOptionsLUKS},
):
    """The encryption of a new image."""

    format: Annotated[QCryptoBlockFormat, Doc("kind of encryption")]


class BlockdevCreateOptionsFile(Struct):
    """A new file. One that is there is written over."""

    filename: Annotated[str, Doc("its path")]
    size: Annotated[Size, Doc("bytes")]
    preallocation: Annotated[PreallocMode | None, Doc("take space at once; not metadata", default="off")] = None
    nocow: Annotated[bool | None, Doc("where the file system could, it does not copy on write", default="off")] = None
    extent_size_hint: Annotated[
        Size | None, Doc("bytes that the file system should allocate at a time", default="1 MiB")
    ] = None


class BlockdevCreateOptionsLUKS(QCryptoBlockCreateOptionsLUKS):
    """A new LUKS volume."""

    file: Annotated[BlockdevRef | None, Doc("node that gets the volume")] = None
    header: Annotated[BlockdevRef | None, Doc("node that gets the header", default="the volume itself")] = None
    size: Annotated[Size, Doc("bytes of the disk")]
    preallocation: Annotated[PreallocMode | None, Doc("take space at once", default="off")] = None


class BlockdevCreateOptionsQcow2(Struct):
    """A new qcow2 image."""

    file: Annotated[BlockdevRef, Doc("node that gets the image")]
    data_file: Annotated[BlockdevRef | None, Doc("node that gets the guest's data", default="the image itself")] = None
    data_file_raw: Annotated[
        bool | None, Doc("the data file is a raw image of the disk, for others to read", default="off")
    ] = None
    extended_l2: Annotated[bool | None, Doc("allocate in parts of a cluster", default="off")] = None
    size: Annotated[Size, Doc("bytes of the disk")]
    version: Annotated[BlockdevQcow2Version | None, Doc("version of the format", default="v3")] = None
    backing_file: Annotated[str | None, Doc("what unallocated clusters read from")] = None
    backing_fmt: Annotated[BlockdevDriver | None, Doc("format of the backing file")] = None
    encrypt: Annotated[QCryptoBlockCreateOptions | None, Doc("encryption", default="none")] = None
    cluster_size: Annotated[Size | None, Doc("bytes of a cluster", default="65536")] = None
    preallocation: Annotated[PreallocMode | None, Doc("take space at once", default="off")] = None
    lazy_refcounts: Annotated[bool | None, Doc("allow refcounts to be written late", default="off")] = None
    refcount_bits: Annotated[int | None, Doc("width of a reference count", default="16")] = None
    compression_type: Annotated[Qcow2CompressionType | None, Doc("how to compress", default="zlib")] = None


class BlockdevCreateOptions(
    TaggedUnion,
    tag="driver",
    branches={
        "file": BlockdevCreateOptionsFile,
        "luks": BlockdevCreateOptionsLUKS,
        "qcow2": BlockdevCreateOptionsQcow2,
    },
):
    """A new image, by the driver that makes it."""

    driver: Annotated[BlockdevDriver, Doc("driver; those that are not listed cannot make images")]


class BlockdevCreate(Command, name="blockdev-create"):
    """Make an image in the background. The job has to be dismissed."""

    job_id: Annotated[str, Doc("id of the job")]
    options: Annotated[BlockdevCreateOptions, Doc("the image")]


class QCryptoBlockLUKSKeyslotState(StrEnum):
    """Whether a keyslot opens the volume."""

    ACTIVE = "active"
    INACTIVE = "inactive"


class QCryptoBlockAmendOptionsLUKS(Struct):
    """What of a LUKS header is to be changed."""

    state: Annotated[QCryptoBlockLUKSKeyslotState, Doc("active: add a password; inactive: take passwords away")]
    new_secret: Annotated[str | None, Doc("secret that holds the password to add")] = None
    old_secret: Annotated[str | None, Doc("secret that holds the password to take away, wherever it is")] = None
    keyslot: Annotated[int | None, Doc("number of the slot", default="active: one that is free")] = None
    iter_time: Annotated[
        int | None, Doc("milliseconds that trying the password takes", default="2000", name="iter-time")
    ] = None
    secret: Annotated[str | None, Doc("secret that opens the volume", default="the one it was opened with")] = None


class QCryptoBlockAmendOptions(TaggedUnion, tag="format", branches={"luks": QCryptoBlockAmendOptionsLUKS}):
    """What of the encryption is to be changed."""

    format: Annotated[QCryptoBlockFormat, Doc("kind of encryption, which it has already")]


class BlockdevAmendOptionsLUKS(QCryptoBlockAmendOptionsLUKS):
    """Passwords of a LUKS volume."""


class BlockdevAmendOptionsQcow2(Struct):
    """What of a qcow2 image can be changed while it is open."""

    encrypt: Annotated[QCryptoBlockAmendOptions | None, Doc("passwords")] = None


class BlockdevAmendOptions(
    TaggedUnion, tag="driver", branches={"luks": BlockdevAmendOptionsLUKS, "qcow2": BlockdevAmendOptionsQcow2}
):
    """What of an image is to be changed, by its driver."""

    driver: Annotated[BlockdevDriver, Doc("driver, which the node has already")]


class XBlockdevAmend(Command, name="x-blockdev-amend", features=("unstable",)):
    """Change an image in the background. The job has to be dismissed."""

    job_id: Annotated[str, Doc("id of the job")]
    node_name: Annotated[str, Doc("node of the image")]
    options: Annotated[BlockdevAmendOptions, Doc("the changes")]
    force: Annotated[bool | None, Doc("also what makes data unreadable", default="off")] = None
