"""The one place that reads weights: from safetensors, and from pickles through one guarded reader.

Loading is strict: modules are built on the meta device, every tensor of a file is known or left out for a
stated reason, and every parameter is filled. All errors are ValueErrors naming file, key and remedy.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import VQVAEConfig
from .key_tables import VQVAE_KEYS, KeyTable
from .packed import can_be_packed, packed, put_packed
from .stored import METADATA_KEY, FileHeader
from .upcast import HALVES, reads_halves
from .vqvae import VQVAE

log = logging.getLogger(__name__)

FORMAT = "star-1"
ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"

RELEASE_AFTER = 2**26
"""Bytes of a mapped file that are read before they are let go of, where copies are made of them."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TensorFile(FileHeader, Mapping[str, Tensor]):
    """The tensors of one safetensors file, read one at a time when asked for."""

    framework = "pt"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def release(self) -> None:
        """Let go of the pages that were read: tensors that were copied from them need them no more."""
        self._file = self._open()


def read_pickle(path: Path) -> Any:
    """Read a .pth or .pt file with weights_only=True, memory-mapped where its format allows it.

    Raises ValueError where the file is missing, broken, or asks to run code.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: this is a safetensors file, and wanted is a .pth, .pt or .bin of PyTorch's")
    # Files from before PyTorch 1.6 are no zip archives and cannot be memory-mapped.
    mapped = start == ZIP_START
    if not mapped and start[:1] != PICKLE_START:
        raise ValueError(f"{path}: not a whole PyTorch file (it begins with {start!r}). Download it again")
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message is a page of advice; what the pickle asks for stands in the middle of it.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"it asks for {asked.group(1)}" if asked else "it is not a plain one"
        raise ValueError(
            f"{path}: this pickle needs more than tensors and plain containers ({wants}). It could run"
            " code and is not opened. Ask its maker for safetensors, or re-save only the state dict on a"
            " machine that you can afford to lose"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a whole PyTorch file ({first:.200}). Download it again") from error


def fill(
    module: ModuleT,
    tensors: Mapping[str, Tensor],
    table: KeyTable,
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    packing: bool = False,
    keep_halves: bool = False,
) -> ModuleT:
    """Give a module on the meta device its tensors, by the key table, strictly.

    `tensors` carries official names. On a CPU, weights whose dtype is the wanted one stay in their file,
    mapped; otherwise everything is copied. packing: linear layers become packed ones, for a dtype and device
    that `can_be_packed`. keep_halves: on a CPU, matrices in half precision stay in their file whatever the
    wanted dtype is, where `upcast` layers or embeddings read them.
    Raises ValueError naming the missing, surplus or misshapen keys.
    """
    names = check_keys(module, tensors, table, source)
    device = torch.device(device)
    assert not packing or can_be_packed(dtype, device), "checked by who asks for it"
    assert not keep_halves or device.type == "cpu", "files are mapped into a CPU's memory"
    # Either all stay in the file or none: one that stayed would hold what is read of it in memory.
    copied = packing or device.type != "cpu" or not _lie_as_needed(tensors, names, dtype)
    found: dict[str, Tensor] = {}
    packs: dict[str, Tensor] = {}
    read = 0
    for official, ours in names.items():
        tensor = tensors[official]
        layer, _, leaf = ours.rpartition(".")
        matrix = leaf == "weight" and not _is_exact(ours)
        if packing and matrix and isinstance(module.get_submodule(layer), nn.Linear):
            packs[layer] = packed(tensor.to(dtype=dtype))
            found[ours] = tensor.to("meta")
        elif keep_halves and matrix and tensor.dtype in HALVES and reads_halves(module.get_submodule(layer)):
            found[ours] = tensor
        else:
            found[ours] = tensor.to(device=device, dtype=kept_dtype(ours, dtype or tensor.dtype), copy=copied)
        read += tensor.nbytes
        if copied and not keep_halves and read > RELEASE_AFTER and isinstance(tensors, TensorFile):
            del tensor
            tensors.release()
            read = 0
    module.load_state_dict(found, strict=True, assign=True)
    put_packed(module, packs)
    return module.requires_grad_(False).eval()


def _lie_as_needed(tensors: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype | None) -> bool:
    """Whether the weights have the wanted dtype, None for any. Vectors and what is kept exact do not decide:
    they are small, and stand beside mapped weights in another format."""
    large = [
        tensors[official]
        for official, ours in names.items()
        if len(_shape(tensors, official)) > 1 and not _is_exact(ours)
    ]
    return all(tensor.dtype == (dtype or tensor.dtype) for tensor in large)


def check_keys(
    module: nn.Module, tensors: Mapping[str, Tensor], table: KeyTable, source: str
) -> dict[str, str]:
    """Return official -> our name of every tensor that fills the module, without reading any.

    Raises ValueError naming the missing, surplus or misshapen keys.
    """
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    names: dict[str, str] = {}
    filled: set[str] = set()
    surplus = []
    for official in tensors:
        ours = table.ours(official)
        if reason := table.reason_dropped(official):
            log.debug("%s: %s left out: %s", source, official, reason)
        elif ours is None or ours not in wanted or ours in filled:
            surplus.append(official)
        else:
            shape = _shape(tensors, official)
            if shape != wanted[ours]:
                raise ValueError(
                    f"{source}: {official} has shape {shape}, the configuration wants {wanted[ours]}."
                    " Another preset, or a file of another model?"
                )
            names[official] = ours
            filled.add(ours)
    missing = [table.official(name) or name for name in wanted if name not in filled]
    if missing or surplus:
        raise ValueError(f"{source}: {_key_complaint(missing, surplus)}")
    return names


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tensors.shape(name) if isinstance(tensors, TensorFile) else tuple(tensors[name].shape)


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a parameter of ours is stored in: some stay float32, whatever the others are."""
    return torch.float32 if _is_exact(name) else dtype


