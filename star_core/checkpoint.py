"""Networks from files, and files from networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from . import upcast
from .causal_sampler import CausalSampler
from .config import StarConfig, TransformerConfig, VQVAEConfig
from .eight_bit import quantize_linears
from .key_tables import STAR_KEYS, VQVAE_KEYS
from .stored import METADATA_KEY, resolve_config, stored_vqvae_config
from .transformer import Transformer
from .vqvae import VQVAE
from .weights import TensorFile, build_on_meta, fill, official_state, save_tensors


class Networks(nn.Module):
    """Transformer and, where the checkpoint has one, causal sampler: what one file fills."""

    def __init__(self, config: TransformerConfig, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.transformer = Transformer(config, operations=operations)
        self.causal_sampler = CausalSampler(config, operations=operations) if config.has_sampler else None


def operations_for(dtype: torch.dtype, device: torch.device, *, keep_halves: bool = False) -> ModuleType:
    """Return the layers of a model of this dtype that computes on this device: torch.nn, or `upcast`."""
    return upcast if keep_halves or upcast.needs_upcast(dtype, device) else nn


def load_networks(
    path: Path,
    *,
    preset_name: str | None = None,
    overrides: Mapping[str, object] | None = None,
    operations: ModuleType = nn,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    eight_bit: str | None = None,
    packed: bool = False,
    keep_halves: bool = False,
) -> tuple[StarConfig, Networks]:
    """Load transformer and causal sampler from a safetensors file, strictly.

    eight_bit: keep the linear layers' weights in 8 bits, "int8" or "fp8" (`eight_bit`), a fast mode that
    changes the picture. packed: lay them out for a CPU's bfloat16 products (`packed`). keep_halves: leave
    weights in their file where it holds halves, for `operations` that read them (`upcast`).
    Raises ValueError naming file, key and remedy.
    """
    file = TensorFile(path)
    config = resolve_config(file, preset_name, overrides)
    networks = build_on_meta(lambda: Networks(config.transformer, operations=operations))
    # Rounded before it moves: the device never holds the whole weights.
    first = "cpu" if eight_bit else device
    fill(
        networks,
        file,
        STAR_KEYS,
        source=str(path),
        dtype=dtype,
        device=first,
        packing=packed,
        keep_halves=keep_halves,
    )
    if eight_bit:
        quantize_linears(networks, eight_bit)
        for parameter in networks.parameters():
            # One that lies in the file would keep mapped, and counted, all that was read of it.
            parameter.data = parameter.data.clone()
        networks.to(device)
    return config, networks


def load_vqvae(
    path: Path,
    config: VQVAEConfig | None = None,
    *,
    operations: ModuleType = nn,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_halves: bool = False,
) -> VQVAE:
    """Load a VQ-VAE from a safetensors file; `config` must agree with what the file says of itself.

    keep_halves: as in `load_networks`.
    """
    file = TensorFile(path)
    stored = stored_vqvae_config(file)
    if config is not None and stored is not None and stored != config:
        raise ValueError(
            f"{path} holds another VQ-VAE than the checkpoint was trained with: {stored} instead of {config}"
        )
    chosen = config or stored or VQVAEConfig()
    vqvae = build_on_meta(lambda: VQVAE(chosen, operations=operations))
    fill(vqvae, file, VQVAE_KEYS, source=str(path), dtype=dtype, device=device, keep_halves=keep_halves)
    # A host's layers are the host's: it may keep and stream their weights as plain rows of numbers.
    return vqvae.channels_last() if operations is nn and torch.device(device).type == "cuda" else vqvae


def save_networks(path: Path, config: StarConfig, networks: Networks) -> None:
    """Write transformer and causal sampler with the whole configuration in the metadata."""
    tensors: dict[str, Tensor] = official_state(networks, STAR_KEYS)
    save_tensors(path, tensors, {METADATA_KEY: config.to_json()})
