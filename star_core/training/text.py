"""The shipped text encoder: a small CLIP text model distilled from the sentence encoder MiniLM.

No CLIP weights can be redistributed here, so the tower that reads prompts is taught what texts mean by a
frozen sentence encoder (Hinton et al., 2015), and by a linear probe which style a prompt names:
MiniLM itself hardly tells "Noto emoji of a cat" from "Twemoji emoji of a cat".

Two tricks make minutes on two cores enough. Every token row starts as the teacher's own embedding of
what the token spells, in the teacher's first principal directions, and the first layer starts as a mean
over the words so far. And the teacher embeds contents only ("jet plane"): the wording around them is drawn
anew at each step and must leave the meaning alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text_encoder import load_tokenizer
from ..text_files import quantize_rows
from ..weights import save_tensors
from .bpe import END_ID, MAX_TOKENS, START_ID, VOCABULARY, read_merges, write_tokenizer
from .minilm import WIDTH as TEACHER_WIDTH
from .minilm import load_minilm
from .optimizers import rate_at, set_rate
from .options import add_run_arguments
from .packages import asset_path
from .run import Checkpoint, precision, use_threads
from .text_corpus import SHARES, Batch, Corpus, draw_batch, gather_corpus, word
from .wording import STYLES, Wording

if TYPE_CHECKING:
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

WIDTH = 128
SETTINGS: Mapping[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": START_ID,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}
# Gives a token row about the spread of a state, 0.5 to 1 per dimension.
_ROW_SCALE = 8.0
_LENGTH_GROUPS = 4


class Student(nn.Module):
    """The text model with the linear probes that training asks; only the text model is exported."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        self.meaning = nn.Linear(WIDTH, TEACHER_WIDTH)
        self.word_meaning = nn.Linear(WIDTH, TEACHER_WIDTH)
        self.style = nn.Linear(WIDTH, len(STYLES) + 1)

    @property
    def device(self) -> torch.device:
        """Return where it computes."""
        return self.meaning.weight.device

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled states (N, T) and mean word states (N, T) of ids (N, L) padded on the right.

        Rows run in groups of like length, each cut to its longest: attention is causal, so
        padding after the end changes nothing and needs no mask.
        """
        order = lengths.argsort()
        groups = [self._states(ids[rows], lengths[rows]) for rows in order.chunk(_LENGTH_GROUPS)]
        back = order.argsort()
        pooled, mean = (torch.cat(parts)[back] for parts in zip(*groups, strict=True))
        return pooled, mean

    def _states(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(lengths.max())
        hidden: Tensor = self.model(input_ids=ids[:, :longest]).last_hidden_state
        places = torch.arange(longest, device=ids.device)
        # START is no word; END counts, so that the empty prompt has a mean too.
        words = (places > 0) & (places < lengths[:, None])
        mean = (hidden * words[..., None]).sum(1) / words.sum(1, keepdim=True)
        return hidden[torch.arange(len(hidden)), lengths - 1], mean


def new_student(rows: Tensor, directions: Tensor, seed: int) -> Student:
    """Return the untrained student whose tokens (V, 384) already mean what they spell.

    directions: (384, T), orthonormal, the teacher's principal ones.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        # transformers initialises from torch's global generator; the fork puts it back as it was.
        torch.default_generator.manual_seed(seed)
        student = Student(CLIPTextModel(CLIPTextConfig(**SETTINGS)))
    inner = getattr(student.model, "text_model", student.model)
    with torch.no_grad():
        inner.embeddings.token_embedding.weight.copy_(_ROW_SCALE * rows @ directions)
        first = inner.encoder.layers[0].self_attn
        for weight in (first.q_proj.weight, first.k_proj.weight):
            weight.mul_(0.1)  # near-uniform attention: a running mean of the words
        for weight in (first.v_proj.weight, first.out_proj.weight):
            weight.copy_(torch.eye(WIDTH))
        for probe in (student.meaning, student.word_meaning):
            probe.weight.copy_(directions)
            probe.bias.zero_()
    # Kept at 1 and 0: every state then has unit variance over its dimensions, as the transformer that
    # is trained on the states expects.
    inner.final_layer_norm.requires_grad_(False)
    return student


def principal_directions(targets: Tensor) -> Tensor:
    """Return the first T principal directions (384, T) of embeddings (N, 384), not centred."""
    vectors: Tensor = torch.linalg.eigh(targets.T.double() @ targets.double()).eigenvectors
    return vectors[:, -WIDTH:].flip(1).float()


def loss_of(student: Student, batch: Batch) -> Tensor:
    """Return the training loss of a batch: meaning of the whole, of its words, likeness, style."""
    pooled, mean = student(batch.ids, batch.lengths)
    meaning = F.normalize(student.meaning(pooled), dim=-1)
    words = F.normalize(student.word_meaning(mean), dim=-1)
    far = 1 - (meaning * batch.targets).sum(-1).mean()
    far_words = 1 - (words * batch.targets).sum(-1).mean()
    # Who is like whom within the batch, as the teacher sees it: what nearest neighbours depend on.
    sharp = 20.0
    wanted = (sharp * batch.targets @ batch.targets.T).softmax(-1)
    alike = F.cross_entropy(sharp * meaning @ batch.targets.T, wanted)
    style = F.cross_entropy(student.style(pooled), batch.styles)
    return far + 0.5 * far_words + 0.1 * alike + 0.1 * style


