"""Cancel, pressed while a long batch is drawn and decoded by the server with the shipped model."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from client import Client, Event, Run

BATCH = 8
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
STEPS = "maps 1 2 3 4 5 6 8 10 13 16\nsteps 0*7 8*3\ntransformer_steps 0\nrandom_steps 0"
SEED = 7
WAY = 1.0
"""Seconds within which Cancel has to act, where a block does not take longer."""


@pytest.fixture(scope="module")
def long_prompt(prompt):
    """A batch that takes many seconds: two thirds of them in the causal sampler's steps at the late scales."""
    nodes = prompt(seed=SEED, batch_size=BATCH, sampler=["steps", 0])
    settings = {"steps": STEPS, "strategy": "confidence", "guidance": 2.0}
    nodes["steps"] = {"class_type": "StarCausalSampler", "inputs": settings}
    return nodes


def line(scale: int) -> str:
    return f"scale {scale}/10 · {SIDES[scale - 1]}x{SIDES[scale - 1]}"


def is_line(event: Event, scale: int) -> bool:
    return event.kind == "text" and event.data == ("sample", line(scale))


def is_start(event: Event, node: str) -> bool:
    return event.kind == "executing" and event.data["node"] == node


class Cancel:
    """Presses Cancel at the first event of a kind, and remembers when."""

    def __init__(self, client: Client, wanted) -> None:
        self.client, self.wanted, self.at = client, wanted, 0.0

    def __call__(self, event: Event) -> None:
        if not self.at and self.wanted(event):
            self.client.post("/star_test/longest", {})  # blocks that were done before count no more
            self.at = time.monotonic()
            self.client.post("/interrupt", {})


@pytest.fixture(scope="module")
def whole(server, long_prompt) -> Run:
    """The same prompt undisturbed, drawn by networks that no one has cancelled yet."""
    from client import Client

    user = Client(server)
    user.post("/star_test/longest", {})
    run = user.run(long_prompt)
    assert run.ended == "execution_success", run.events[-1]
    return run


@pytest.fixture(scope="module")
def pictures(whole: Run) -> list[bytes]:
    found = whole.pictures()
    assert len(set(found)) == BATCH, "equal pictures in a batch compare nothing"
    return found


def cancelled(client, prompt, wanted, rest: float) -> tuple[Run, float]:
    """Run a prompt from nothing, cancel it; rest: how long it would go on. Return the run and the delay."""
    client.free()
    press = Cancel(client, wanted)
    run = client.follow(client.queue(prompt), press)
    block = client.post("/star_test/longest", {})["seconds"]
    delay, limit = run.events[-1].at - press.at, max(WAY, block)
    assert press.at, "the moment to cancel never came"
    assert run.ended == "execution_interrupted", run.events[-1]
    # Without a check the prompt would go on for `rest`: within the limit it cannot end by itself.
    assert rest > 2 * limit, f"{rest:.1f} s are too short a rest to show that something stopped it"
    print(f"cancelled after {delay:.2f} s of {rest:.1f} s, longest block {block:.2f} s")  # noqa: T201
    assert delay < limit, f"Cancel took {delay:.2f} s, the longest block {block:.2f} s"
    return run, delay


@pytest.mark.parametrize("scale", [1, 5, 9])
def test_cancel_acts_within_a_second_and_the_next_prompt_equals_an_undisturbed_one(
    client, long_prompt, whole, pictures, scale
):
    since = next(event.at for event in whole.events if is_line(event, scale))
    rest = whole.events[-1].at - since
    run, _ = cancelled(client, long_prompt, lambda event: is_line(event, scale), rest)
    # It stopped at the scale that was being drawn: no later one was finished, and no picture was saved.
    assert run.texts == [line(k) for k in range(1, scale + 1)]
    assert run.history["status"]["status_str"] == "error"
    assert not run.history["outputs"]
    assert client.alive(collect=True)["LayerCache"] == 0
    # 8 pictures, byte for byte: a single token drawn otherwise shows.
    assert client.run(long_prompt).pictures() == pictures


def test_cancel_acts_while_decoding_too(client, prompt):
    # Unguided, since they only have to be many.
    many = prompt(seed=SEED, batch_size=180, schedule=["schedule", 0])
    unguided = {"schedule": "top_k 600\nguidance 0"}
    many["schedule"] = {"class_type": "StarScaleSchedule", "inputs": unguided}
    undisturbed = client.run(many)
    wanted = undisturbed.pictures()
    began = next(event.at for event in undisturbed.events if is_start(event, "decode"))
    ended = next(event.at for event in undisturbed.events if is_start(event, "save"))
    run, _ = cancelled(client, many, lambda event: is_start(event, "decode"), ended - began)
    assert not [event for event in run.events if is_start(event, "save")]
    assert client.run(many).pictures() == wanted


def test_cancel_leaves_what_waits_behind_it(client, prompt, long_prompt):
    # The second prompt was queued before Cancel: an interruption that outlives its prompt would end it too.
    client.free()
    first, second = client.queue(long_prompt), client.queue(prompt(seed=99))
    press = Cancel(client, lambda event: is_line(event, 2))
    assert client.follow(first, press).ended == "execution_interrupted"
    (file,) = client.follow(second).files()
    assert Image.open(io.BytesIO(file)).size == (64, 64)