def _is_exact(name: str) -> bool:
    """Whether a parameter of ours is kept in float32: log scales, since they are exponentiated, and codebook
    and phis, in whose float32 a picture's tokens are found and f_hat adds up (`quantizer`)."""
    return name.endswith("log_scale") or name.startswith("quantizer.")


def _key_complaint(missing: list[str], surplus: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if surplus:
        parts.append(f"{len(surplus)} tensors are not known, the first is {surplus[0]}")
    return "; ".join(parts) + ". Is this the right file for this model and preset?"


class _Undrawn(TorchFunctionMode):
    """Leave parameters as they are where torch's layers would draw first values for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def build_on_meta(make: Callable[[], ModuleT]) -> ModuleT:
    """Build a module without memory, to be filled with a file's own tensors.

    torch's layers draw nothing: numbers that are not there would take a third of the time, and PyTorch's
    compiler, which it imports for them, a second.
    """
    with torch.device("meta"), _Undrawn():
        return make()


def build_with(make: Callable[[], ModuleT], state: Mapping[str, Tensor]) -> ModuleT:
    """Build a module that holds the tensors of a state dict, not copies of them."""
    module = build_on_meta(make)
    module.load_state_dict(state, assign=True)
    return module


def official_state(module: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """Return a module's state dict under the official names."""
    state = {}
    for name, tensor in module.state_dict().items():
        official = table.official(name)
        assert official is not None, f"the key table has no official name for {name}"
        state[official] = tensor.contiguous()
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose metadata also names the format; under its name it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    # safetensors makes files that none but their owner reads; this one is to be shared as any other is.
    part.unlink(missing_ok=True)
    part.touch()
    mode = stat.S_IMODE(part.stat().st_mode)
    save_file(dict(tensors), part, {"format": "pt", "star_format": FORMAT, **metadata})
    if stat.S_IMODE(part.stat().st_mode) != mode:
        part.chmod(mode)
    os.replace(part, path)


def vqvae_record(config: VQVAEConfig) -> str:
    """Return what a VQ-VAE file's metadata says of it."""
    return json.dumps({"vqvae": asdict(config)}, separators=(",", ":"))


def save_vqvae(path: Path, vqvae: VQVAE) -> None:
    """Write a VQ-VAE with its configuration in the metadata."""
    save_tensors(path, official_state(vqvae, VQVAE_KEYS), {METADATA_KEY: vqvae_record(vqvae.config)})