def export(student: Student, tokenizer: Path, folder: Path) -> None:
    """Write text_encoder/ and tokenizer/ into `folder`, replacing what is there in one move.

    Tensors carry the names of transformers 4 and of every released text model; matrices are float16,
    token rows int8 with a float16 scale each.
    """
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    inner = getattr(student.model, "text_model", student.model)
    tensors = {}
    for name, tensor in inner.state_dict().items():
        if name == "embeddings.token_embedding.weight":
            tensors[f"text_model.{name}.int8"], tensors[f"text_model.{name}.scale"] = quantize_rows(tensor)
        else:
            tensors[f"text_model.{name}"] = tensor.half()
    save_tensors(fresh / "text_encoder" / "model.safetensors", tensors, {})
    config = json.dumps(dict(SETTINGS), indent=2) + "\n"
    (fresh / "text_encoder" / "config.json").write_text(config, encoding="utf-8")
    shutil.copytree(tokenizer, fresh / "tokenizer")
    stale = folder.with_name(folder.name + ".old")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


@torch.no_grad()
def measure(student: Student, corpus: Corpus, wording: Wording, seed: int) -> dict[str, float]:
    """Return figures on contents never trained on: cosine to the teacher, retrieval, style.

    cosine: mean over each kind, in drawn wordings. retrieval: how often, of the held-out contents of all
    kinds, the nearest teacher embedding to the student's is its own. style: share of wordings
    whose style (or its absence) the probe reads off the pooled state.
    """
    figures = {}
    meanings, targets, right = [], [], []
    for kind in SHARES:
        rng = np.random.default_rng((seed, 1))
        batch = word(corpus, wording, corpus.held_out[kind], rng).to(student.device)
        pooled, _ = student(batch.ids, batch.lengths)
        meaning = F.normalize(student.meaning(pooled), dim=-1)
        figures[f"cosine_{kind}"] = float((meaning * batch.targets).sum(-1).mean())
        right.append((student.style(pooled).argmax(-1) == batch.styles).float())
        meanings.append(meaning)
        targets.append(batch.targets)
    nearest = (torch.cat(meanings) @ torch.cat(targets).T).argmax(-1)
    own = torch.arange(len(nearest), device=nearest.device)
    figures["retrieval"] = float((nearest == own).float().mean())
    figures["style"] = float(torch.cat(right).mean())
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    add_run_arguments(parser, steps=700, batch=256, rate=2e-3)
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))


def run(args: argparse.Namespace) -> None:
    """Distil the text encoder and write <run>/export/ with text_encoder/ and tokenizer/."""
    use_threads(args)
    folder: Path = args.run
    tokenizer = folder / "tokenizer"
    write_tokenizer(read_merges(asset_path("clip-bpe", args.packages)), tokenizer)
    teacher = load_minilm(asset_path("minilm", args.packages), device=args.device)
    cache = folder / "teacher"
    corpus, rows = gather_corpus(args.packages, load_tokenizer(tokenizer), teacher, cache, args.seed)
    wording = Wording(load_tokenizer(tokenizer))
    student = new_student(rows, principal_directions(corpus.targets), args.seed)
    student.to(args.device)
    train(student, corpus, wording, args)
    export(student, tokenizer, folder / "export")
    figures = measure(student, corpus, wording, args.seed)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def train(student: Student, corpus: Corpus, wording: Wording, args: argparse.Namespace) -> None:
    """Train up to args.steps, from the run's checkpoint if it has one."""
    optimizer = _optimizer(student)
    checkpoint = Checkpoint(args.run / "last.pt")
    if state := checkpoint.load():
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    if checkpoint.step == 0:
        log.info("before training: %s", _told(measure(student, corpus, wording, args.seed)))

    def save() -> None:
        log.info("held out: %s", _told(measure(student, corpus, wording, args.seed)))
        checkpoint.save({"student": student.state_dict(), "optimizer": optimizer.state_dict()})

    while (done := checkpoint.done(args)) < 1:
        step = checkpoint.step
        set_rate(optimizer, rate_at(step, done, args.rate))
        batch = draw_batch(corpus, wording, args.batch, seed=args.seed, step=step).to(student.device)
        with precision(args):
            loss = loss_of(student, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        checkpoint.step = step + 1
        if checkpoint.step % args.log_every == 0:
            log.info("step %d, loss %.4f, %.0f s", step + 1, loss.item(), checkpoint.total_seconds())
        if checkpoint.step % args.save_every == 0:
            save()
    if checkpoint.step > checkpoint.saved:
        save()


def _optimizer(student: Student) -> torch.optim.Optimizer:
    """Return AdamW over matrices (with decay) and the rest: norms, biases, token rows (without).

    A row that no text uses has no gradient; decay would wear away what it was initialised to mean.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decays = {name for name, p in named if p.ndim == 2 and "embedding" not in name}
    groups = [
        {"params": [p for name, p in named if name in decays], "weight_decay": 0.02},
        {"params": [p for name, p in named if name not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), lr=0.0, fused=True)


def _told(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
