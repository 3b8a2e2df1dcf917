"""safetensors files whose every byte is covered by a checksum that is checked before use.

The metadata holds one key, `arbitor`: JSON with sorted keys (several keys would be written in random order)
  {"format": 1, "kind": ..., "tensors": {name: checksum}, "checksum": ..., and what the caller adds}.
A tensor's checksum covers its name, dtype, shape and bytes; `checksum` covers the rest of the JSON.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arbitor.errors import UserError

FORMAT = 1
MAX_HEADER_BYTES = 16 << 20  # a thousand times what the largest preset needs
MAX_TEXT_BYTES = 1 << 20
SUFFIX = ".safetensors"


class DamagedError(UserError):
    """A file is missing, cut short or altered, or not ours; another copy may serve."""


class NewerError(UserError):
    """A whole file that only a later arbitor can read; another copy would be older work."""


def digest(data: bytes | memoryview, *labels: str) -> str:
    """BLAKE2b of `data` and what it is called, 128 bits in hexadecimal."""
    hasher = hashlib.blake2b(json.dumps(labels).encode(), digest_size=16)
    hasher.update(data)
    return hasher.hexdigest()


def dump_document(document: Mapping[str, Any]) -> str:
    """JSON of `document` with the checksum of everything else in it as one more key."""
    return _canonical({**document, "checksum": _document_digest(document)})


def parse_document(path: Path, text: str) -> dict[str, Any]:
    """What `dump_document` wrote; `path` names it in errors.

    The checksum is looked at before anything else in the document: a flipped bit shall not pass for another
    format or kind.

    Raises:
        DamagedError: altered, or not written by `dump_document`.
        NewerError: whole, and of a later format.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: its JSON cannot be read") from error
    if not isinstance(document, dict) or "checksum" not in document:
        raise DamagedError(f"{path} is damaged or was not written by arbitor: it holds no checksum")
    if document["checksum"] != _document_digest(document) or text != _canonical(document):
        raise DamagedError(f"{path} is damaged: its own checksum does not match")
    form = document.get("format")
    if type(form) is not int:
        raise DamagedError(f"{path} was not written by arbitor: it names no format")
    if form > FORMAT:
        raise NewerError(f"{path} has format {form}, this arbitor reads up to {FORMAT}: update arbitor")
    return document


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


def _document_digest(document: Mapping[str, Any]) -> str:
    return digest(_canonical({key: value for key, value in document.items() if key != "checksum"}).encode())


def _tensor_digest(name: str, tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return digest(flat.numpy().data, name, str(tensor.dtype), str(list(tensor.shape)))


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], **header: Any) -> str:
    """Write tensors and plain values to one file; equal content gives equal bytes.

    Args:
        path: the file.
        kind: what the file is; a reader asks for the same kind.
        tensors: by name.
        header: plain JSON values kept beside them.

    Returns:
        The checksum of the header, which covers everything in the file.

    Raises:
        OSError: the disk did not take it.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document: dict[str, Any] = {"format": FORMAT, "kind": kind, **header}
    document["tensors"] = {name: _tensor_digest(name, tensor) for name, tensor in on_cpu.items()}
    try:
        save_file(on_cpu, path, metadata={"arbitor": dump_document(document)})
    except SafetensorError as error:
        raise _os_error(str(error)) from error
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # as any other file of a run; safetensors makes it for its owner alone
    return _document_digest(document)


def _os_error(text: str) -> OSError:
    """What safetensors says of a file that it could not write, by the number that the system gave."""
    number = re.search(r"\(os error (\d+)\)", text)
    return OSError(text) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file of `write_tensors`.

    Returns:
        The tensors on the CPU and the header.

    Raises:
        DamagedError: the file is missing or damaged (naming the tensor), not ours, or of another kind.
        NewerError: it is of a later format.
    """
    _check_header_size(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            document = _checked_document(path, kind, file.metadata())
            checksums: dict[str, str] = document["tensors"]
            names = set(file.keys())
            for name in sorted(names ^ set(checksums)):
                raise DamagedError(f"{path} is damaged: tensor {name!r} is {_absence(name in names)}")
            for name, checksum in sorted(checksums.items()):
                # A copy: what was checked is what is used, whatever happens to the file.
                tensor = file.get_tensor(name).clone()
                if _tensor_digest(name, tensor) != checksum:
                    raise DamagedError(f"{path} is damaged: the checksum of tensor {name!r} does not match")
                tensors[name] = tensor
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged or cut short: {_one_line(error)}") from error
    except OSError as error:
        raise DamagedError(f"cannot read {path}: {error.strerror or error}") from error
    return tensors, document


def may_hold_tensors(path: Path) -> bool:
    """Whether a file is a safetensors file by its name, or by what it begins with: a size, and then JSON."""
    if path.suffix == SUFFIX:
        return True
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
    except OSError:
        return True  # Reading it says why it cannot be read.
    return int.from_bytes(begin[:8], "little") <= MAX_HEADER_BYTES and begin[8:] == b"{"


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """The verified header of a file of `write_tensors`; its tensors are not read."""
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _checked_document(path, kind, file.metadata())
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is damaged or cut short: {_one_line(error)}") from error


def read_text(path: Path) -> str:
    """A small text file of a checkpoint or a run.

    Raises:
        DamagedError: missing, no plain file, larger than such a file can be, or not UTF-8.
    """
    size = _plain_file_size(path)
    if size > MAX_TEXT_BYTES:
        raise DamagedError(f"{path} has {size} bytes, more than the {MAX_TEXT_BYTES} such a file can have")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"cannot read {path}: {_one_line(error)}") from error


def _plain_file_size(path: Path) -> int:
    try:
        status = os.lstat(path)
    except OSError as error:
        raise DamagedError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path} is no plain file; links and folders are not followed inside a checkpoint")
    return status.st_size


def _check_header_size(path: Path) -> None:
    size = _plain_file_size(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise DamagedError(f"cannot read {path}: {error.strerror}") from error
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise DamagedError(f"{path} is damaged or cut short: its header does not fit into its {size} bytes")


def _checked_document(path: Path, kind: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if metadata is None or set(metadata) != {"arbitor"}:
        raise DamagedError(
            f"{path} is damaged or was not written by arbitor: its metadata lacks the one key 'arbitor'"
        )
    document = parse_document(path, metadata["arbitor"])
    if document.get("kind") != kind or not isinstance(document.get("tensors"), dict):
        kind_found = document.get("kind")
        raise DamagedError(f"{path} is of the kind {kind_found!r}; a file of the kind {kind!r} is needed")
    return document


def _absence(in_file: bool) -> str:
    return "not in its list of checksums" if in_file else "missing"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
