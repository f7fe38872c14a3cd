"""Weight files: found, read safely, and written so that a failure leaves what was there.

Knows no model and no naming of keys; `rlt.network.vit` and `rlt.checkpoints` stand on it.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rlt.checks import some
from rlt.errors import CheckpointError
from rlt.files import newest, replacing_all

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MODEL = "model"
"""In the folder of a run, the folder of its weights."""
_FOLDER_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a folder's weights may be called, best first."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def find_source(source: str | Path, **download: Any) -> Path:
    """The local file or folder of a checkpoint: of the folder of a run its model/.

    A hub id (owner/name) that is no path here is downloaded, configuration and weights only.

    `download` are options of huggingface_hub's `snapshot_download`.
    """
    name = str(source)
    try:
        path = Path(source).expanduser()
        if _is_there(path):
            if path.is_dir() and not _has_weights(path) and _has_weights(path / MODEL):
                return path / MODEL
            in_folder = path.name in _FOLDER_WEIGHTS and (path.parent / CONFIG).is_file()
            return path.parent if in_folder else path  # the configuration beside the weights belongs to them
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL, a home of nobody
        raise _unreadable(name, error) from error
    if not _HUB_ID.fullmatch(name) or path.suffix in FILE_SUFFIXES:
        raise CheckpointError(f"{name} does not exist; give a file, a folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download  # imports an HTTP client, which local files need not

    for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
        try:
            wanted = [CONFIG, "*processor_config.json", weights]
            folder = Path(snapshot_download(name, allow_patterns=wanted, **download))
        except Exception as error:  # errors of whichever HTTP library the hub client uses
            raise CheckpointError(
                f"{name} is no file or folder, and the Hugging Face hub does not give it ({first_line(error)}); "
                "check the name and the network, or give a local path"
            ) from error
        if _has_weights(folder):
            break
    return folder


def _has_weights(folder: Path) -> bool:
    return any(newest(folder / name).is_file() for name in _FOLDER_WEIGHTS)


def _is_there(path: Path) -> bool:
    """As `Path.exists`, which passes over some errors and not over others, depending on the version of Python."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; a CheckpointError if the file is not one."""
    path = newest(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({first_line(error)}); get the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def read_config(folder: Path) -> dict[str, object] | None:
    """The configuration beside the weights; None where the folder has none."""
    path = folder / CONFIG
    return read_json(path) if newest(path).is_file() else None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder in Hugging Face's form: one file or shards, safetensors before pickles."""
    name = next((name for name in _FOLDER_WEIGHTS if newest(folder / name).is_file()), None)
    if name is None:
        found = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS} or pytorch_model.bin (found: {some(found)}); give the checkpoint file itself"
        )
    if not name.endswith(".index.json"):
        return tensors_in(read_file(newest(folder / name)), folder / name)
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / name} has no weight_map with entries; get the file again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{folder / name} names {shard}, which is not in the folder; get all shards")
        tensors |= tensors_in(read_file(folder / shard), folder / shard)
    return tensors


def read_file(path: Path) -> Mapping[str, object]:
    """The content of one safetensors or PyTorch file, on the CPU. No code of the file ever runs."""
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise _unreadable(path, error) from error
    if not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe; give a checkpoint file")
    if empty:
        raise CheckpointError(f"{path} is empty (0 bytes); get the file again")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or cut off ({first_line(error)}); get the file again") from error
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle as before PyTorch 1.6
        raise CheckpointError(f"{path} is no PyTorch checkpoint (it begins with {start!r}); give a .pth, .pt or .ckpt")
    content = _unpickle_tensors(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a dictionary of weights is needed")
    return content


def _unreadable(path: object, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({first_line(error)}); check the path and its permissions")


def _unpickle_tensors(path: Path) -> object:
    try:
        # VideoMAE stores its command line as an argparse.Namespace, an inert record. Mapping the file instead of
        # reading it leaves optimizer states on the disk.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files make the reader raise nearly anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is damaged, cut off or no plain checkpoint; get the file again") from error
        raise CheckpointError(
            f"{path} holds Python objects ({refused[1]}), which can run code and are never loaded; if you trust where "
            "it is from, keep only its weights: c = torch.load(OLD, weights_only=False); "
            "torch.save({k: c[k] for k in ('state_dict', 'model', 'module') if k in c}, NEW)"
        ) from error


def tensors_in(content: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    """The named tensors of a state dict, at least one."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights (keys: {some(list(map(str, content)))}); give a model's weights"
        )
    return tensors


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise where a weight is NaN or infinite, as after a training that diverged: every answer would be NaN."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {len(bad)} of {len(tensors)} weights ({some(bad)}); "
            "get it again, or take an earlier checkpoint of its training"
        )


def _finite(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())  # a NaN is both ends


def misfits(model: nn.Module, tensors: Mapping[str, Tensor], fresh: Collection[str] = ()) -> str:
    """Say in one line what of a model's weights, other than `fresh` ones, tensors do not fit; empty if all do."""
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in needed if name not in tensors and name not in fresh]
    unexpected = [name for name in tensors if name not in needed]
    mis_shaped = [
        f"{name} is {tuple(tensors[name].shape)}, {shape} is needed"
        for name, shape in needed.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    return key_problems(missing, unexpected, mis_shaped)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into a model of the same names and shapes, or leave it as it is; its own dtype stays."""
    if problems := misfits(model, tensors):
        raise CheckpointError(f"{source} does not fit the model: {problems}")
    check_finite(tensors, source)
    model.load_state_dict(dict(tensors))


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    others: Mapping[str, str] | None = None,
) -> None:
    """Write weights and their configuration; after a failure, and a kill, the old files are read, or the new ones.

    Where the folder holds a checkpoint already it must be of the same `model_type` as `config`, so that no other
    model's configuration is lost. `others` are further text files by name.
    """
    refuse_other_model(folder, str(config["model_type"]))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    texts = {**(others or {}), CONFIG: text}  # the configuration last: with it a folder is a checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_all(folder, (WEIGHTS, *texts)) as staging:
            for name, content in texts.items():
                (staging / name).write_text(content, encoding="utf-8")
            safetensors.torch.save_file(whole, staging / WEIGHTS, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({first_line(error)}); free space or choose another"
        ) from error


def refuse_other_model(folder: Path, model_type: str) -> None:
    """Raise where writing a checkpoint would overwrite a file, or a checkpoint of another `model_type`."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder to write")
    config = read_config(folder)
    if config is None and not (folder / WEIGHTS).exists():
        return
    found = (config or {}).get("model_type")
    if found != model_type:
        raise CheckpointError(f"{folder} holds another model (model_type {found!r}); choose another folder")


def key_problems(missing: Collection[str], unexpected: Collection[str], mis_shaped: Collection[str]) -> str:
    """Say in one line which keys do not fit; empty if all do."""
    kinds = ((missing, "missing", 4), (unexpected, "unexpected", 4), (mis_shaped, "of another shape", 2))
    return ", ".join(f"{len(names)} {kind} ({some(names, shown)})" for names, kind, shown in kinds if names)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
