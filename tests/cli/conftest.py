"""A tiny checkpoint that the tests write themselves, and `sample` on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from star_core.__main__ import main
from star_core.checkpoint import Networks, save_networks
from star_core.config import StarConfig, TransformerConfig, VQVAEConfig, square_maps
from star_core.vqvae import VQVAE
from star_core.weights import save_vqvae

DEMO = Path(__file__).parents[2] / "star_core" / "demo"
TEXT_WIDTH = 128


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random model and the shipped text encoder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vqvae_config = VQVAEConfig(8, (1, 2, 2), 1, codebook_size=32, code_width=8, norm_groups=4)
    config = StarConfig(
        "tiny",
        TransformerConfig(1, 64, 1, 3, TEXT_WIDTH, 32, code_width=8, sampler_depth=1),
        vqvae_config,
        square_maps((1, 2, 4)),
        "top-k",
    )
    networks = Networks(config.transformer)
    networks.transformer.initialise(torch.Generator().manual_seed(0))
    networks.causal_sampler.initialise(torch.Generator().manual_seed(1))
    save_networks(folder / "star.safetensors", config, networks)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        save_vqvae(folder / "vqvae.safetensors", VQVAE(vqvae_config))
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(DEMO / name, folder / name)
    return folder


@pytest.fixture
def sample(checkpoint, capsys):
    """Run `sample` on the tiny checkpoint; return (exit code, output, error)."""

    def run(*arguments):
        code = main(
            ["sample", *map(str, arguments), "--checkpoint", str(checkpoint), "--device", "cpu", "--quiet"]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
